"""Measure: ours and the peers in turn, so that what changes within a run changes for all."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Sequence
from typing import Protocol

import torch

import tilemla
from tilemla.bench.cases import HEAD_DIM_QK, HEAD_DIM_V, PAGE_BLOCK_SIZE, GridCase
from tilemla.bench.inputs import make_inputs
from tilemla.bench.peers import OURS, Decode, Implementation, describe
from tilemla.bench.record import PeerTime, Record, RunContext, TimingMode
from tilemla.bench.timing import Call, Timer, measure_ceilings
from tilemla.launch import kernels_for
from tilemla.loader import load_module

# Two results that are each within 5e-6 of the right one, FlashMLA's bound, are within 2e-5 of each other. Heads that
# are mixed up make 1e-4 and more, a wrong page or a lost split far more.
_COSINE_TOLERANCE = 5e-5


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


def measure(
    case: GridCase,
    context: RunContext,
    peers: Sequence[Implementation],
    clock: Clock,
    device: torch.device,
    case_list: str = "",
) -> Record:
    """Time ours and the peers in turn, in the other order every second round.

    Parameters
    ----------
    case : GridCase
        What to time.
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

    Returns
    -------
    Record
        Medians over the rounds; a ratio is the median of the ratios of the rounds.
    """
    inputs = make_inputs(case, device, poison=False)
    ours = OURS.prepare(case, inputs)
    expected, _ = ours()
    decodes: dict[str, Decode] = {OURS.name: ours}
    calls: dict[str, Call] = {OURS.name: clock.ready(ours)}
    failures: dict[str, str] = {}
    for peer in peers:
        try:
            decode = peer.prepare(case, inputs)
            check_agreement(decode()[0], expected)
            calls[peer.name] = clock.ready(decode)
            decodes[peer.name] = decode
        except Exception as error:  # a peer need not serve every case, and must not end the run
            failures[peer.name] = describe(error)
    del expected

    times_us: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(context.timing.rounds):
        for name in calls if number % 2 == 0 else reversed(calls):
            times_us[name].append(clock.time_us(calls[name]))
    # A replay's time on the host says nothing of the call that was captured.
    host = {name: None if context.timing.graph else clock.host_time_us(decode) for name, decode in decodes.items()}

    our_times = times_us.pop(OURS.name)
    return Record(
        context=context,
        case=case,
        time_us=statistics.median(our_times),
        host_time_us=host[OURS.name],
        peers=tuple(
            PeerTime(
                name=name,
                time_us=statistics.median(times),
                over_ours=statistics.median(theirs / our for theirs, our in zip(times, our_times, strict=True)),
                host_time_us=host[name],
            )
            for name, times in times_us.items()
        ),
        failures=failures,
        case_list=case_list,
    )


def check_agreement(out: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise ValueError unless a peer computed what we did: a fast wrong answer is no time to compare with."""
    if out.shape != expected.shape:
        raise ValueError(f"the result has shape {tuple(out.shape)}, ours {tuple(expected.shape)}")
    theirs, ours = out.float(), expected.float()
    difference = 1 - float(2 * (theirs * ours).sum() / (theirs.square().sum() + ours.square().sum()).clamp(min=1e-30))
    if not difference < _COSINE_TOLERANCE:  # also when it is NaN
        raise ValueError(f"the result differs from ours by a cosine difference of {difference:.1e}")
