"""From a log to a table, as a pure function: what is faster than the default by more than noise explains.

What is compared was timed in turn: a ratio is the median over rounds of the default's time over a candidate's in the
same round. The default is timed twice in each round, at both ends of the turn; its time is the geometric mean of the
two, and what the two differ by is what noise looks like. The score of a candidate is the geometric mean of its ratios
over the cases of a class of shapes; for a configuration, over all classes. It must exceed 1 by more than a margin, the
largest of

- one percent, below which a choice is not worth its line,
- the same score computed of the default against itself,
- three standard errors of that, by the median absolute deviation over rounds,

and in no case may it be slower than the default by more than two percent, or three standard errors where that is more.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

from tilemla.bench.cases import GridCase
from tilemla.config import DEFAULT_CONFIG, KernelConfig
from tilemla.costs import SHAPE_CLASSES, ScheduleCosts, shape_class
from tilemla.tuning.table import Choice, Evidence, Table
from tilemla.tuning.trial import Trial

_LEAST_GAIN = 0.01
_MOST_LOSS = 0.02
_STANDARD_ERRORS = 3
# Standard deviation over median absolute deviation of a normal distribution.
_DEVIATION_OF_NORMAL = 1.4826
# Scores that agree to so many decimals are a tie, which goes to the candidate that is nearest to the default.
_TIE_DECIMALS = 3

Candidate = TypeVar("Candidate", bound=Hashable)


class _Sample(NamedTuple):
    """A candidate in one case: logarithm of its ratio, and of the default's to itself with its standard error."""

    log_ratio: float
    bias: float
    error: float
    lines: tuple[int, ...]


_Samples = Mapping[GridCase, _Sample]
_Turn = list[tuple[int, Trial]]  # what was timed in turn, each trial with its line


@dataclasses.dataclass(frozen=True)
class _Verdict(Generic[Candidate]):
    candidate: Candidate
    is_better: bool
    evidence: Evidence


def choose(trials: Sequence[Trial], log: str) -> Table:
    """Choose what is best for one kernel on one GPU.

    Parameters
    ----------
    trials : sequence of Trial
        A whole log. Trials of other versions or timed in another mode than the newest are history: they do not count.
        Of one configuration in one case the newest counts.
    log : str
        File name of the log.

    Raises
    ------
    ValueError
        When the log holds nothing that was timed.
    """
    timed = [trial for trial in trials if trial.times_us]
    if not timed:
        raise ValueError(f"{log}: there is no trial with a time")
    newest = timed[-1]
    turns = _turns(trials, newest)
    config, config_evidence = _choose_config([turn for turn in turns if turn[0][1].stage == "config"])
    return Table(
        spec=newest.run.spec,
        gpu=newest.run.gpu,
        log=log,
        date=newest.run.date,
        versions=newest.run.versions,
        config=config,
        config_evidence=config_evidence,
        costs=_choose_costs([turn for turn in turns if turn[0][1].stage == "costs" and turn[0][1].config == config]),
    )


def _choose_config(turns: Sequence[_Turn]) -> tuple[KernelConfig, Evidence | None]:
    tried: dict[KernelConfig, dict[GridCase, _Sample]] = collections.defaultdict(dict)
    for turn in turns:
        for trial, sample in _compare(turn):
            if trial.case is not None and trial.config != DEFAULT_CONFIG:
                tried[trial.config][trial.case] = sample
    # Every class of shapes weighs the same, and within it every case.
    classes = _by_class(turns)
    weights = {case: 1 / (len(classes) * len(cases)) for cases in classes.values() for case in cases}
    best = _best(tried, weights, lambda config: len(config.changes()), lambda config: config.name)
    if best is None:
        return DEFAULT_CONFIG, None
    return best.candidate if best.is_better else DEFAULT_CONFIG, best.evidence


def _choose_costs(turns: Sequence[_Turn]) -> dict[str, Choice]:
    tried: dict[ScheduleCosts, dict[GridCase, _Sample]] = collections.defaultdict(dict)
    for turn in turns:
        for trial, sample in _compare(turn):
            if trial.case is not None:
                tried |= {costs: tried[costs] | {trial.case: sample} for costs in trial.costs}
    formula = {trial.case: trial.costs[0] for turn in turns for _, trial in turn if trial.role == "default"}
    choices = {}
    for name, cases in _by_class(turns).items():
        near = formula[cases[0]]
        best = _best(tried, dict.fromkeys(cases, 1 / len(cases)), functools.partial(_distance, near), _describe)
        if best is not None:
            choices[name] = Choice(best.candidate if best.is_better else None, best.evidence)
    return choices


def _turns(trials: Sequence[Trial], newest: Trial) -> list[_Turn]:
    """The turns of a log that count, oldest first."""
    turns: dict[object, _Turn] = collections.defaultdict(list)
    run, timing = newest.run, newest.run.timing
    for line, trial in enumerate(trials, 1):
        same_mode = (trial.run.timing.flush, trial.run.timing.graph) == (timing.flush, timing.graph)
        same = (trial.run.spec, trial.run.gpu, trial.run.versions) == (run.spec, run.gpu, run.versions)
        if trial.times_us and same and same_mode:
            key = (trial.run.date, trial.stage, trial.case, trial.config if trial.stage == "costs" else None)
            turns[key].append((line, trial))
    return [turn for turn in turns.values() if {"default", "again"} <= {trial.role for _, trial in turn}]


def _compare(turn: _Turn) -> list[tuple[Trial, _Sample]]:
    """Each candidate of a turn against the default."""
    (first_line, first), (again_line, again) = (
        next(each for each in turn if each[1].role == role) for role in ("default", "again")
    )
    defaults = [(math.log(a), math.log(b)) for a, b in zip(first.times_us, again.times_us, strict=True)]
    differences = [a - b for a, b in defaults]
    bias = statistics.median(differences)
    # As robust as the medians that it is about: now and then a round is disturbed.
    deviation = statistics.median(abs(each - bias) for each in differences) * _DEVIATION_OF_NORMAL
    error = deviation / math.sqrt(len(differences)) if len(differences) > 1 else abs(bias)
    found = [(first, _Sample(0.0, bias, error, (first_line, again_line)))]
    for line, trial in turn:
        if trial.role == "candidate":
            ratios = [(a + b) / 2 - math.log(time) for (a, b), time in zip(defaults, trial.times_us, strict=True)]
            found.append((trial, _Sample(statistics.median(ratios), bias, error, (first_line, line, again_line))))
    return found


def _by_class(turns: Iterable[_Turn]) -> dict[str, list[GridCase]]:
    """The cases that were timed, by class of shapes, in a fixed order."""
    classes: dict[str, set[GridCase]] = {name: set() for name in SHAPE_CLASSES}
    for turn in turns:
        for _, trial in turn:
            if trial.case is not None:
                classes[shape_class(trial.case.rows, trial.case.batch_size, trial.num_sm_parts)].add(trial.case)
    return {name: sorted(cases, key=str) for name, cases in classes.items() if cases}


def _best(
    tried: Mapping[Candidate, _Samples],
    weights: Mapping[GridCase, float],
    distance: Callable[[Candidate], float],
    describe: Callable[[Candidate], str],
) -> _Verdict[Candidate] | None:
    """The best of what was timed in every case; None when nothing was."""
    verdicts = [
        _evaluate(candidate, samples, weights, describe(candidate))
        for candidate, samples in tried.items()
        if weights.keys() <= samples.keys()
    ]
    return min(
        verdicts,
        key=lambda verdict: (
            not verdict.is_better,
            -round(verdict.evidence.over_default, _TIE_DECIMALS),
            distance(verdict.candidate),
        ),
        default=None,
    )


def _evaluate(
    candidate: Candidate, samples: _Samples, weights: Mapping[GridCase, float], name: str
) -> _Verdict[Candidate]:
    kept = {case: samples[case] for case in weights}
    score = math.exp(sum(weights[case] * sample.log_ratio for case, sample in kept.items()))
    bias = abs(sum(weights[case] * sample.bias for case, sample in kept.items()))
    error = math.sqrt(sum((weights[case] * sample.error) ** 2 for case, sample in kept.items()))
    margin = max(_LEAST_GAIN, bias, _STANDARD_ERRORS * error)
    is_slow = any(
        math.exp(sample.log_ratio) < 1 - max(_MOST_LOSS, _STANDARD_ERRORS * sample.error) for sample in kept.values()
    )
    return _Verdict(
        candidate,
        score > 1 + margin and not is_slow,
        Evidence(
            best=name,
            over_default=round(score, 4),
            margin=round(margin, 4),
            worst=round(min(math.exp(sample.log_ratio) for sample in kept.values()), 4),
            num_cases=len(kept),
            lines=_ranges({line for sample in kept.values() for line in sample.lines}),
        ),
    )


def _distance(near: ScheduleCosts, costs: ScheduleCosts) -> float:
    """How far costs are from others, in eighths of a block."""
    differences = [abs(a - b) for a, b in zip(costs, near, strict=True)]
    return 8 * differences[0] + differences[1] + differences[2]


def _describe(costs: ScheduleCosts) -> str:
    return ", ".join(f"{name} {value}" for name, value in costs._asdict().items())


def _ranges(lines: Iterable[int]) -> str:
    """Numbers in words: ``"1-3,7"``."""
    runs: list[list[int]] = []
    for line in sorted(lines):
        if runs and line == runs[-1][1] + 1:
            runs[-1][1] = line
        else:
            runs.append([line, line])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
