"""Measurements for people, as a table, and for programs, as one document."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from tilemla.bench.record import PeerTime, Record, rounded


def peer_names(records: Sequence[Record]) -> list[str]:
    """Peers that have a time in any of the records, in order of appearance."""
    return list(dict.fromkeys(peer.name for record in records for peer in record.peers))


def _time_of(record: Record, name: str) -> PeerTime | None:
    return next((peer for peer in record.peers if peer.name == name), None)


class Summary(NamedTuple):
    """A peer over a list of cases: ratios of its time to ours, above 1 where ours is faster."""

    case_list: str
    peer: str
    num_cases: int
    geometric_mean: float
    least: float
    least_case: str


def summarize(records: Sequence[Record]) -> list[Summary]:
    """Sum up each list of cases for each peer that was timed in it."""
    summaries = []
    for case_list in dict.fromkeys(record.case_list for record in records):
        members = [record for record in records if record.case_list == case_list]
        for name in peer_names(members):
            timed = [(peer.over_ours, str(record.case)) for record in members if (peer := _time_of(record, name))]
            mean = statistics.geometric_mean(ratio for ratio, _ in timed)
            summaries.append(Summary(case_list, name, len(timed), mean, *min(timed)))
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
    return ", ".join(parts) + f"; {context.timing}; {when}"


def make_table(records: Sequence[Record]) -> Table:
    """A line per case: our time and rates, how near the floor, and each peer's time and its ratio to ours.

    Parameters
    ----------
    records : sequence of Record
        At least one; a new list of cases begins a new section.
    """
    names = peer_names(records)
    has_host_times = any(record.host_time_us is not None for record in records)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("case", no_wrap=True)
    headers = ["us", "TFLOPS", "GB/s", "floor/ours", *(["host us"] if has_host_times else [])]
    for header in headers + [header for name in names for header in (f"{name} us", "/ ours")]:
        table.add_column(header, justify="right")
    previous = records[0].case_list
    for record in records:
        if record.case_list != previous:
            table.add_section()
            previous = record.case_list
        cells: list[str | Text] = [
            Text(str(record.case)),
            _text(record.time_us, 1),
            _text(record.tflops, 1 if record.tflops >= 1 else 4),
            _text(record.bandwidth_gbs, 0 if record.bandwidth_gbs >= 10 else 3),
            _text(record.floor_over_ours, 3),
        ]
        if has_host_times:
            cells.append(_text(record.host_time_us, 1))
        for name in names:
            peer = _time_of(record, name)
            if peer is None:
                cells += ["-", "-"]
            else:
                cells += [
                    _text(peer.time_us, 1),
                    Text(f"{peer.over_ours:.3f}", "green" if peer.over_ours >= 1 else "red"),
                ]
        table.add_row(*cells)
    return table


def summary_lines(records: Sequence[Record]) -> list[str]:
    """The summaries as text, and why a case has no time of a peer."""
    lines = [
        f"{summary.case_list or 'cases'}: {summary.peer} over ours: geometric mean {summary.geometric_mean:.3f} "
        f"of {summary.num_cases}, least {summary.least:.3f} ({summary.least_case})"
        for summary in summarize(records)
    ]
    for record in records:
        lines += [f"{record.case}: no time of {name}: {reason}" for name, reason in record.failures.items()]
    return lines


def make_document(records: Sequence[Record], missing_peers: dict[str, str]) -> dict[str, Any]:
    """What ``--json`` writes: ``records`` as in a log, ``summaries``, and ``missing_peers`` with reasons."""
    return {
        "records": [record.to_dict() for record in records],
        "summaries": rounded([summary._asdict() for summary in summarize(records)]),
        "missing_peers": missing_peers,
    }
