"""``tilemla inspect``: what is inside a module."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from tilemla.manifest import Manifest, ManifestError, manifest_path, read_manifest, verify_library
from tilemla.spec import ARCHS, BENCHMARK_SPECS, SUPPORTED_SPECS

if TYPE_CHECKING:
    from rich.table import Table

_PROGRAMS = list(dict.fromkeys(program for spec in SUPPORTED_SPECS + BENCHMARK_SPECS for program in spec.programs))


class _Kind(NamedTuple):
    """A kind of text that a module keeps for each of its programs, or that is made of what it keeps."""

    what: str
    role: str  # of the file, in the manifest
    comment: str  # begins a comment in the text
    lexer: str


_KINDS = {
    "tir": _Kind("tile program", "tir", "#", "python"),
    "cuda": _Kind("source", "source", "//", "cuda"),
    "ptx": _Kind("PTX", "ptx", "//", "ptx"),
    "sass": _Kind("machine code", "cubin", "//", "text"),
}


@click.command()
@click.argument("module")
@click.option("--tir", is_flag=True, help="Print the tile programs.")
@click.option("--cuda", "--source", is_flag=True, help="Print the source: CUDA C++, or C++ of a CPU module.")
@click.option("--ptx", is_flag=True, help="Print the PTX.")
@click.option("--sass", is_flag=True, help="Print the machine code; needs nvdisasm or cuobjdump.")
@click.option("--resources", is_flag=True, help="Print registers, shared memory, spills and occupancy of each kernel.")
@click.option("--program", type=click.Choice(_PROGRAMS), help="Only this program. Default: all.")
@click.option("--json", "as_json", is_flag=True, help="Print manifest, state and occupancy as JSON.")
def inspect(
    module: str, tir: bool, cuda: bool, ptx: bool, sass: bool, resources: bool, program: str | None, as_json: bool
) -> None:
    """Look into a built module, after its hash has been checked.

    MODULE is the path of its .so, its .json or its folder, or the name of a spec, which is looked for where decode
    calls look and in the whole cache. Without options: what it is, what built it, what it needs. Sources are printed
    as they are, so that they can be piped.

    \b
    Examples:
      tilemla inspect mla_decode_cpu_bf16_dense_d576_v512_p64_m16
      tilemla inspect modules/mla_decode_sm_90a_bf16_dense_d576_v512_p64_m64 --resources
      tilemla inspect modules/mla_decode_sm_90a_bf16_dense_d576_v512_p64_m64 --sass --program mla_decode | less
    """  # noqa: D301  # click knows \\b by the character
    wanted = [name for name, chosen in (("tir", tir), ("cuda", cuda), ("ptx", ptx), ("sass", sass)) if chosen]
    if as_json and (wanted or resources):
        raise click.UsageError("--json prints everything but the sources: leave the other options out")
    path = _find_manifest(module)
    manifest = _read(path)
    damage = _damage_of(manifest, path.parent)
    programs = [name for name in manifest.programs if program in (None, name)]
    if as_json:
        click.echo(json.dumps(_as_json(manifest, path, damage, programs), indent=2))
    if damage is not None:
        raise click.ClickException(f"damaged module: {damage}; build or install it anew")
    if wanted:
        _print_texts(_read_texts(manifest, path.parent, wanted, programs))
    if resources:
        _print_resources(manifest, programs)
    if not (wanted or resources or as_json):
        _print_summary(manifest, path, programs)


def _find_manifest(module: str) -> Path:
    path = Path(module)
    if path.is_dir():
        return _manifest_in(path)
    if path.suffix in (".so", ".json") and (path.is_file() or path.with_suffix(".json").is_file()):
        return path.with_suffix(".json")
    if path.exists():
        raise click.UsageError(f"{path} is neither a module's .so, .json nor folder")
    return _search(module)


def _manifest_in(folder: Path) -> Path:
    own = manifest_path(folder, folder.resolve().name)
    if own.is_file():
        return own
    inside = sorted(folder.glob("*.json"))
    if len(inside) == 1:  # a copy under another name, or an entry that was set aside
        return inside[0]
    entries = sorted(path.name for path in folder.iterdir() if manifest_path(path, path.name).is_file())
    if len(entries) == 1:
        return manifest_path(folder / entries[0], entries[0])
    if entries:
        raise click.UsageError(f"{folder} holds several modules, name one of them: {', '.join(entries)}")
    raise click.ClickException(f"{folder} holds no module: there is no {own.name}")


def _search(name: str) -> Path:
    from tilemla.store import entry_dir, iter_cache_stores, search_path

    spec = next((spec for spec in SUPPORTED_SPECS + BENCHMARK_SPECS if spec.name == name), None)
    if spec is None:
        names = "".join(f"\n  {spec.name}" for spec in SUPPORTED_SPECS + BENCHMARK_SPECS)
        raise click.UsageError(f"there is no file, folder or spec {name!r}; specs are:{names}")
    stores = dict.fromkeys([*(place.store for place in search_path(spec.arch)), *iter_cache_stores()])
    for store in stores:
        if entry_dir(store, name).is_dir():
            return manifest_path(entry_dir(store, name), name)
    looked = "".join(f"\n  {store}" for store in stores)
    raise click.ClickException(
        f"{name} is not built: `tilemla build {spec.build_options}` builds it; looked in:{looked}"
    )


def _read(path: Path) -> Manifest:
    try:
        manifest = read_manifest(path)
    except ManifestError as error:
        raise click.ClickException(f"damaged module: {error}") from error
    if manifest.spec.get("arch") not in ARCHS:
        raise click.ClickException(
            f"damaged module: {path}: expected a spec for one of {', '.join(ARCHS)}, got {manifest.spec}"
        )
    return manifest


def _damage_of(manifest: Manifest, folder: Path) -> str | None:
    try:
        verify_library(manifest, folder)
    except ManifestError as error:
        return str(error)
    return None


def _read_texts(
    manifest: Manifest, folder: Path, wanted: Sequence[str], programs: Sequence[str]
) -> list[tuple[str, str, _Kind]]:
    """(program, text, kind) of everything that was asked for; all is read before anything is printed."""
    for name in wanted:
        if manifest.spec["arch"] == "cpu" and name in ("ptx", "sass"):
            raise click.ClickException(
                f"{manifest.name} is for the CPU and has no {_KINDS[name].what}; its source is C++, see --source"
            )
    return [_read_text(manifest, folder, program, _KINDS[name]) for name in wanted for program in programs]


def _read_text(manifest: Manifest, folder: Path, program: str, kind: _Kind) -> tuple[str, str, _Kind]:
    from tilemla.disassembler import disassemble
    from tilemla.errors import ToolchainError

    name = manifest.files.get(f"{program}.{kind.role}", "")
    if not name or Path(name).name != name:
        raise click.ClickException(f"{manifest.name} keeps no {kind.what} of {program}: its manifest names {name!r}")
    path = folder / name
    if not path.is_file():
        raise click.ClickException(
            f"{path} is missing: this copy of the module was made without its sources; look into the one it was made of"
        )
    try:
        text = disassemble(path) if kind.role == "cubin" else path.read_text(encoding="utf-8")
    except (ToolchainError, OSError, UnicodeDecodeError) as error:
        raise click.ClickException(str(error)) from error
    return program, text, kind


def _print_texts(texts: Sequence[tuple[str, str, _Kind]]) -> None:
    for program, text, kind in texts:
        if len(texts) > 1:
            click.echo(f"{kind.comment} ---- {program}: {kind.what} ----")
        if sys.stdout.isatty():
            _print_highlighted(text, kind.lexer)
        else:
            click.echo(text, nl=not text.endswith("\n"))


def _print_highlighted(text: str, lexer: str) -> None:
    from rich.console import Console
    from rich.syntax import Syntax

    # This theme leaves the terminal its own colours for background and plain words.
    Console().print(Syntax("", lexer, theme="ansi_dark").highlight(text.rstrip("\n")), soft_wrap=True)


def _print_table(table: Table) -> None:
    from rich.console import Console

    # A pipe or a file has no width: nothing is to be cut to one.
    Console(width=None if sys.stdout.isatty() else 1000).print(table)


def _print_resources(manifest: Manifest, programs: Sequence[str]) -> None:
    """One column for each kernel: names are long, kernels few."""
    from rich.table import Table

    if not manifest.kernels:
        raise click.ClickException(f"{manifest.name} is for the CPU and has no kernels of a GPU to report on")
    columns = list(_resource_columns(manifest, programs))
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    for _ in columns:
        table.add_column(justify="right", overflow="fold")
    for row in zip(*columns, strict=True):
        table.add_row(row[0][0], *(value for _, value in row))
    _print_table(table)


def _resource_columns(manifest: Manifest, programs: Sequence[str]) -> Iterator[list[tuple[str, str]]]:
    from tilemla.occupancy import occupancy_of

    for kernel in manifest.kernels:
        if kernel.program in programs:
            fits = occupancy_of(kernel, manifest.spec["arch"])
            yield [
                ("kernel", kernel.name),
                ("program", kernel.program),
                ("threads per CTA", f"{kernel.threads}"),
                ("registers per thread", f"{kernel.registers}"),
                ("static smem bytes", f"{kernel.smem_static_bytes:,}"),
                ("dynamic smem bytes", f"{kernel.smem_dynamic_bytes:,}"),
                ("spill store bytes", f"{kernel.spill_store_bytes}"),
                ("spill load bytes", f"{kernel.spill_load_bytes}"),
                ("stack bytes", f"{kernel.stack_bytes}"),
                ("CTAs per SM", f"{fits.ctas_per_sm}"),
                ("warps per SM", f"{fits.warps_per_sm} of {fits.max_warps_per_sm}"),
                ("limited by", ", ".join(fits.limited_by)),
            ]


def _print_summary(manifest: Manifest, path: Path, programs: Sequence[str]) -> None:
    from rich.table import Table

    requires = manifest.requires
    needs = [("glibc", requires.glibc), ("GLIBCXX", requires.libstdcxx), ("a driver for CUDA", requires.driver)]
    library = path.with_name(manifest.library)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("module", manifest.name)
    table.add_row("spec", ", ".join(f"{field} {value}" for field, value in manifest.spec.items()))
    table.add_row("library", str(library))
    table.add_row("size", f"{library.stat().st_size:,} bytes")
    table.add_row("sha256", f"{manifest.sha256}, matches")
    table.add_row("exports", ", ".join(manifest.programs))
    table.add_row("needs", ", ".join(f"{what} {version}" for what, version in needs if version) or "nothing")
    table.add_row("built by", f"tilemla {manifest.tilemla_version}, sources {manifest.fingerprint}")
    table.add_row("with", ", ".join(f"{tool} {version}" for tool, version in manifest.tools.items()))
    table.add_row("keeps", ", ".join(sorted(manifest.files.values())))
    _print_table(table)
    if manifest.kernels:
        click.echo()
        _print_resources(manifest, programs)


def _as_json(manifest: Manifest, path: Path, damage: str | None, programs: Sequence[str]) -> dict[str, Any]:
    from tilemla.occupancy import occupancy_of

    library = path.with_name(manifest.library)
    occupancy = {
        kernel.name: dataclasses.asdict(occupancy_of(kernel, manifest.spec["arch"]))
        for kernel in manifest.kernels
        if kernel.program in programs
    }
    return dict(
        directory=str(path.parent.absolute()),
        library_bytes=library.stat().st_size if library.is_file() else None,
        sha256_matches=damage is None,
        damage=damage,
        manifest=json.loads(manifest.to_json()),
        occupancy=occupancy,
    )
