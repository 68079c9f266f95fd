"""Command line: build modules ahead of time, list what can be built, look into what was built."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import click
from tqdm import tqdm

from tilemla.codegen.errors import BuildError
from tilemla.manifest import Manifest, ManifestError, manifest_path, read_manifest, verify_library
from tilemla.source_key import source_key
from tilemla.spec import ARCHS, DTYPES, KernelSpec, iter_specs

_OUTPUT_TAIL_LINES = 40


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Generate MLA decode modules from tile programs and look into them."""


@main.command()
@click.option(
    "--arch",
    "archs",
    multiple=True,
    type=click.Choice(ARCHS),
    help="Architecture; may be given repeatedly. Default: all.",
)
@click.option(
    "--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES), help="Dtype; may be given repeatedly. Default: all."
)
@click.option(
    "--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Directory for the modules."
)
@click.option(
    "--jobs", default=0, type=click.IntRange(min=0), help="Modules built side by side. Default: the number of CPUs."
)
@click.option("--force", is_flag=True, help="Also build modules that are there and up to date.")
def build(archs: tuple[str, ...], dtypes: tuple[str, ...], out: Path, jobs: int, force: bool) -> None:
    """Build modules into a directory; no GPU is needed."""
    specs = select_specs(archs, dtypes)
    wanted = [spec for spec in specs if force or not is_current(spec, out)]
    try:
        if len(wanted) == 1:
            _build_here(wanted[0], out)
        elif wanted:
            _build_in_children(wanted, out, jobs or os.cpu_count() or 1)
        manifests = [read_manifest(manifest_path(out, spec.name)) for spec in specs]
    except (BuildError, ManifestError) as error:
        raise click.ClickException(str(error)) from error
    for spec in specs:
        if spec not in wanted:
            click.echo(f"{spec.name}: up to date", err=True)
    click.echo(format_table(manifests))


@main.command("list")
@click.option("--arch", type=click.Choice(ARCHS), help="Only this architecture.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Only this dtype.")
def list_specs(arch: str | None, dtype: str | None) -> None:
    """List the modules that can be built."""
    for spec in iter_specs(arch, dtype):
        click.echo(spec.name)


@main.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def inspect(file: Path) -> None:
    """Print the manifest of a module (its .json or its .so) and check the library's hash."""
    path = file if file.suffix == ".json" else file.with_suffix(".json")
    try:
        manifest = read_manifest(path)
        click.echo(manifest.to_json(), nl=False)
        library = verify_library(manifest, path.parent)
    except ManifestError as error:
        raise click.ClickException(str(error)) from error
    click.echo(format_table([manifest]))
    click.echo(f"{library.name}: sha256 matches, {library.stat().st_size} bytes")
    if manifest.source_key != source_key():
        click.echo(f"built from other sources: source key {manifest.source_key}, here {source_key()}")


def select_specs(archs: Sequence[str], dtypes: Sequence[str]) -> list[KernelSpec]:
    """The supported specs of these architectures and dtypes; an empty choice takes all."""
    return [spec for spec in iter_specs() if spec.arch in (archs or ARCHS) and spec.dtype in (dtypes or DTYPES)]


def is_current(spec: KernelSpec, directory: Path) -> bool:
    """Whether a sound module of this spec, built from the sources that are installed, is in the directory."""
    try:
        manifest = read_manifest(manifest_path(directory, spec.name))
        verify_library(manifest, directory)
    except ManifestError:
        return False
    return manifest.spec == spec.to_dict() and manifest.source_key == source_key()


def format_table(manifests: Iterable[Manifest]) -> str:
    """A table of kernels with registers, spills and shared memory."""
    rows = [("module", "kernel", "registers", "spill bytes", "smem bytes")]
    for manifest in manifests:
        for kernel in manifest.kernels:
            spills = kernel.spill_store_bytes + kernel.spill_load_bytes
            rows.append((manifest.name, kernel.name, str(kernel.registers), str(spills), str(kernel.smem_bytes)))
        if not manifest.kernels:
            rows.append((manifest.name, ", ".join(manifest.programs), "-", "-", "-"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _build_here(spec: KernelSpec, out: Path) -> None:
    from tilemla.codegen.build import build_module

    with tqdm(desc=spec.name, bar_format="{desc} [{elapsed}]", file=sys.stderr, disable=None) as bar:

        def progress(step: str) -> None:
            if bar.disable:
                click.echo(f"{spec.name}: {step}", err=True)
            bar.set_description_str(f"{spec.name}: {step}")

        build_module(spec, out, progress)
        progress("done")


def _build_in_children(specs: Sequence[KernelSpec], out: Path, jobs: int) -> None:
    """One process per module: compilers run side by side, and a crash of one leaves the others alone."""
    failures: list[str] = []
    with (
        ThreadPoolExecutor(max_workers=min(jobs, len(specs))) as pool,
        tqdm(total=len(specs), unit="module", file=sys.stderr, disable=None) as bar,
    ):
        say: Callable[[str], None] = (lambda text: click.echo(text, err=True)) if bar.disable else bar.write
        running = {pool.submit(_run_child, spec, out): spec for spec in specs}
        for done in as_completed(running):
            name = running[done].name
            seconds, problem = done.result()
            say(f"{name}: {'failed' if problem else 'built'} in {seconds:.1f} s")
            if problem:
                failures.append(f"{name}:\n{problem}")
            bar.update()
    if failures:
        raise BuildError(f"{len(failures)} of {len(specs)} modules failed\n" + "\n".join(failures))


def _run_child(spec: KernelSpec, out: Path) -> tuple[float, str | None]:
    """Build one module in a child process; the time it took, and the tail of its output when it failed."""
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tilemla.codegen", "build", "--force", "--arch", spec.arch, "--dtype", spec.dtype]
    began = time.perf_counter()
    done = subprocess.run(
        [*command, "--out", str(out.absolute())],
        cwd=out,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    tail = "\n".join(done.stdout.strip().splitlines()[-_OUTPUT_TAIL_LINES:])
    return time.perf_counter() - began, None if done.returncode == 0 else tail or f"exit status {done.returncode}"
