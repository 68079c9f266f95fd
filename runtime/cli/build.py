"""``tilemla build``: generate modules ahead of time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tilemla.cli.options import repeatable, spec_options
from tilemla.spec import KERNELS, PRESETS, KernelSpec, select_specs

if TYPE_CHECKING:
    from tilemla.generate import Outcome
    from tilemla.store import Entry


@click.command()
@repeatable(
    "--preset",
    "presets",
    list(PRESETS),
    "Modules of a model. Default: of every model, or with a cache format, a head dim or a page size, all that there "
    "are; what follows narrows it",
)
@click.option(
    "--kernel",
    "kernels",
    multiple=True,
    type=click.Choice(list(KERNELS)),
    help="Only modules for this; read_pages, which `tilemla bench` compares with on a GPU, is built when it is named. "
    "May be given repeatedly.",
)
@spec_options("sm_90a and cpu")
@click.option("--jobs", "-j", default=0, type=click.IntRange(min=0), help="Modules built at once. Default: the cores.")
@click.option(
    "--out-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where modules go, or with --wheel the wheel. Default: the cache, and for a wheel the current directory.",
)
@click.option("--wheel", is_flag=True, help="Make an installable wheel of the modules, one for each architecture.")
@click.option("--force", is_flag=True, help="Also build modules that are there and up to date.")
@click.option("--dry-run", is_flag=True, help="Say what would be built, and build nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
def build(
    kernels: tuple[str, ...],
    presets: tuple[str, ...],
    archs: tuple[str, ...],
    dtypes: tuple[str, ...],
    kv_formats: tuple[str, ...],
    head_dims_qk: tuple[str, ...],
    head_dims_v: tuple[str, ...],
    page_block_sizes: tuple[str, ...],
    jobs: int,
    out_dir: Path | None,
    wheel: bool,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Build modules; no GPU is needed. What is there and up to date is not built again.

    A failure does not stop the others; the exit status is then 1 and the compiler's message is printed.

    \b
    Examples:
      tilemla build --preset deepseek-v3                        into the cache, where decode calls find them
      tilemla build --preset deepseek-v3.2 --arch cpu           sparse decode and prefill
      tilemla build --arch sm_90a --dtype bfloat16 --out-dir m  into m/, for TILEMLA_MODULE_PATH
      tilemla build --arch sm_90a --head-dim-qk 576 --page-block-size 16 --page-block-size 32
      tilemla build --preset deepseek-v3 --arch sm_90a --wheel --out-dir dist
      tilemla build --kernel mla_decode --kernel read_pages --arch sm_90a --out-dir m   for a benchmark elsewhere
      tilemla build --dry-run --json
    """  # noqa: D301
    specs = select_specs(
        kernels=kernels,
        presets=presets,
        archs=archs,
        dtypes=dtypes,
        kv_formats=kv_formats,
        head_dims_qk=[int(value) for value in head_dims_qk],
        head_dims_v=[int(value) for value in head_dims_v],
        page_block_sizes=[int(value) for value in page_block_sizes],
    )
    if not specs:
        raise click.UsageError("no module fits all of these options; leave one out, or see `tilemla build --dry-run`")
    stores = _stores_for(specs, None if wheel else out_dir)
    if dry_run:
        _print_plan(specs, stores, force=force, as_json=as_json)
        return
    outcomes = _build_all(specs, stores, jobs, force=force)
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    wheels: list[Path] = []
    if wheel and not failed:
        wheels = _write_wheels([outcome.entry for outcome in outcomes if outcome.entry], out_dir or Path.cwd())
    if as_json:
        click.echo(json.dumps(_as_json(outcomes, wheels), indent=2))
    else:
        _print_result(outcomes, wheels)
    if failed:
        for outcome in failed:
            click.echo(f"\n{outcome.error}", err=True)
        click.echo(
            f"\n{len(failed)} of {len(specs)} modules failed" + (": no wheel was made" if wheel else ""), err=True
        )
        sys.exit(1)


def _stores_for(specs: list[KernelSpec], out_dir: Path | None) -> dict[str, Path]:
    """The store for each architecture."""
    from tilemla import env
    from tilemla.errors import ModuleNotBuiltError, ToolchainError
    from tilemla.store import cache_store, check_private

    archs = {spec.arch for spec in specs}
    if out_dir is not None:
        return dict.fromkeys(archs, out_dir.absolute())
    try:
        check_private(env.cache_dir())
        return {arch: cache_store(arch) for arch in archs}
    except (ToolchainError, ModuleNotBuiltError) as error:
        raise click.ClickException(str(error)) from error


def _is_there(spec: KernelSpec, store: Path) -> bool:
    from tilemla.generate import is_current
    from tilemla.manifest import ManifestError
    from tilemla.store import read_entry
    from tilemla.tuning.chosen import select_config

    try:
        entry = read_entry(spec, store)
    except ManifestError:
        return False
    return entry is not None and is_current(entry, select_config(spec))


def _print_plan(specs: list[KernelSpec], stores: dict[str, Path], *, force: bool, as_json: bool) -> None:
    plan = [
        dict(
            name=spec.name,
            spec=spec.to_dict(),
            state="would be built" if force or not _is_there(spec, stores[spec.arch]) else "up to date",
            directory=str(stores[spec.arch] / spec.name),
        )
        for spec in specs
    ]
    if as_json:
        click.echo(json.dumps(dict(modules=plan), indent=2))
    else:
        for row in plan:
            click.echo(f"{row['name']}: {row['state']} in {row['directory']}")


def _build_all(
    specs: list[KernelSpec], stores: dict[str, Path], jobs: int, *, force: bool
) -> list[Outcome[KernelSpec]]:
    from tilemla.generate import generate_module, run_side_by_side
    from tilemla.progress import show_progress

    with show_progress() as progress:

        def make(spec: KernelSpec) -> tuple[Entry, bool]:
            return generate_module(spec, stores[spec.arch], lambda step: progress.step(spec.name, step), force=force)

        def tell(outcome: Outcome[KernelSpec]) -> None:
            text = {"built": f"built in {outcome.seconds:.1f} s", "present": "up to date", "failed": "failed"}
            progress.done(outcome.item.name, text[outcome.state], failed=outcome.state == "failed")

        return run_side_by_side(specs, make, jobs=jobs, on_done=tell)


def _write_wheels(entries: list[Entry], out_dir: Path) -> list[Path]:
    from tilemla.wheel import write_wheel

    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        archs = dict.fromkeys(entry.manifest.spec["arch"] for entry in entries)
        return [
            write_wheel([entry for entry in entries if entry.manifest.spec["arch"] == arch], out_dir) for arch in archs
        ]
    except ImportError as error:
        raise click.ClickException(f"a wheel cannot be made: {error}; pip install 'tilemla[codegen]'") from error
    except (OSError, ValueError) as error:
        raise click.ClickException(f"the wheel cannot be made: {error}") from error


def _as_json(outcomes: list[Outcome[KernelSpec]], wheels: list[Path]) -> dict[str, Any]:
    modules = [
        dict(
            name=outcome.item.name,
            spec=outcome.item.to_dict(),
            state=outcome.state,
            seconds=round(outcome.seconds, 3),
            library=str(outcome.entry.library) if outcome.entry else None,
            library_bytes=outcome.entry.library.stat().st_size if outcome.entry else None,
            sha256=outcome.entry.manifest.sha256 if outcome.entry else None,
            error=outcome.error,
        )
        for outcome in outcomes
    ]
    return dict(modules=modules, wheels=[str(path) for path in wheels])


def _print_result(outcomes: list[Outcome[KernelSpec]], wheels: list[Path]) -> None:
    from rich.table import Table

    from tilemla.cli.output import make_console

    table = Table("module", "state", box=None, pad_edge=False)
    for title in ("seconds", "library bytes", "registers", "spilled bytes", "shared memory bytes"):
        table.add_column(title, justify="right")
    for outcome in outcomes:
        entry = outcome.entry
        kernels = entry.manifest.kernels if entry else ()
        heaviest = max(kernels, key=lambda kernel: kernel.smem_bytes, default=None)
        spills = sum(kernel.spill_store_bytes + kernel.spill_load_bytes for kernel in kernels)
        table.add_row(
            outcome.item.name,
            outcome.state,
            f"{outcome.seconds:.1f}",
            f"{entry.library.stat().st_size:,}" if entry else "-",
            str(heaviest.registers) if heaviest else "-",
            str(spills) if heaviest else "-",
            f"{heaviest.smem_bytes:,}" if heaviest else "-",
        )
    make_console().print(table)
    for store in dict.fromkeys(str(outcome.entry.directory.parent) for outcome in outcomes if outcome.entry):
        click.echo(f"in {store}")
    for path in wheels:
        click.echo(f"{path} ({path.stat().st_size:,} bytes): pip install {path.name} beside tilemla")
