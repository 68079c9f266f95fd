"""``tilemla bench``: time decode calls beside other implementations, or show what was timed before."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from click.core import ParameterSource
from rich.console import Console

from tilemla.bench.cases import DEFAULT_LISTS, SHORT_DTYPE
from tilemla.bench.jobs import JOB_LISTS, TARGETS, Job, plan_jobs
from tilemla.cli.output import make_console

if TYPE_CHECKING:
    from tilemla.bench.gate import Baseline
    from tilemla.bench.record import Record

_STDOUT = Path("-")
# Options of a run, by parameter: none of them means anything to a log that is only shown.
_RUN_OPTIONS = {
    "cases": "--cases",
    "dtype": "--dtype",
    "device": "--device",
    "rounds": "--rounds",
    "rep_ms": "--rep-ms",
    "peers": "--peer",
    "log": "--log",
}


def _check_folder(_context: click.Context, _parameter: click.Parameter, path: Path | None) -> Path | None:
    """Refuse a path that cannot be written before minutes are spent on what goes there."""
    if path is not None and path != _STDOUT:
        folder = path.absolute().parent
        if not folder.is_dir():
            raise click.BadParameter(f"the folder {folder} does not exist")
        if not os.access(path if path.exists() else folder, os.W_OK):
            raise click.BadParameter(f"{path} cannot be written")
    return path


def _output(*names: str, help_text: str, allow_dash: bool = False) -> Callable[[Any], Any]:
    path_type = click.Path(dir_okay=False, allow_dash=allow_dash, path_type=Path)
    return click.option(*names, type=path_type, callback=_check_folder, metavar="FILE", help=help_text)


@click.command("bench")
@click.option("--cases", multiple=True, type=click.Choice(JOB_LISTS), help="A list of cases; repeatable.")
@click.option("--match", default="", metavar="TEXT", help="Only cases whose name contains TEXT, such as 'h128k1 s2'.")
@click.option("--dtype", type=click.Choice(list(SHORT_DTYPE)), default="bfloat16", show_default=True)
@click.option("--device", type=click.Choice(["cuda", "cpu"]), help="Where to run; a GPU where there is one.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Timings of each implementation.")
@click.option("--rep-ms", type=click.IntRange(1), default=60, show_default=True, help="Milliseconds of one timing.")
@click.option("--graph", is_flag=True, help="Time replays of a CUDA graph that holds one call.")
@click.option("--clean", is_flag=True, help="Flush L2 by reading, so that no call has to write back what filled it.")
@click.option(
    "--peer",
    "peers",
    multiple=True,
    default=("auto",),
    metavar="auto|none|NAME",
    help="What to time beside ours: FlashMLA and FlashInfer where they run (auto, the default), nothing (none), "
    "flashinfer, or a module with FlashMLA's API. NAME is repeatable.",
)
@_output(
    "--json",
    "json_path",
    help_text="Write one JSON document; - writes it to stdout, and the table to stderr.",
    allow_dash=True,
)
@_output("--log", help_text="Add a JSON line for each case to FILE, as soon as it is measured.")
@_output("--png", help_text="Draw a roofline: rates over arithmetic intensity, under the measured ceilings.")
@click.option(
    "--from",
    "from_log",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Run nothing: show the latest measurement of each case in a log; --graph and --clean say of which mode.",
)
@click.option(
    "--check",
    "check_log",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Fail where the ratio to a peer fell behind the newest one of the same case, device and mode in a log.",
)
@click.option(
    "--check-tolerance",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.05,
    show_default=True,
    metavar="FRACTION",
    help="How much lower than the recorded ratio is still well.",
)
@click.pass_context
def bench(
    context: click.Context,
    cases: tuple[str, ...],
    match: str,
    dtype: str,
    device: Literal["cuda", "cpu"] | None,
    rounds: int,
    rep_ms: int,
    graph: bool,
    clean: bool,
    peers: tuple[str, ...],
    json_path: Path | None,
    log: Path | None,
    png: Path | None,
    from_log: Path | None,
    check_log: Path | None,
    check_tolerance: float,
) -> None:
    """Time decode calls beside other implementations, and beside what the device can do.

    A time is that of a whole call, with L2 flushed before it. Implementations are timed in turn; a ratio is the median
    of the ratios of the rounds, above 1 where tilemla is faster. The floor of a case is the larger of its bytes over
    the read bandwidth and its FLOP over the rate of a matrix product, both measured in the same run. Where memory
    bounds a case, a generated kernel that only reads its pages is timed, too.

    \b
    Lists of cases (by default grid, small and imbalanced on a GPU, cpu on a CPU):
      grid        the 32 cases that FlashMLA publishes: batch 128, lengths about 4096 and 8192
      small       batches of 1, 4 and 32, lengths of 1024 to 65536
      imbalanced  batch 4, one request far longer than the others
      even        the varied cases of grid, the same tokens spread evenly
      tune        what `tilemla tune` tries configurations with
      long        batch 128, lengths about 32768, 128 heads
      planning    batches of 1 to 1024, of which get_mla_metadata is timed, too
      further     fp8 caches, sparse decode and prefill, with errors against float64
      targets     what the project's targets are about, each in its own mode, and whether they are reached
      cpu         what a CPU gets through in a minute

    \b
    Examples:
      tilemla bench
      tilemla bench --cases small --graph --peer none
      tilemla bench --cases targets --log h100.jsonl
      tilemla bench --cases further --match sparse --peer sgl_kernel.flash_mla
      tilemla bench --cases grid --match "h128k1 s2" --rounds 9 --log h100.jsonl
      tilemla bench --from h100.jsonl --png roofline.png
      tilemla bench --cases small --check h100.jsonl
    """  # noqa: D301 (the backspace is click's mark of a paragraph that is not wrapped)
    if png is not None:
        _require_matplotlib()
    if check_log is None and _is_given(context, "check_tolerance"):
        raise click.UsageError("--check-tolerance is about --check, which was not given")
    baseline = _read_baseline(check_log) if check_log is not None else None
    wants_targets = TARGETS in cases
    if wants_targets and (graph or clean):
        raise click.UsageError("--cases targets has modes of its own, so it does not go with --graph and --clean")
    missing_peers: dict[str, str] = {}
    if from_log is not None:
        given = [flag for name, flag in _RUN_OPTIONS.items() if _is_given(context, name)]
        if given and not (wants_targets and given == ["--cases"]):
            raise click.UsageError(f"--from runs nothing, so it does not go with {', '.join(given)}")
        records = _read_records(from_log, match, clean=clean, graph=graph, any_mode=wants_targets)
    else:
        if len(peers) > 1 and {"auto", "none"} & set(peers):
            raise click.UsageError(f"--peer auto and --peer none stand alone, got {', '.join(peers)}")
        if baseline is not None and peers == ("none",):
            raise click.UsageError("--check compares ratios to a peer, so it does not go with --peer none")
        device = _choose_device(device)
        if device == "cpu" and (graph or clean or wants_targets):
            raise click.UsageError("--graph, --clean and --cases targets are about a GPU, and this runs on a CPU")
        jobs = _plan(cases or DEFAULT_LISTS[device], dtype, match, clean=clean, graph=graph)
        records, missing_peers = _run(jobs, device, dtype, peers, rounds, rep_ms, log, baseline)
    _show(records, missing_peers, json_path, with_targets=wants_targets)
    if png is not None:
        _draw(records, png)
    if baseline is not None:
        _check(records, baseline, check_tolerance, on_stderr=json_path == _STDOUT)


def _is_given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is not ParameterSource.DEFAULT


def _require_matplotlib() -> None:
    from tilemla.bench.roofline import load_figure_class

    try:
        load_figure_class()
    except ModuleNotFoundError as error:
        raise click.ClickException(
            f"--png needs matplotlib, which is not installed ({error}); run: pip install 'tilemla[bench]'"
        ) from error


def _choose_device(device: Literal["cuda", "cpu"] | None) -> Literal["cuda", "cpu"]:
    import torch

    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise click.ClickException(
            f"--device cuda: torch {torch.__version__} sees no GPU (torch.cuda.is_available() is False); "
            "`tilemla doctor` tells more, and --device cpu runs here"
        )
    return device or ("cuda" if has_gpu else "cpu")


def _plan(names: tuple[str, ...], dtype: str, match: str, *, clean: bool, graph: bool) -> list[Job]:
    flush: Literal["dirty", "clean"] = "clean" if clean else "dirty"
    try:
        jobs = plan_jobs(names, dtype=dtype, match=match, flush=flush, graph=graph)
    except ValueError as error:
        raise click.UsageError(f"--cases: {error}") from error
    if not jobs:
        example = plan_jobs(names, dtype=dtype)[0].case
        raise click.ClickException(f"--match: no case's name contains {match!r}; names are like {str(example)!r}")
    return jobs


def _read_records(path: Path, match: str, *, clean: bool, graph: bool, any_mode: bool) -> list[Record]:
    """The latest measurements of one device and mode: a picture of several would compare what cannot be."""
    from tilemla.bench.record import latest, read_log

    try:
        found = latest(read_log(path))
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    records = []
    for record in found:
        timing = record.context.timing
        is_asked = any_mode or (timing.graph == graph and (timing.flush == "clean") == clean)
        if is_asked and match in str(record.case):
            records.append(record)
    if not records:
        modes = ", ".join(sorted({str(record.context.timing) for record in found})) or "nothing"
        asked = "".join((" --graph" * graph, " --clean" * clean, f" --match {match!r}" * bool(match)))
        raise click.ClickException(
            f"{path}: nothing there fits{asked or ' a run without --graph and --clean'}; it holds {modes}"
        )
    gpus = sorted({record.context.gpu for record in records})
    if len(gpus) > 1:
        raise click.ClickException(
            f"{path} holds measurements of several devices, {', '.join(gpus)}: use a file for each"
        )
    return records


def _run(
    jobs: list[Job],
    device_type: str,
    dtype: str,
    peer_names: tuple[str, ...],
    rounds: int,
    rep_ms: int,
    log: Path | None,
    baseline: Baseline | None,
) -> tuple[list[Record], dict[str, str]]:
    """Measure, with a line on stderr for each case, and on a terminal a bar below them."""
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from tilemla.bench.gate import GateError
    from tilemla.bench.peers import PeerError, find_peers
    from tilemla.bench.reading import PageReader, find_reader
    from tilemla.bench.record import append_log
    from tilemla.bench.run import make_context, measure, with_mode
    from tilemla.bench.timing import Timer

    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    device = torch.device("cuda", torch.cuda.current_device()) if device_type == "cuda" else torch.device("cpu")
    modes = dict.fromkeys((job.flush, job.graph) for job in jobs)
    timers = {mode: Timer(device, rep_ms=rep_ms, flush=mode[0], graph=mode[1]) for mode in modes}
    try:
        peers = find_peers(peer_names, device, dtype)
        context = make_context(timers[jobs[0].flush, jobs[0].graph], rounds, dtype, peers.found)
    except (PeerError, NotImplementedError) as error:
        raise click.ClickException(str(error)) from error
    for name, reason in peers.missing.items():
        console.print(f"peer {name}: none ({reason})")
    console.print("peers: " + (", ".join(peer.name for peer in peers.found) or "there is none, so there are no ratios"))
    if baseline is not None:
        try:
            names = [peer.name for peer in peers.found]
            baseline.require([(with_mode(context, timers[job.flush, job.graph]), job.case) for job in jobs], names)
        except GateError as error:
            raise click.ClickException(f"--check: {error}") from error

    reader: PageReader | None = None
    if device_type == "cuda":
        found = find_reader(device, dtype)
        if isinstance(found, str):
            console.print(f"read-only kernel: none ({found})")
        else:
            reader = found

    records: list[Record] = []
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=len(jobs))
        for job in jobs:
            case, timer = job.case, timers[job.flush, job.graph]
            bar.update(task, description=str(case))
            try:
                record = measure(
                    case,
                    with_mode(context, timer),
                    peers.found,
                    timer,
                    device,
                    job.case_list,
                    reader=reader,
                    with_even=job.with_even,
                    with_planning=job.with_planning and device_type == "cuda",
                )
            except torch.OutOfMemoryError as error:
                raise click.ClickException(
                    f"{case} does not fit into the memory of {context.gpu}; leave it out by --cases or --match: {error}"
                ) from error
            if log is not None:
                append_log(log, record)
            records.append(record)
            bar.advance(task)
            theirs = "".join(f", {peer.name} {peer.time_us:.1f} us ({peer.over_ours:.3f})" for peer in record.peers)
            console.print(f"{len(records)}/{len(jobs)} {case}: {record.time_us:.1f} us{theirs}")
    return records, peers.missing


def _show(records: list[Record], missing_peers: dict[str, str], json_path: Path | None, *, with_targets: bool) -> None:
    """The tables to stdout, or to stderr where stdout is for the document."""
    from tilemla.bench.report import describe_run, make_document, make_table, summary_lines
    from tilemla.bench.targets import evaluate, make_target_table

    on_stderr = json_path == _STDOUT
    console = make_console(stderr=on_stderr)
    console.print(describe_run(records), soft_wrap=True)
    console.print(make_table(records))
    for line in summary_lines(records):
        console.print(line, soft_wrap=True)
    results = evaluate(records) if with_targets else []
    if results:
        console.print(make_target_table(results))
    if json_path is not None:
        text = json.dumps(make_document(records, missing_peers, results), indent=1)
        if on_stderr:
            click.echo(text)
        else:
            json_path.write_text(text + "\n")


def _draw(records: list[Record], path: Path) -> None:
    from tilemla.bench.roofline import draw_roofline

    try:
        draw_roofline(records, path)
    except ValueError as error:
        raise click.ClickException(f"--png: {error}") from error


def _read_baseline(path: Path) -> Baseline:
    from tilemla.bench.gate import Baseline

    try:
        return Baseline(path)
    except ValueError as error:
        raise click.ClickException(str(error)) from error


def _check(records: list[Record], baseline: Baseline, tolerance: float, *, on_stderr: bool) -> None:
    from tilemla.bench.gate import GateError, compare, make_gate_table

    try:
        comparison = compare(records, baseline, tolerance)
    except GateError as error:
        raise click.ClickException(f"--check: {error}") from error
    console = make_console(stderr=on_stderr)
    for case, reason in comparison.not_compared.items():
        console.print(f"{case}: not compared: {reason}", soft_wrap=True)
    total = len(comparison.changes)
    if comparison.behind:
        console.print(make_gate_table(comparison.behind))
        raise click.ClickException(
            f"--check: {len(comparison.behind)} of {total} ratios to a peer failed or are more than {tolerance:.1%} "
            f"lower than in {baseline.path}"
        )
    console.print(
        f"ratios to a peer compared: {total}, none more than {tolerance:.1%} lower than in {baseline.path}",
        soft_wrap=True,
    )
