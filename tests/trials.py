"""Trials that were never run, and a clock that is told what to say, for tests of what becomes of them."""

import dataclasses

from tilemla.bench.cases import GridCase
from tilemla.bench.record import TimingMode
from tilemla.config import DEFAULT_CONFIG
from tilemla.costs import formula_costs
from tilemla.spec import KernelSpec
from tilemla.tuning.trial import Resources, Run, Trial

RUN = Run(
    spec=KernelSpec(),
    gpu="NVIDIA H100 80GB HBM3",
    versions={"tilemla": "0", "torch": "2", "cuda": None, "fingerprint": "f"},
    date="2026-01-01T00:00:00+00:00",
    timing=TimingMode("dirty", rounds=3, rep_ms=20),
)
LATER = dataclasses.replace(RUN, date="2026-01-02T00:00:00+00:00")
DEEP = GridCase(1, 8192, 16, 1)  # of the class part_tile/alone
WHOLE = GridCase(128, 4096, 16, 1)  # of the class part_tile/whole


def trial_of(times_us, case=DEEP, *, stage="config", role="candidate", config=DEFAULT_CONFIG, costs=None, run=RUN):
    return Trial(
        run=run,
        stage=stage,
        role=role,
        config=config,
        costs=(formula_costs(case.rows, case.batch_size, 132),) if costs is None else tuple(costs),
        case=case,
        case_list="tune",
        num_sm_parts=132,
        times_us=tuple(times_us),
        resources=Resources(168, 0, 231_424),
    )


def turn_of(candidates, case=DEEP, *, first=(100.0,) * 3, again=(100.0,) * 3, stage="config", run=RUN, config=None):
    """A turn: the default between its candidates, ``{config or costs: times}``."""
    kept = DEFAULT_CONFIG if config is None else config
    common = dict(case=case, stage=stage, run=run)
    trials = [trial_of(first, role="default", config=kept, **common)]
    for each, times_us in candidates.items():
        given = dict(config=each) if stage == "config" else dict(config=kept, costs=[each])
        trials.append(trial_of(times_us, **given, **common))
    return [*trials, trial_of(again, role="again", config=kept, **common)]


class Clock:
    """Counts what it timed, and says what ``times_us`` says of a call."""

    def __init__(self, times_us):
        self.times_us = times_us
        self.timed = []

    def ready(self, call):
        return call

    def time_us(self, call):
        self.timed.append(call)
        return self.times_us(call)

    def host_time_us(self, call):
        return None
