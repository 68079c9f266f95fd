"""Whether a run keeps up with a log of an earlier one: ratios to a peer, which other clocks and loads move little."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from tilemla.bench.further import Case
from tilemla.bench.record import Record, RunContext, read_log


class GateError(ValueError):
    """Nothing of a run can be compared; says what the run has and what the log holds."""


class Baseline:
    """The ratios that a log holds: of each case, device, mode and peer the newest.

    The kernel's configuration is not part of what is looked up, so that a new one must keep up with the one before it.

    Parameters
    ----------
    path : Path
        The log. It is read here, and lines that are added later do not count.

    Raises
    ------
    ValueError
        On a line that is no measurement, with its number.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ratios: dict[tuple[str, str, bool, Case, str], float] = {}
        for record in read_log(path):
            for peer in record.peers:
                self._ratios[_key(record.context, record.case, peer.name)] = peer.over_ours

    def ratio(self, context: RunContext, case: Case, peer: str) -> float | None:
        """The recorded time of a peer over ours; None where there is no record."""
        return self._ratios.get(_key(context, case, peer))

    def require(self, measurements: Sequence[tuple[RunContext, Case]], peers: Sequence[str]) -> None:
        """Make sure that a run has something to be compared with.

        Parameters
        ----------
        measurements : sequence of (RunContext, Case)
            What it measures, at least one.
        peers : sequence of str
            Whom it measures beside.

        Raises
        ------
        GateError
            When no case has a record beside any of the peers, on its device and in its mode.
        """
        if any(self.ratio(context, case, peer) is not None for context, case in measurements for peer in peers):
            return
        context, _ = measurements[0]
        timing = context.timing
        asked = _describe(context.gpu, timing.flush, timing.graph, ", ".join(peers) or "no peer")
        held = {_describe(gpu, flush, graph, peer) for gpu, flush, graph, _, peer in self._ratios}
        raise GateError(
            f"nothing can be compared: {self.path} has none of these cases on {asked}; "
            f"it has {'cases on ' + '; '.join(sorted(held)) if held else 'no ratio to a peer'}"
        )


def _key(context: RunContext, case: Case, peer: str) -> tuple[str, str, bool, Case, str]:
    return context.gpu, context.timing.flush, context.timing.graph, case, peer


def _describe(gpu: str, flush: str, graph: bool, peers: str) -> str:
    return f"{gpu} ({flush} flush, {'graphs' if graph else 'whole calls'}) beside {peers}"


class Change(NamedTuple):
    """A ratio to a peer, then and now; ``measured`` is None where the peer failed in a case that it once ran."""

    case: Case
    peer: str
    recorded: float
    measured: float | None

    @property
    def relative(self) -> float | None:
        """The change as a fraction of what was recorded, negative where we fell behind."""
        return None if self.measured is None else self.measured / self.recorded - 1


class Comparison(NamedTuple):
    """What became of the ratios: all that were compared, those that fell behind, and why a case was not compared."""

    changes: list[Change]
    behind: list[Change]
    not_compared: dict[Case, str]


def compare(records: Sequence[Record], baseline: Baseline, tolerance: float) -> Comparison:
    """Compare measurements with recorded ones.

    Parameters
    ----------
    records : sequence of Record
        At least one.
    baseline : Baseline
        What they are compared with.
    tolerance : float
        The fraction of a recorded ratio by which the measured one may be lower. A peer that has a record and fails now
        is behind at any tolerance: it may be our result that became wrong.

    Raises
    ------
    GateError
        When there is nothing to compare.
    """
    names = dict.fromkeys(name for record in records for name in _measured_ratios(record))
    baseline.require([(record.context, record.case) for record in records], list(names))
    changes = []
    not_compared = {}
    for record in records:
        measured = _measured_ratios(record)
        found = [
            Change(record.case, peer, recorded, ratio)
            for peer, ratio in measured.items()
            if (recorded := baseline.ratio(record.context, record.case, peer)) is not None
        ]
        if not found:
            not_compared[record.case] = f"no record beside {', '.join(measured)}" if measured else "no peer was timed"
        changes += found
    behind = [each for each in changes if each.relative is None or each.relative < -tolerance]
    return Comparison(changes, behind, not_compared)


def _measured_ratios(record: Record) -> dict[str, float | None]:
    return {peer.name: peer.over_ours for peer in record.peers} | dict.fromkeys(record.failures)


def make_gate_table(changes: Sequence[Change]) -> Table:
    """A line per ratio: the case, the peer, the ratio as recorded and as measured, and the change in percent."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("fell behind", no_wrap=True)
    table.add_column("peer", no_wrap=True)
    for header in ("recorded", "measured", "change"):
        table.add_column(header, justify="right")
    for each in changes:
        measured, relative = each.measured, each.relative
        table.add_row(
            Text(str(each.case)),
            each.peer,
            f"{each.recorded:.3f}",
            "failed" if measured is None else f"{measured:.3f}",
            "-" if relative is None else f"{relative:+.1%}",
        )
    return table
