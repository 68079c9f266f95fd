"""What the project wants to reach on an H100, and what a run of the list ``targets`` reached."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from tilemla.bench.cases import GridCase
from tilemla.bench.jobs import is_memory_bound_target, is_shortest_target
from tilemla.bench.record import Record

_Value = Callable[[Record], float | None]


class Target(NamedTuple):
    """A bound on a figure of some cases.

    Parameters
    ----------
    what : str
        The figure, and of which cases.
    bound : float
        What it is to be, at least or at most.
    side : "least" or "most"
        Which.
    case_list, mode : str
        Which cases: of this list, measured in this mode (``TimingMode.short``),
    is_of : callable
        and for which this holds.
    value : callable
        The figure of one record; None where it was not measured.
    over : "worst", "geometric mean" or "median"
        How the figures of the records become one.
    """

    what: str
    bound: float
    side: Literal["least", "most"]
    case_list: str
    mode: str
    is_of: Callable[[GridCase], bool]
    value: _Value
    over: Literal["worst", "geometric mean", "median"] = "worst"


class Result(NamedTuple):
    """What became of a target; ``value`` is None where nothing was measured, ``case`` names the worst one."""

    target: Target
    value: float | None
    num_cases: int
    case: str

    @property
    def is_reached(self) -> bool | None:
        """Whether the figure is on the right side of the bound; None without a figure."""
        if self.value is None:
            return None
        least = self.target.side == "least"
        return self.value >= self.target.bound if least else self.value <= self.target.bound


def _first_peer(record: Record) -> float | None:
    return record.peers[0].over_ours if record.peers else None


def _any_peer(record: Record) -> float | None:
    return min((peer.over_ours for peer in record.peers), default=None)


def _read_only_over_ours(record: Record) -> float | None:
    return None if record.read_only is None else record.read_only.over_ours


def _read_share_of_reader(record: Record) -> float | None:
    bandwidth_gbs = record.context.read_bandwidth_gbs
    if record.read_only is None or bandwidth_gbs is None or not isinstance(record.case, GridCase):
        return None
    return record.case.page_bytes / record.read_only.time_us * 1e-3 / bandwidth_gbs


def _read_share(record: Record) -> float | None:
    bandwidth_gbs = record.context.read_bandwidth_gbs
    return None if bandwidth_gbs is None else record.bandwidth_gbs / bandwidth_gbs


def _matmul_share(record: Record) -> float | None:
    matmul_tflops = record.context.matmul_tflops
    return None if matmul_tflops is None else record.tflops / matmul_tflops


def _over_even(record: Record) -> float | None:
    return None if record.even is None else 1 / record.even.over_ours


def _any(_case: GridCase) -> bool:
    return True


def _is_fixed_memory_bound(case: GridCase) -> bool:
    return is_memory_bound_target(case) and not case.is_varied


def _is_wide(seq_len_q: int) -> Callable[[GridCase], bool]:
    return lambda case: (
        (case.num_heads_q, case.seq_len_q, case.is_varied) == (128, seq_len_q, False) and case.mean_length >= 8192
    )


TARGETS: tuple[Target, ...] = (
    Target("grid: peer / ours", 1.10, "least", "grid", "dirty", _any, _first_peer, "geometric mean"),
    Target("grid: any peer / ours", 1.00, "least", "grid", "dirty", _any, _any_peer),
    Target(
        "h16-h64 s1 L8192: read-only / ours",
        0.99,
        "least",
        "grid",
        "dirty",
        _is_fixed_memory_bound,
        _read_only_over_ours,
    ),
    Target(
        "h16-h64 s1 L8192: read-only, of read bandwidth",
        0.96,
        "least",
        "grid",
        "dirty",
        _is_fixed_memory_bound,
        _read_share_of_reader,
    ),
    Target(
        "h16-h64 s1 L8192, clean: of read bandwidth",
        0.98,
        "least",
        "grid",
        "clean",
        _is_fixed_memory_bound,
        _read_share,
    ),
    Target("h128 s1 L8192: peer / ours", 1.15, "least", "grid", "dirty", _is_wide(1), _first_peer),
    Target("h128 s2 L8192: peer / ours", 1.05, "least", "grid", "dirty", _is_wide(2), _first_peer),
    Target("h128 s2 L8192: of matmul", 0.94, "least", "grid", "dirty", _is_wide(2), _matmul_share),
    Target("h128 s2 L~32768: peer / ours", 1.05, "least", "long", "dirty", _any, _first_peer),
    Target("h128 s2 L~32768: of matmul", 0.94, "least", "long", "dirty", _any, _matmul_share),
    Target("batch 1-32: peer / ours", 1.30, "least", "small", "dirty", _any, _first_peer, "geometric mean"),
    Target("batch 1-32: any peer / ours", 1.00, "least", "small", "dirty", _any, _any_peer),
    Target(
        "b1 L1024 h16 in a graph: us",
        10,
        "most",
        "small",
        "dirty graph",
        is_shortest_target,
        lambda record: record.time_us,
    ),
    Target("imbalanced: us", 45, "most", "imbalanced", "dirty", _any, lambda record: record.time_us),
    Target("varied / even", 1.03, "most", "grid", "dirty", _any, _over_even),
    Target("host time of a call: us", 12, "most", "small", "dirty", _any, lambda record: record.host_time_us, "median"),
)


def evaluate(records: Sequence[Record], targets: Iterable[Target] = TARGETS) -> list[Result]:
    """What measurements say of each target."""
    return [_evaluate(target, records) for target in targets]


def _evaluate(target: Target, records: Sequence[Record]) -> Result:
    found = [
        (value, str(record.case))
        for record in records
        if (record.case_list, record.context.timing.short) == (target.case_list, target.mode)
        and isinstance(record.case, GridCase)
        and target.is_of(record.case)
        and (value := target.value(record)) is not None
    ]
    if not found:
        return Result(target, None, 0, "")
    values = [value for value, _ in found]
    if target.over == "geometric mean":
        return Result(target, statistics.geometric_mean(values), len(found), "")
    if target.over == "median":
        return Result(target, statistics.median(values), len(found), "")
    worst, case = (min if target.side == "least" else max)(found)
    return Result(target, worst, len(found), case)


def make_target_table(results: Sequence[Result]) -> Table:
    """A line per target: the figure, the bound, and what was measured."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("target", no_wrap=True)
    for header in ("wanted", "measured", "cases"):
        table.add_column(header, justify="right")
    table.add_column("worst case", no_wrap=True)
    for result in results:
        target = result.target
        decimals = 3 if target.bound < 5 else 1
        measured = Text("-")
        if result.value is not None:
            measured = Text(f"{result.value:.{decimals}f}", "green" if result.is_reached else "red")
        wanted = f"{'>=' if target.side == 'least' else '<='} {target.bound:.{decimals}f}"
        what = target.what + (f", {target.over}" if target.over != "worst" else "")
        table.add_row(what, wanted, measured, str(result.num_cases), result.case)
    return table


def as_dicts(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The results as plain values, for JSON."""
    return [
        {
            "what": result.target.what,
            "over": result.target.over,
            "bound": result.target.bound,
            "side": result.target.side,
            "value": result.value,
            "num_cases": result.num_cases,
            "worst_case": result.case,
            "is_reached": result.is_reached,
        }
        for result in results
    ]
