"""Measurements for people, as a table, and for programs, as one document."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from tilemla.bench.record import PeerTime, Record, rounded
from tilemla.bench.targets import Result, as_dicts


def peer_names(records: Sequence[Record]) -> list[str]:
    """Peers that have a time in any of the records, in order of appearance."""
    return list(dict.fromkeys(peer.name for record in records for peer in record.peers))


def _time_of(record: Record, name: str) -> PeerTime | None:
    return next((peer for peer in record.peers if peer.name == name), None)


class Summary(NamedTuple):
    """One quantity over the cases of a list that were measured in one mode.

    Parameters
    ----------
    case_list, mode : str
        The list, and ``TimingMode.short`` of its records.
    quantity : str
        ``"peer/ours"``, ``"read-only/ours"`` and ``"even/ours"``, ratios of times; ``"of read bandwidth"`` and ``"of
        matmul"``, what is reached of the ceiling by the cases that it bounds. All of them: more is better.
    peer : str
        Whose time, for ``"peer/ours"``; else empty.
    num_cases : int
        Cases in which the quantity was measured.
    geometric_mean, least : float
        Of the quantity.
    least_case : str
        The case that has the least.
    """

    case_list: str
    mode: str
    quantity: str
    peer: str
    num_cases: int
    geometric_mean: float
    least: float
    least_case: str


def _quantities(record: Record) -> dict[tuple[str, str], float]:
    """What is summed up of a record, by quantity and peer."""
    found = {("peer/ours", peer.name): peer.over_ours for peer in record.peers}
    if record.read_only is not None:
        found["read-only/ours", ""] = record.read_only.over_ours
    if record.even is not None:
        found["even/ours", ""] = record.even.over_ours
    is_memory_bound, share = record.context.is_memory_bound(record.case), record.floor_over_ours
    if share is not None:
        found["of read bandwidth" if is_memory_bound else "of matmul", ""] = share
    return found


def summarize(records: Sequence[Record]) -> list[Summary]:
    """Sum up each list of cases in each mode, quantity by quantity."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.case_list, record.context.timing.short), []).append(record)
    summaries = []
    for (case_list, mode), members in groups.items():
        values: dict[tuple[str, str], list[tuple[float, str]]] = {}
        for record in members:
            for key, value in _quantities(record).items():
                values.setdefault(key, []).append((value, str(record.case)))
        for (quantity, peer), found in values.items():
            mean = statistics.geometric_mean(value for value, _ in found)
            summaries.append(Summary(case_list, mode, quantity, peer, len(found), mean, *min(found)))
    return summaries


def _text(value: float | None, decimals: int) -> str:
    return "-" if value is None else f"{value:.{decimals}f}"


def describe_run(records: Sequence[Record]) -> str:
    """Device, ceilings and mode of a run in one line; of several runs those of the last."""
    context = records[-1].context
    parts = [context.gpu]
    if context.read_bandwidth_gbs is not None:
        parts.append(f"{context.read_bandwidth_gbs:.0f} GB/s read")
    if context.matmul_tflops is not None:
        decimals = 0 if context.matmul_tflops >= 10 else 3
        parts.append(f"{context.matmul_tflops:.{decimals}f} TFLOPS matmul")
    dates = [record.context.date for record in records]
    when = max(dates) if len(set(dates)) == 1 else f"{min(dates)} to {max(dates)}"
    modes = dict.fromkeys(str(record.context.timing) for record in records)
    return "; ".join([", ".join(parts), *modes, when])


class _Column(NamedTuple):
    """A column that a table has when one of its records has something to show there."""

    header: str
    value: Callable[[Record], float | None]
    decimals: int


_OPTIONAL_COLUMNS = (
    _Column("host us", lambda record: record.host_time_us, 1),
    _Column("read-only us", lambda record: record.read_only and record.read_only.time_us, 1),
    _Column("/ ours", lambda record: record.read_only and record.read_only.over_ours, 3),
    _Column("even us", lambda record: record.even and record.even.time_us, 1),
    _Column("/ ours", lambda record: record.even and record.even.over_ours, 3),
    _Column("plan us", lambda record: record.planning_us, 1),
    _Column("error 1e-3", lambda record: record.error and record.error * 1e3, 2),
)


def make_table(records: Sequence[Record]) -> Table:
    """A line per case: our time and rates, how near the floor, and each peer's time and its ratio to ours.

    Parameters
    ----------
    records : sequence of Record
        At least one; a new list of cases, or another mode, begins a new section.
    """
    names = peer_names(records)
    columns = [column for column in _OPTIONAL_COLUMNS if any(column.value(record) is not None for record in records)]
    modes = {record.context.timing.short for record in records}
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("case", no_wrap=True)
    if len(modes) > 1:
        table.add_column("flush", no_wrap=True)
    headers = ["us", "TFLOPS", "GB/s", "floor/ours", *(column.header for column in columns)]
    of_peers = {
        name: [f"{name} us", "/ ours", *(["error 1e-3"] if _has_error(records, name) else [])] for name in names
    }
    for header in headers + [header for name in names for header in of_peers[name]]:
        table.add_column(header, justify="right")
    previous = _section_of(records[0])
    for record in records:
        if _section_of(record) != previous:
            table.add_section()
            previous = _section_of(record)
        cells: list[str | Text] = [
            Text(str(record.case)),
            *([record.context.timing.short] if len(modes) > 1 else []),
            _text(record.time_us, 1),
            _text(record.tflops, 1 if record.tflops >= 1 else 4),
            _text(record.bandwidth_gbs, 0 if record.bandwidth_gbs >= 10 else 3),
            _text(record.floor_over_ours, 3),
            *(_text(column.value(record), column.decimals) for column in columns),
        ]
        for name in names:
            peer = _time_of(record, name)
            if peer is None:
                cells += ["-"] * len(of_peers[name])
                continue
            cells += [
                _text(peer.time_us, 1),
                Text(f"{peer.over_ours:.3f}", "green" if peer.over_ours >= 1 else "red"),
            ]
            if _has_error(records, name):
                cells.append(_text(peer.error and peer.error * 1e3, 2))
        table.add_row(*cells)
    return table


def _has_error(records: Sequence[Record], name: str) -> bool:
    return any(peer.error is not None for record in records if (peer := _time_of(record, name)) is not None)


def _section_of(record: Record) -> tuple[str, str]:
    return record.case_list, record.context.timing.short


def summary_lines(records: Sequence[Record]) -> list[str]:
    """The summaries as text, how long planning takes, and why a case has no time of a peer."""
    has_modes = len({record.context.timing.short for record in records}) > 1
    lines = []
    for summary in summarize(records):
        name = (summary.case_list or "cases") + (f", {summary.mode}" if has_modes else "")
        quantity = summary.quantity.replace("peer", summary.peer).replace("/", " over ")
        lines.append(
            f"{name}: {quantity}: geometric mean {summary.geometric_mean:.3f} of {summary.num_cases}, least "
            f"{summary.least:.3f} ({summary.least_case})"
        )
    for record in records:
        if record.planning_us is not None:
            planners = [peer for peer in record.peers if peer.planning_us is not None]
            theirs = "".join(f", {peer.name} {peer.planning_us:.1f} us" for peer in planners)
            lines.append(f"{record.case}: get_mla_metadata {record.planning_us:.1f} us{theirs}")
        lines += [f"{record.case}: no time of {name}: {reason}" for name, reason in record.failures.items()]
    return lines


def make_document(
    records: Sequence[Record], missing_peers: dict[str, str], results: Sequence[Result] = ()
) -> dict[str, Any]:
    """What ``--json`` writes.

    Parameters
    ----------
    records : sequence of Record
        ``records`` as in a log, and their ``summaries``.
    missing_peers : dict of str to str
        Why peers could not be timed, by name.
    results : sequence of targets.Result
        ``targets``, when there are any.
    """
    document = {
        "records": [record.to_dict() for record in records],
        "summaries": rounded([summary._asdict() for summary in summarize(records)]),
        "missing_peers": missing_peers,
    }
    return document | ({"targets": rounded(as_dicts(results))} if results else {})
