"""Measure: ours and the peers in turn, so that what changes within a run changes for all."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

import tilemla
from tilemla.bench.cases import HEAD_DIM_QK, HEAD_DIM_V, PAGE_BLOCK_SIZE, GridCase
from tilemla.bench.further import Case, FurtherCase
from tilemla.bench.further_calls import Exact, make_further_inputs
from tilemla.bench.inputs import GridInputs, make_inputs
from tilemla.bench.peers import OURS, Decode, FlashMLA, Implementation, describe
from tilemla.bench.reading import PageReader
from tilemla.bench.record import PeerTime, Record, Reference, RunContext, TimingMode
from tilemla.bench.timing import Call, Timer, measure_ceilings
from tilemla.launch import kernels_for
from tilemla.loader import load_module

# Two results that are each within 5e-6 of the right one, FlashMLA's bound, are within 2e-5 of each other. Heads that
# are mixed up make 1e-4 and more, a wrong page or a lost split far more.
_COSINE_TOLERANCE = 5e-5

# What is timed in turn with ours and is no peer, beside whose names these are no names.
_READ_ONLY, _EVEN = "(read only)", "(even)"


class Clock(Protocol):
    """What ``measure`` needs of a ``Timer``."""

    def ready(self, call: Call) -> Call:
        """As ``Timer.ready``."""

    def time_us(self, call: Call) -> float:
        """As ``Timer.time_us``."""

    def host_time_us(self, call: Call) -> float | None:
        """As ``Timer.host_time_us``."""


def make_context(timer: Timer, rounds: int, dtype: str, peers: Sequence[Implementation]) -> RunContext:
    """Load the module that is to be timed, measure the ceilings, and note what this is measured with.

    Raises
    ------
    NotImplementedError
        When no kernel serves the device, or its module is not built and cannot be.
    """
    device = timer.device
    spec = kernels_for(device, getattr(torch, dtype), HEAD_DIM_QK, HEAD_DIM_V, PAGE_BLOCK_SIZE).spec
    versions = {
        "tilemla": tilemla.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "fingerprint": load_module(spec).manifest.fingerprint,
    }
    versions |= {peer.name: peer.version for peer in peers}
    ceilings = measure_ceilings(device)
    return RunContext(
        spec=spec,
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        versions=versions,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        read_bandwidth_gbs=ceilings.read_bandwidth_gbs,
        matmul_tflops=ceilings.matmul_tflops,
        timing=TimingMode(timer.flush, timer.graph, rounds, timer.rep_ms),
    )


def with_mode(context: RunContext, timer: Timer) -> RunContext:
    """The context of a run for what another of its timers measures."""
    return dataclasses.replace(
        context, timing=dataclasses.replace(context.timing, flush=timer.flush, graph=timer.graph)
    )


def measure(
    case: Case,
    context: RunContext,
    peers: Sequence[Implementation],
    clock: Clock,
    device: torch.device,
    case_list: str = "",
    *,
    reader: PageReader | None = None,
    with_even: bool = False,
    with_planning: bool = False,
) -> Record:
    """Time ours, the peers and the references in turn, which nobody begins or ends more often than others.

    Parameters
    ----------
    case : GridCase or FurtherCase
        What to time; of the latter errors are found out, too.
    context : RunContext
        Says how many rounds, and goes into the record.
    peers : sequence of Implementation
        One that fails, or whose result is not ours, gets no time but a reason.
    clock : Clock
        A ``Timer`` for ``device``.
    device : torch.device
        Where the inputs are made.
    case_list : str
        Goes into the record.
    reader : PageReader, optional
        Timed where memory bounds a case of dense decode.
    with_even : bool
        Also time ours with the same tokens spread evenly, of dense decode.
    with_planning : bool
        Also time ``get_mla_metadata``, of ours and of peers that have it, for dense decode.

    Returns
    -------
    Record
        Medians over the rounds; a ratio is the median of the ratios of the rounds.
    """
    grid = case if isinstance(case, GridCase) else None
    prepare, error_of, inputs = _prepare(case, device)
    ours = prepare(OURS)
    expected, _ = ours()
    errors = {OURS.name: error_of(expected)}
    decodes: dict[str, Decode] = {OURS.name: ours}
    calls: dict[str, Call] = {OURS.name: clock.ready(ours)}
    if isinstance(case, FurtherCase):
        context = dataclasses.replace(context, spec=case.spec(context.spec.arch))
    if grid is not None and inputs is not None and reader is not None and context.is_memory_bound(case):
        calls[_READ_ONLY] = clock.ready(reader.prepare(grid, inputs))
    if grid is not None and with_even:
        even = grid.spread_evenly()
        calls[_EVEN] = clock.ready(OURS.prepare(even, make_inputs(even, device, poison=False)))
    failures: dict[str, str] = {}
    for peer in peers:
        try:
            decode = prepare(peer)
            out, _ = decode()
            errors[peer.name] = error_of(out)
            check_agreement(out, expected, case.agreement if isinstance(case, FurtherCase) else _COSINE_TOLERANCE)
            calls[peer.name] = clock.ready(decode)
            decodes[peer.name] = decode
        except Exception as error:  # a peer need not serve every case, and must not end the run
            failures[peer.name] = describe(error)
    del expected

    times_us: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(context.timing.rounds):
        for name in _turn(list(calls), number):
            times_us[name].append(clock.time_us(calls[name]))
    # A replay's time on the host says nothing of the call that was captured.
    host = {name: None if context.timing.graph else clock.host_time_us(decode) for name, decode in decodes.items()}

    planning_us: dict[str, float] = {}
    if grid is not None and inputs is not None and with_planning:
        planners = [OURS, *(peer for peer in peers if peer.name in decodes)]
        planning_us = _time_planning(planners, grid, inputs, clock)

    our_times = times_us[OURS.name]

    def compare(name: str) -> Reference:
        times = times_us[name]
        ratios = [theirs / our for theirs, our in zip(times, our_times, strict=True)]
        return Reference(statistics.median(times), statistics.median(ratios))

    return Record(
        context=context,
        case=case,
        time_us=statistics.median(our_times),
        host_time_us=host[OURS.name],
        peers=tuple(
            PeerTime(
                name,
                *compare(name),
                host_time_us=host[name],
                planning_us=planning_us.get(name),
                error=errors[name],
            )
            for name in decodes
            if name != OURS.name
        ),
        failures=failures,
        case_list=case_list,
        read_only=compare(_READ_ONLY) if _READ_ONLY in times_us else None,
        even=compare(_EVEN) if _EVEN in times_us else None,
        planning_us=planning_us.get(OURS.name),
        error=errors[OURS.name],
    )


def _turn(names: list[str], number: int) -> list[str]:
    """The order of a round: the other way round every second one, and from the next name on after every two.

    What ran before a call shows in its time, by heat and by power, and between two rounds the same one runs twice.
    """
    first = number // 2 % len(names)
    turn = names[first:] + names[:first]
    return turn if number % 2 == 0 else turn[::-1]


def _prepare(
    case: Case, device: torch.device
) -> tuple[Callable[[Implementation], Decode], Callable[[torch.Tensor], float | None], GridInputs | None]:
    """How an implementation gets ready for a case, the error of a result where one is found out, and dense inputs."""
    if isinstance(case, FurtherCase):
        further = make_further_inputs(case, device)
        error_of = Exact(case, further).error_of
        return lambda implementation: implementation.prepare_further(case, further), error_of, None
    inputs = make_inputs(case, device, poison=False)
    return lambda implementation: implementation.prepare(case, inputs), lambda _out: None, inputs


def _time_planning(
    implementations: Sequence[Implementation], case: GridCase, inputs: GridInputs, clock: Clock
) -> dict[str, float]:
    """Median times of ``get_mla_metadata``, by name of the implementations that have it."""
    times_us = {}
    for implementation in implementations:
        if isinstance(implementation, FlashMLA):
            plan = functools.partial(implementation.make_schedule, case, inputs)
            times_us[implementation.name] = clock.time_us(clock.ready(plan))
    return times_us


def check_agreement(out: torch.Tensor, expected: torch.Tensor, tolerance: float = _COSINE_TOLERANCE) -> None:
    """Raise ValueError unless a peer computed what we did: a fast wrong answer is no time to compare with."""
    if out.shape != expected.shape:
        raise ValueError(f"the result has shape {tuple(out.shape)}, ours {tuple(expected.shape)}")
    theirs, ours = out.float(), expected.float()
    difference = 1 - float(2 * (theirs * ours).sum() / (theirs.square().sum() + ours.square().sum()).clamp(min=1e-30))
    if not difference < tolerance:  # also when it is NaN
        raise ValueError(f"the result differs from ours by a cosine difference of {difference:.1e}")
