"""``tilemla doctor``: what this machine can do, and how to mend what it cannot."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import click

from tilemla.cli import probes
from tilemla.cli.output import make_console
from tilemla.cli.probes import Finding, State
from tilemla.host import Gpu
from tilemla.select import arch_of
from tilemla.spec import ARCHS, DTYPES, PRESETS, TESTED_ARCHS, select_specs

_STATES: tuple[State, ...] = ("ok", "note", "problem")
_STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}


@dataclasses.dataclass(frozen=True)
class Section:
    """Findings about one part of the machine."""

    title: str
    findings: tuple[Finding, ...]

    @property
    def state(self) -> State:
        """The worst of the findings' states."""
        return max((finding.state for finding in self.findings), key=_STATES.index, default="ok")


def _section(title: str, probe: Callable[[], Iterable[Finding]]) -> Section:
    """Run a probe; whatever it stumbles over is a finding too, since finding that out is what the command is for."""
    findings: list[Finding] = []
    try:
        findings.extend(probe())
    except Exception as error:
        findings.append(Finding("error", "problem", f"{type(error).__name__}: {error}"))
    return Section(title, tuple(findings))


@click.command()
@click.option(
    "--preset", default="deepseek-v3", show_default=True, type=click.Choice(list(PRESETS)), help="The model to serve."
)
@click.option(
    "--arch", "archs", multiple=True, type=click.Choice(ARCHS), help="Judge by this architecture; repeatable."
)
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES), help="Only this dtype; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON on stdout.")
def doctor(preset: str, archs: tuple[str, ...], dtypes: tuple[str, ...], as_json: bool) -> None:
    """Tell what this machine can do, and how to mend what it cannot.

    Nothing is built, and CUDA is only used in a process that ends. The exit status is 0 when the preset can be served
    here and 1 when not: by the GPUs, or by the CPU where there is no GPU that there are kernels for.

    \b
    Examples:
      tilemla doctor
      tilemla doctor --dtype bfloat16          where only bf16 modules are shipped
      tilemla doctor --json | jq '.sections[] | select(.state == "problem")'
    """  # noqa: D301 (the backspace is click's mark of a paragraph that is not wrapped)
    sections = examine(preset, archs, dtypes)
    served = all(section.state != "problem" for section in sections)
    if as_json:
        fields: dict[str, Any] = {"preset": preset, "served": served, "sections": []}
        for section in sections:
            findings = [dataclasses.asdict(finding) for finding in section.findings]
            fields["sections"].append({"title": section.title, "state": section.state, "findings": findings})
        click.echo(json.dumps(fields, indent=2))
    else:
        _print_sections(sections)
        click.echo(f"\n{preset} {'can' if served else 'cannot'} be served here.")
    sys.exit(0 if served else 1)


def examine(preset: str, archs: Sequence[str] = (), dtypes: Sequence[str] = ()) -> list[Section]:
    """Examine this machine.

    Parameters
    ----------
    preset : str
        Key of ``tilemla.spec.PRESETS``.
    archs : sequence of str
        Architectures whose modules must be there; none takes those of the GPUs, or the CPU.
    dtypes : sequence of str
        Keep only the modules of these dtypes.

    Returns
    -------
    list of Section
        In the order in which to read them. The preset can be served when none is a problem.
    """
    gpus: list[Gpu] = []
    hardware = _section("GPUs and driver", functools.partial(probes.probe_gpus, gpus))
    gpu_archs = {arch for gpu in gpus if (arch := arch_of("cuda", gpu.capability))}
    specs = select_specs(presets=(preset,), archs=archs or {*TESTED_ARCHS, *gpu_archs}, dtypes=dtypes)
    needed = set(archs) or gpu_archs or {"cpu"}
    options = f"--preset {preset} --arch {{arch}}" + "".join(f" --dtype {dtype}" for dtype in dtypes)
    return [
        _section("Python and packages", functools.partial(probes.probe_packages, needs_gpu=needed != {"cpu"})),
        hardware,
        _section("Compilers, to generate modules", probes.probe_compilers),
        _section("C and C++ libraries", probes.probe_libraries),
        _section("Cache", probes.probe_cache),
        _section("Environment", probes.probe_environment),
        _section(f"Modules of {preset}", functools.partial(probes.probe_modules, specs, needed, gpu_archs, options)),
    ]


def _print_sections(sections: Sequence[Section]) -> None:
    from rich.text import Text

    console = make_console()
    for section in sections:
        console.print(Text.assemble("\n", (section.title, "bold"), ": ", (section.state, _STYLES[section.state])))
        width = max((len(finding.topic) for finding in section.findings), default=0)
        mends = [finding.mend for finding in section.findings]
        for finding, next_mend in zip(section.findings, [*mends[1:], ""], strict=True):
            state = (f"{finding.state:8}", _STYLES[finding.state])
            # Not wrapped: commands and paths are there to be copied.
            console.print(Text.assemble("  ", state, f"{finding.topic:{width}}  {finding.text}"), soft_wrap=True)
            for line in finding.mend.splitlines() if finding.mend != next_mend else ():
                console.print(Text.assemble("          mend: ", (line, "bold")), soft_wrap=True)
