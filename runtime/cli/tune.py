"""``tilemla tune``: try configurations out, keep every trial, and choose what is best."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from tilemla.bench.cases import CASE_LISTS, HEAD_DIM_QK, HEAD_DIM_V, PAGE_BLOCK_SIZE, GridCase, select_cases
from tilemla.cli.options import spec_options
from tilemla.cli.output import make_console
from tilemla.costs import ScheduleCosts
from tilemla.spec import KernelSpec, select_specs
from tilemla.tuning.candidates import list_configs, list_costs, parse_parameters
from tilemla.tuning.table import Evidence, Table, log_path, table_path, write_table
from tilemla.tuning.variants import Variant, build_variants, find_variants

if TYPE_CHECKING:
    import torch

    from tilemla.tuning.trial import Trial

_DEFAULT_SHAPES = {"cpu": "cpu"}  # elsewhere "tune"


class _Plan(NamedTuple):
    """What a run tries, for one kernel."""

    spec: KernelSpec
    variants: list[Variant]
    costs: list[ScheduleCosts]
    cases: list[tuple[str, GridCase]]


@click.command("tune")
@spec_options("this machine's")
@click.option(
    "--shapes", "shapes", multiple=True, type=click.Choice(list(CASE_LISTS)), help="A list of cases; repeatable."
)
@click.option("--match", default="", metavar="TEXT", help="Only cases whose name contains TEXT, such as 'h128k1 s1'.")
@click.option(
    "--param",
    "parameters",
    multiple=True,
    metavar="NAME=V1,V2",
    help="Values to try of a field, those of several fields with each other; repeatable. Nothing else is then varied. "
    "Default: what --dry-run lists.",
)
@click.option(
    "--modules",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where modules are kept, in a folder for each configuration. Default: the cache.",
)
@click.option("--jobs", "-j", default=0, type=click.IntRange(min=0), help="Modules built at once. Default: the cores.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Timings of each configuration.")
@click.option("--rep-ms", type=click.IntRange(1), default=20, show_default=True, help="Milliseconds of one timing.")
@click.option(
    "--out-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("tuning_logs"),
    show_default=True,
    help="Where logs and tables are kept.",
)
@click.option("--build-only", is_flag=True, help="Build into --modules, for a run elsewhere.")
@click.option("--choose-only", is_flag=True, help="Try nothing: choose anew from the logs in --out-dir.")
@click.option("--dry-run", is_flag=True, help="List configurations, costs and shapes, and do nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan, or the tables, as JSON on stdout.")
def tune(
    archs: tuple[str, ...],
    dtypes: tuple[str, ...],
    kv_formats: tuple[str, ...],
    head_dims_qk: tuple[str, ...],
    head_dims_v: tuple[str, ...],
    page_block_sizes: tuple[str, ...],
    shapes: tuple[str, ...],
    match: str,
    parameters: tuple[str, ...],
    modules: Path | None,
    jobs: int,
    rounds: int,
    rep_ms: int,
    out_dir: Path,
    build_only: bool,
    choose_only: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Find the fastest configuration of a kernel on this machine's GPU.

    A module is built for each configuration, and all are timed in turn; then, with the best one, the schedules that
    different costs lead to. Every trial, failed builds among them, is added to <out-dir>/<kernel>/<gpu>.jsonl. What is
    faster than the default by more than noise goes into the table <gpu>.json beside it. With
    TILEMLA_TUNING_DIR=<out-dir> modules are built and calls are scheduled by that table.

    A field that no option narrows is that of the first kernel: bfloat16, pages of 64 tokens, for this machine.

    \b
    Examples:
      tilemla tune --dry-run
      tilemla tune --shapes small --param short_piece=8,16,32
      tilemla tune --param overhead=1,2,3 --match "h16k1 s1"      schedules alone
      tilemla tune --arch sm_90a --build-only --modules m         where the compilers are; needs no GPU
      TILEMLA_BUILD=never tilemla tune --modules m                where the GPU is; needs no compiler
      tilemla tune --choose-only
    """  # noqa: D301 (the backspace is click's mark of a paragraph that is not wrapped)
    if build_only and modules is None:
        raise click.UsageError("--build-only needs --modules, where a run elsewhere finds what was built")
    modes = [name for name, given in _named(build_only, choose_only, dry_run) if given]
    if len(modes) > 1:
        raise click.UsageError(f"{' and '.join(modes)} exclude each other")
    first = KernelSpec()
    specs = select_specs(
        kernels=(first.kernel,),
        archs=archs or (_arch_here(),),
        dtypes=dtypes or (first.dtype,),
        kv_formats=kv_formats or (first.kv_format,),
        head_dims_qk=[int(value) for value in head_dims_qk or (first.head_dim_qk,)],
        head_dims_v=[int(value) for value in head_dims_v or (first.head_dim_v,)],
        page_block_sizes=[int(value) for value in page_block_sizes or (first.page_block_size,)],
    )
    if not specs:
        raise click.UsageError("no kernel fits all of these options; leave one out")
    if choose_only:
        tables = _choose_from_logs(specs, out_dir)
    else:
        plans = [_make_plan(spec, shapes, match, parameters) for spec in specs]
        if dry_run:
            _print_plans(plans, as_json=as_json)
            return
        devices = {} if build_only else {plan.spec: _device_for(plan.spec) for plan in plans}
        if not build_only:
            _make_folder(out_dir)
        folder = None if modules is None else modules.absolute()
        if folder is None:
            _check_cache()
        _build(plans, folder, jobs, must_build=build_only)
        if build_only:
            return
        tables = [
            _tune(plan, folder, devices[plan.spec], rounds=rounds, rep_ms=rep_ms, out_dir=out_dir) for plan in plans
        ]
    _show(tables, out_dir, as_json=as_json)


def _named(build_only: bool, choose_only: bool, dry_run: bool) -> Iterable[tuple[str, bool]]:
    return (("--build-only", build_only), ("--choose-only", choose_only), ("--dry-run", dry_run))


def _arch_here() -> str:
    """The architecture of this machine's first GPU that there are kernels for, else the CPU."""
    from tilemla.host import DriverError
    from tilemla.preloading import usable_archs

    try:
        return usable_archs()[0]
    except DriverError as error:
        raise click.ClickException(f"{error}; say with --arch what is to be tuned") from error


def _make_plan(spec: KernelSpec, shapes: Sequence[str], match: str, parameters: Sequence[str]) -> _Plan:
    measured = (HEAD_DIM_QK, HEAD_DIM_V, PAGE_BLOCK_SIZE)
    if (spec.head_dim_qk, spec.head_dim_v, spec.page_block_size) != measured:
        raise click.UsageError(
            f"{spec.name} cannot be timed: cases have head dims {HEAD_DIM_QK} and {HEAD_DIM_V} and pages of "
            f"{PAGE_BLOCK_SIZE} tokens"
        )
    try:
        values = parse_parameters(parameters) or None
        configs, costs = list_configs(spec, values), list_costs(values)
    except ValueError as error:
        raise click.UsageError(f"--param: {error}") from error
    names = tuple(shapes) or (_DEFAULT_SHAPES.get(spec.arch, "tune"),)
    cases = select_cases(names, dtype=spec.dtype, match=match)
    if not cases:
        _, example = select_cases(names, dtype=spec.dtype)[0]
        raise click.UsageError(f"--match: no case's name contains {match!r}; names are like {str(example)!r}")
    return _Plan(spec, [Variant(spec, config) for config in configs], costs, cases)


def _print_plans(plans: Sequence[_Plan], *, as_json: bool) -> None:
    if as_json:
        document = [
            dict(
                kernel=plan.spec.name,
                configs=[variant.config.to_dict() for variant in plan.variants],
                costs=[costs._asdict() for costs in plan.costs],
                cases=[str(case) for _, case in plan.cases],
            )
            for plan in plans
        ]
        click.echo(json.dumps(dict(plans=document), indent=1))
        return
    for plan in plans:
        click.echo(f"{plan.spec.name}:")
        click.echo(f"{len(plan.variants)} configurations, a module each:")
        for variant in plan.variants:
            click.echo(f"  {variant.config.name}")
        click.echo(
            f"{len(plan.costs)} combinations of costs, of which those are timed that lead to different schedules"
        )
        click.echo(f"{len(plan.cases)} cases:")
        for case_list, case in plan.cases:
            click.echo(f"  {case_list}: {case}")


def _device_for(spec: KernelSpec) -> torch.device:
    """Where a kernel is timed."""
    import torch

    from tilemla.launch import arch_of_device

    device = torch.device("cpu")
    if spec.arch != "cpu":
        if not torch.cuda.is_available():
            raise click.ClickException(
                f"{spec.name} is timed on a GPU, and torch {torch.__version__} sees none; `tilemla doctor` tells more, "
                "--build-only --modules DIR builds for a run elsewhere, and --dry-run lists what would be tried"
            )
        device = torch.device("cuda", torch.cuda.current_device())
        if arch_of_device(device) != spec.arch:
            raise click.ClickException(f"{spec.name} does not run on this {torch.cuda.get_device_name(device)}")
    return device


def _check_cache() -> None:
    """Make sure that modules may be kept in the cache."""
    from tilemla import env
    from tilemla.errors import ModuleNotBuiltError
    from tilemla.store import check_private

    try:
        check_private(env.cache_dir())
    except ModuleNotBuiltError as error:
        raise click.ClickException(str(error)) from error


def _make_folder(out_dir: Path) -> None:
    """Make the folder of logs now, before minutes are spent on what goes there."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.ClickException(f"--out-dir: {error}") from error
    if not os.access(out_dir, os.W_OK):
        raise click.ClickException(f"--out-dir: {out_dir} cannot be written")


def _build(plans: Sequence[_Plan], folder: Path | None, jobs: int, *, must_build: bool) -> None:
    """Build what is missing, where that is possible."""
    from tilemla.store import why_cannot_generate

    variants = [variant for plan in plans for variant in plan.variants]
    reasons = {arch: why_cannot_generate(arch) for arch in {variant.spec.arch for variant in variants}}
    if must_build and any(reasons.values()):
        raise click.ClickException("; ".join(f"{arch}: {reason}" for arch, reason in reasons.items() if reason))
    outcomes = build_variants([each for each in variants if reasons[each.spec.arch] is None], folder, jobs)
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    for outcome in failed:
        click.echo(f"{outcome.item.name}: {outcome.error}", err=True)
    if must_build:
        click.echo(f"{len(outcomes) - len(failed)} of {len(outcomes)} modules are in {folder}")
        if len(failed) == len(outcomes):
            sys.exit(1)


def _tune(plan: _Plan, folder: Path | None, device: torch.device, *, rounds: int, rep_ms: int, out_dir: Path) -> Table:
    import torch

    from tilemla.bench.record import TimingMode
    from tilemla.bench.timing import Timer
    from tilemla.errors import ModuleNotBuiltError, ToolchainError
    from tilemla.tuning.session import TuneError, make_run, tune_kernel

    console = make_console(stderr=True)
    timer = Timer(device, rep_ms=rep_ms)
    turns = len(plan.cases) * (bool(len(plan.variants) > 1) + bool(plan.costs))
    done = 0

    def tell(trials: list[Trial]) -> None:
        nonlocal done
        done += 1
        console.print(f"{done}/{turns} {_describe_turn(trials)}", soft_wrap=True)

    try:
        found = find_variants(plan.variants, folder)
        entry = next(iter(found.entries.values()), None)
        if entry is None:
            raise TuneError("; ".join(dict.fromkeys(found.failures.values())))
        run = make_run(entry.manifest, device, TimingMode(timer.flush, timer.graph, rounds, rep_ms))
        table = tune_kernel(
            run,
            {variant.config: entry for variant, entry in found.entries.items()},
            {variant.config: reason for variant, reason in found.failures.items()},
            plan.costs,
            plan.cases,
            log_path(out_dir, plan.spec, run.gpu),
            device,
            timer,
            tell,
        )
        write_table(table_path(out_dir, plan.spec, run.gpu), table)
    except (ModuleNotBuiltError, ToolchainError, TuneError, torch.OutOfMemoryError, OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    return table


def _describe_turn(trials: Sequence[Trial]) -> str:
    first, *candidates, again = trials
    default_us, again_us = first.time_us or 0.0, again.time_us or 0.0
    timed = [trial for trial in candidates if trial.time_us is not None]
    best = min(timed, key=lambda trial: trial.time_us or 0.0, default=None)
    text = f"{first.stage}, {first.case}: default {default_us:.1f} and {again_us:.1f} us"
    if best is not None:
        text += f", best of {len(timed)} others {best.time_us:.1f} us "
        text += f"({best.config.name})" if first.stage == "config" else f"({', '.join(map(str, best.costs[0]))})"
    failed = len(candidates) - len(timed)
    return text + (f", {failed} failed" if failed else "")


def _choose_from_logs(specs: Sequence[KernelSpec], out_dir: Path) -> list[Table]:
    from tilemla.tuning.choose import choose
    from tilemla.tuning.trial import read_trials

    logs = [
        path
        for spec in specs
        for path in sorted((out_dir / spec.name).glob("*.jsonl"))
        if "." not in path.stem  # <gpu>.bench.jsonl is the benchmark's
    ]
    if not logs:
        raise click.ClickException(f"--choose-only: no log of {', '.join(spec.name for spec in specs)} in {out_dir}")
    tables = []
    for path in logs:
        try:
            table = choose(read_trials(path), path.name)
            write_table(path.with_suffix(".json"), table)
        except (OSError, ValueError) as error:
            raise click.ClickException(str(error)) from error
        tables.append(table)
    return tables


def _show(tables: Sequence[Table], out_dir: Path, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(dict(tables=[json.loads(table.to_json()) for table in tables]), indent=1))
        return
    from rich import box
    from rich.table import Table as Grid

    console = make_console()
    for table in tables:
        console.print(f"{table.spec.name} on {table.gpu}", soft_wrap=True)
        grid = Grid(box=box.SIMPLE_HEAD)
        for title in ("class of shapes", "chosen", "best"):
            grid.add_column(title)
        for title in ("default / best", "margin", "worst case", "cases"):
            grid.add_column(title, justify="right")
        if table.config_evidence is not None:
            grid.add_row("configuration", table.config.name, *_cells(table.config_evidence))
        for name, choice in table.costs.items():
            grid.add_row(name, "best" if choice.costs else "formula", *_cells(choice.evidence))
        console.print(grid)
        console.print(f"in {table_path(out_dir, table.spec, table.gpu)}", soft_wrap=True)


def _cells(evidence: Evidence) -> tuple[str, ...]:
    return (
        evidence.best,
        f"{evidence.over_default:.3f}",
        f"{evidence.margin:.3f}",
        f"{evidence.worst:.3f}",
        str(evidence.num_cases),
    )
