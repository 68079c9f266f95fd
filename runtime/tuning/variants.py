"""Modules of one kernel in several configurations: each in a store of its own, built side by side or found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tilemla.config import KernelConfig
from tilemla.errors import ModuleNotBuiltError
from tilemla.fingerprint import source_fingerprint
from tilemla.generate import Outcome, generate_module, run_side_by_side
from tilemla.manifest import ManifestError
from tilemla.progress import show_progress
from tilemla.spec import KernelSpec
from tilemla.store import Entry, cache_store, read_entry


class Variant(NamedTuple):
    """A module: what it is specialised on, and what it is tuned by."""

    spec: KernelSpec
    config: KernelConfig

    @property
    def name(self) -> str:
        """A readable name, unique among variants."""
        return f"{self.spec.name}, {self.config.name}"


def variant_store(folder: Path | None, variant: Variant) -> Path:
    """The store of the modules of one configuration: in a folder of such stores, or beside the cache's own store.

    Raises
    ------
    ToolchainError
        When there is no folder, and nothing can be generated here, so that there is no such store in the cache.
    """
    if folder is not None:
        return folder / variant.config.name
    store = cache_store(variant.spec.arch)
    return store.with_name(f"{store.name}+{variant.config.name}")


def _failure_path(folder: Path | None, variant: Variant) -> Path:
    """Where it is kept why a variant could not be built, for whoever measures elsewhere."""
    return variant_store(folder, variant) / f"{variant.spec.name}.failed"


def build_variants(variants: Sequence[Variant], folder: Path | None, jobs: int) -> list[Outcome[Variant]]:
    """Build variants side by side, with progress on stderr, going on past a failure; those that are current are kept.

    Parameters
    ----------
    variants : sequence of Variant
        What to build.
    folder : Path, optional
        Gets a store for each configuration; None takes the cache.
    jobs : int
        How many at once; 0 takes as many as this process may use cores.
    """
    with show_progress() as progress:

        def make(variant: Variant) -> tuple[Entry, bool]:
            store = variant_store(folder, variant)
            return generate_module(
                variant.spec, store, lambda step: progress.step(variant.name, step), config=variant.config
            )

        def tell(outcome: Outcome[Variant]) -> None:
            failure = _failure_path(folder, outcome.item)
            if outcome.error is None:
                failure.unlink(missing_ok=True)
            elif failure.parent.is_dir():
                failure.write_text(outcome.error)
            text = {"built": f"built in {outcome.seconds:.1f} s", "present": "up to date", "failed": "failed"}
            progress.done(outcome.item.name, text[outcome.state], failed=outcome.state == "failed")

        return run_side_by_side(variants, make, jobs=jobs, on_done=tell)


class FoundVariants(NamedTuple):
    """Variants that were built, and why others were not."""

    entries: dict[Variant, Entry]
    failures: dict[Variant, str]


def find_variants(variants: Iterable[Variant], folder: Path | None) -> FoundVariants:
    """Look for variants that were built, here or on another machine.

    Raises
    ------
    ModuleNotBuiltError
        When one is damaged, or was made from other sources than those that are installed here.
    """
    entries: dict[Variant, Entry] = {}
    failures: dict[Variant, str] = {}
    for variant in variants:
        store = variant_store(folder, variant)
        try:
            entry = read_entry(variant.spec, store)
        except ManifestError as error:
            raise ModuleNotBuiltError(f"{error}; build it anew with `tilemla tune --build-only`") from error
        if entry is not None:
            _require_made_here(entry, variant)
            entries[variant] = entry
        elif _failure_path(folder, variant).is_file():
            failures[variant] = _failure_path(folder, variant).read_text()
        else:
            failures[variant] = f"not built: there is none in {store}"
    return FoundVariants(entries, failures)


def _require_made_here(entry: Entry, variant: Variant) -> None:
    manifest = entry.manifest
    if manifest.config != variant.config.to_dict():
        raise ModuleNotBuiltError(
            f"{entry.directory}: expected a module of {variant.config.to_dict()}, got one of {manifest.config}"
        )
    if manifest.fingerprint != source_fingerprint():
        raise ModuleNotBuiltError(
            f"{entry.directory}: made from other sources ({manifest.fingerprint}) than are installed here "
            f"({source_fingerprint()}); build it anew with `tilemla tune --build-only`"
        )
