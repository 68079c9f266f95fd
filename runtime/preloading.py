"""Find, or generate, and open a whole set of modules at once."""

from __future__ import annotations

from collections.abc import Sequence

from tilemla.errors import ModuleNotBuiltError
from tilemla.generate import run_side_by_side
from tilemla.host import list_gpus
from tilemla.loader import ensure_module, find_module, load_entry, loaded_specs
from tilemla.log import logger
from tilemla.progress import show_progress
from tilemla.select import arch_of
from tilemla.spec import KernelSpec, select_specs
from tilemla.store import Entry


def preload_modules(
    preset: str = "deepseek-v3", *, archs: Sequence[str] | None = None, dtypes: Sequence[str] = (), jobs: int = 0
) -> list[KernelSpec]:
    """Find, or generate, and open the modules of a model, with progress on stderr.

    A GPU's code itself is loaded by the driver at the first call on each device. CUDA is not initialised here, so that
    a server may still fork.

    Parameters
    ----------
    preset : str
        Key of ``tilemla.spec.PRESETS``.
    archs : sequence of str, optional
        Architectures to load for; by default those of the GPUs in this machine, or the CPU when it has none that
        there are kernels for.
    dtypes : sequence of str
        Keep only the modules of these dtypes, such as ``("bfloat16",)``.
    jobs : int
        How many modules are generated at once; 0 takes as many as this process may use cores.

    Returns
    -------
    list of KernelSpec
        The specs whose modules are open now.

    Raises
    ------
    ModuleNotBuiltError
        When modules are missing that may not or cannot be generated; names each.
    DriverError
        When ``archs`` is to be found out and the NVIDIA driver does not answer.
    ValueError
        On a preset that does not exist, or when nothing is left of it.
    """
    archs = usable_archs() if archs is None else list(archs)
    specs = select_specs(presets=(preset,), archs=archs, dtypes=dtypes)
    if not specs:
        raise ValueError(f"nothing of preset {preset!r} is for archs {', '.join(archs)} and dtypes {', '.join(dtypes)}")
    to_open = [spec for spec in specs if spec not in loaded_specs()]
    # Found and opened by this thread, for during an import another one that imports a part of this package would wait
    # forever. What a build needs to know of sources and tools is found out, once, where a module is looked for.
    found = {spec: find_module(spec) for spec in to_open}
    with show_progress() as progress:

        def make(spec: KernelSpec) -> tuple[Entry, bool]:
            return ensure_module(spec, lambda step: progress.step(spec.name, step)).entry, True

        outcomes = run_side_by_side([spec for spec, there in found.items() if there is None], make, jobs=jobs)
        for spec, there in found.items():
            if there is not None:
                load_entry(spec, there.entry)
        for outcome in outcomes:
            if outcome.entry is None:
                progress.done(outcome.item.name, "failed", failed=True)
            else:
                load_entry(outcome.item, outcome.entry)
                progress.done(outcome.item.name, f"loaded after {outcome.seconds:.1f} s")
    failures = [outcome.error for outcome in outcomes if outcome.error is not None]
    if failures:
        raise ModuleNotBuiltError(
            f"{len(failures)} of {len(specs)} modules of {preset} are missing:\n" + "\n".join(failures)
        )
    logger().info("%s: %d modules loaded", preset, len(specs))
    return specs


def usable_archs() -> list[str]:
    """Architectures of the GPUs in this machine that there are kernels for; the CPU when there is none."""
    archs = {arch_of("cuda", gpu.capability) for gpu in list_gpus()}
    return sorted(arch for arch in archs if arch is not None) or ["cpu"]
