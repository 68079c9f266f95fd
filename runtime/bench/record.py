"""One measurement, as it is kept in a log; the fields are described in tuning_logs/README.md."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tilemla.bench.cases import GridCase
from tilemla.bench.further import Case, FurtherCase
from tilemla.spec import KernelSpec

_DECIMALS = 4
# What a further case has of its spec.
_OF_SPEC = ("kernel", "kv_format", "dtype")


@dataclasses.dataclass(frozen=True)
class TimingMode:
    """How times were taken; the arguments of ``timing.Timer``, and how many timings of each the medians are of."""

    flush: Literal["dirty", "clean", "none"] = "dirty"
    graph: bool = False
    rounds: int = 5
    rep_ms: int = 60

    @property
    def short(self) -> str:
        """The mode in a word or two: how L2 is flushed, and whether a graph is replayed."""
        return f"{self.flush} graph" if self.graph else self.flush

    def __str__(self) -> str:
        call = "replays of a CUDA graph" if self.graph else "whole calls"
        flush = f"{self.flush} L2 flush" if self.flush != "none" else "no flush"
        return f"{call}, {flush}, {self.rounds} rounds of {self.rep_ms} ms"


@dataclasses.dataclass(frozen=True)
class RunContext:
    """What all measurements of a run share.

    Parameters
    ----------
    spec : KernelSpec
        Of the module that was timed.
    gpu : str
        The device's name; ``"cpu"`` for a CPU.
    versions : dict of str to str or None
        Of tilemla, torch, CUDA and peers, and the fingerprint of the module's sources.
    date : str
        ISO 8601.
    read_bandwidth_gbs, matmul_tflops : float or None
        The ceilings, measured in the same run; None in a log of a run that had none.
    timing : TimingMode
        How times were taken.
    """

    spec: KernelSpec
    gpu: str
    versions: dict[str, str | None]
    date: str
    read_bandwidth_gbs: float | None
    matmul_tflops: float | None
    timing: TimingMode = TimingMode()

    def is_memory_bound(self, case: Case) -> bool | None:
        """Whether the bytes of a case take longer than its arithmetic; None without ceilings."""
        if self.read_bandwidth_gbs is None or self.matmul_tflops is None:
            return None
        return case.num_bytes / self.read_bandwidth_gbs >= case.flop / self.matmul_tflops * 1e-3


@dataclasses.dataclass(frozen=True)
class PeerTime:
    """A peer's time beside ours.

    Parameters
    ----------
    name : str
        The peer.
    time_us : float
        Median time of its call in microseconds.
    over_ours : float
        Median of its time over ours in the same round: above 1, ours is faster.
    host_time_us : float or None
        Microseconds that its call keeps the host busy.
    planning_us : float or None
        Median time of its ``get_mla_metadata``, where that was timed.
    error : float or None
        Its largest difference to what is right, over the largest value, where that was found out.
    """

    name: str
    time_us: float
    over_ours: float
    host_time_us: float | None = None
    planning_us: float | None = None
    error: float | None = None


class Reference(NamedTuple):
    """What ours is compared with, timed in turn with it: its median time, and the median of its time over ours."""

    time_us: float
    over_ours: float


@dataclasses.dataclass(frozen=True)
class Record:
    """One case, timed.

    Parameters
    ----------
    context : RunContext
        The run that it belongs to.
    case : GridCase or FurtherCase
        What was timed.
    time_us : float
        Median time of our call in microseconds.
    host_time_us : float or None
        Microseconds that our call keeps the host busy; None where it is not measured: on a CPU, and in graphs.
    peers : tuple of PeerTime
        Others, timed in turn with ours.
    failures : dict of str to str
        Why a peer has no time for this case, by name.
    case_list : str
        The list that the case is of; empty in old logs.
    read_only : Reference or None
        A kernel that reads the pages of the call and does nothing with them; None where it was not timed.
    even : Reference or None
        Our call with the same tokens spread evenly over the requests; None where it was not timed.
    planning_us : float or None
        Median time of our ``get_mla_metadata``; None where it was not timed.
    error : float or None
        As of a peer, ours.
    """

    context: RunContext
    case: Case
    time_us: float
    host_time_us: float | None = None
    peers: tuple[PeerTime, ...] = ()
    failures: dict[str, str] = dataclasses.field(default_factory=dict)
    case_list: str = ""
    read_only: Reference | None = None
    even: Reference | None = None
    planning_us: float | None = None
    error: float | None = None

    @property
    def tflops(self) -> float:
        """Rate of the arithmetic."""
        return self.case.flop / self.time_us * 1e-6

    @property
    def bandwidth_gbs(self) -> float:
        """Rate of the bytes that must move."""
        return self.case.num_bytes / self.time_us * 1e-3

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.case.flop / self.case.num_bytes

    @property
    def floor_over_ours(self) -> float | None:
        """The least time that the ceilings allow, over ours; None without ceilings."""
        bandwidth_gbs, matmul_tflops = self.context.read_bandwidth_gbs, self.context.matmul_tflops
        if bandwidth_gbs is None or matmul_tflops is None:
            return None
        return max(self.bandwidth_gbs / bandwidth_gbs, self.tflops / matmul_tflops)

    def to_dict(self) -> dict[str, Any]:
        """The fields of a line of a log, as plain values."""
        fields: dict[str, Any] = {
            "spec": self.context.spec.to_dict(),
            "case_list": self.case_list,
            "shape": shape_fields(self.case),
            "time_us": self.time_us,
            "host_time_us": self.host_time_us,
            "tflops": self.tflops,
            "bandwidth_gbs": self.bandwidth_gbs,
            "flop": self.case.flop,
            "num_bytes": self.case.num_bytes,
            **_reference_fields("read_only", self.read_only),
            **_reference_fields("even", self.even),
            **_given("planning_us", self.planning_us),
            **_given("error_thousandths", _thousandths(self.error)),
        }
        peers = [_peer_fields(peer) for peer in self.peers]
        fields |= peers[0] if peers else {"peer": None}
        fields |= {
            "other_peers": peers[1:],
            "peer_failures": self.failures,
            "floor_over_ours": self.floor_over_ours,
            "gpu": self.context.gpu,
            "versions": self.context.versions,
            "date": self.context.date,
            "read_bandwidth_gbs": self.context.read_bandwidth_gbs,
            "matmul_tflops": self.context.matmul_tflops,
            "timing": dataclasses.asdict(self.context.timing),
        }
        result: dict[str, Any] = rounded(fields)
        return result

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Record:
        """Make a record of what ``to_dict`` gave, now or before it knew peers beyond the first, hosts and modes.

        Raises
        ------
        ValueError, KeyError, TypeError
            When the fields are not those of a measurement.
        """
        spec = KernelSpec.from_dict(fields["spec"])
        case = case_of(fields["shape"], spec)
        context = RunContext(
            spec=spec,
            gpu=fields["gpu"],
            versions=dict(fields["versions"]),
            date=fields["date"],
            read_bandwidth_gbs=fields.get("read_bandwidth_gbs"),
            matmul_tflops=fields.get("matmul_tflops"),
            timing=TimingMode(**fields.get("timing", {})),
        )
        peers = [fields] if fields.get("peer") else []
        return cls(
            context=context,
            case=case,
            time_us=fields["time_us"],
            host_time_us=fields.get("host_time_us"),
            peers=tuple(_peer_of(peer) for peer in (*peers, *fields.get("other_peers", ()))),
            failures=dict(fields.get("peer_failures", {})),
            case_list=fields.get("case_list", ""),
            read_only=_reference_of("read_only", fields),
            even=_reference_of("even", fields),
            planning_us=fields.get("planning_us"),
            error=_of_thousandths(fields.get("error_thousandths")),
        )


def shape_fields(case: Case) -> dict[str, Any]:
    """The fields of a case in a log, as plain values; what the spec has is not among them."""
    shape = dataclasses.asdict(case)
    if isinstance(case, FurtherCase):
        for name in _OF_SPEC:
            del shape[name]
        return shape
    del shape["dtype"]
    if not case.lengths:
        del shape["lengths"]
    return shape | {"total_tokens": case.total_tokens}


def case_of(shape: Mapping[str, Any], spec: KernelSpec) -> Case:
    """Make a case of what ``shape_fields`` gave, and of the spec of the module that served it.

    Raises
    ------
    ValueError, KeyError, TypeError
        When the fields are not those of a case.
    """
    fields = dict(shape)
    if "topk" in fields:
        return FurtherCase(**fields, **{name: getattr(spec, name) for name in _OF_SPEC})
    return grid_case_of(fields, spec.dtype)


def grid_case_of(shape: Mapping[str, Any], dtype: str) -> GridCase:
    """The same of a case of dense decode.

    Raises
    ------
    ValueError, KeyError, TypeError
        When the fields are not those of a case.
    """
    fields = dict(shape)
    total_tokens = fields.pop("total_tokens")
    fields["lengths"] = tuple(fields.get("lengths", ()))
    case = GridCase(**fields, dtype=dtype)
    if case.total_tokens != total_tokens:
        raise ValueError(f"shape has {case.total_tokens} tokens here, its total_tokens says {total_tokens}")
    return case


def _peer_fields(peer: PeerTime) -> dict[str, Any]:
    return {
        "peer": peer.name,
        "peer_time_us": peer.time_us,
        "peer_over_ours": peer.over_ours,
        "peer_host_time_us": peer.host_time_us,
        **_given("peer_planning_us", peer.planning_us),
        **_given("peer_error_thousandths", _thousandths(peer.error)),
    }


def _peer_of(fields: Mapping[str, Any]) -> PeerTime:
    return PeerTime(
        fields["peer"],
        fields["peer_time_us"],
        fields["peer_over_ours"],
        fields.get("peer_host_time_us"),
        fields.get("peer_planning_us"),
        _of_thousandths(fields.get("peer_error_thousandths")),
    )


def _reference_fields(name: str, reference: Reference | None) -> dict[str, float]:
    return {} if reference is None else {f"{name}_us": reference.time_us, f"{name}_over_ours": reference.over_ours}


def _reference_of(name: str, fields: Mapping[str, Any]) -> Reference | None:
    return Reference(fields[f"{name}_us"], fields[f"{name}_over_ours"]) if f"{name}_us" in fields else None


def _given(name: str, value: float | None) -> dict[str, float]:
    return {} if value is None else {name: value}


def _thousandths(value: float | None) -> float | None:
    return None if value is None else value * 1e3


def _of_thousandths(value: float | None) -> float | None:
    return None if value is None else value * 1e-3


def rounded(value: Any) -> Any:
    """Plain values with every float cut to four decimals."""
    if isinstance(value, float):
        return round(value, _DECIMALS)
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return value


def append_log(path: Path, record: Record) -> None:
    """Add a line to a log."""
    with path.open("a") as log:
        log.write(json.dumps(record.to_dict()) + "\n")


def read_log(path: Path) -> list[Record]:
    """Read a log's measurements, in order.

    A line with ``config`` is of a configuration that was tried, not of the one that calls get: it is passed over.

    Raises
    ------
    ValueError
        On a line that is no measurement, with its number.
    """
    records = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            if not fields.get("config"):
                records.append(Record.from_dict(fields))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}:{number} is not a measurement: {type(error).__name__}: {error}") from error
    return records


def latest(records: Iterable[Record]) -> list[Record]:
    """Of measurements of the same case, device and mode, keep the last one, in the order of their first."""
    kept: dict[object, Record] = {}
    for record in records:
        context = record.context
        kept[context.spec.name, context.gpu, context.timing.flush, context.timing.graph, record.case] = record
    return list(kept.values())
