"""Time configurations in turn, in one process, through the runtime's own way to a kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from tilemla.bench.cases import HEAD_DIM_V, GridCase
from tilemla.bench.inputs import GridInputs, make_inputs
from tilemla.bench.peers import Decode, describe
from tilemla.bench.run import Clock, check_agreement
from tilemla.bench.timing import Call
from tilemla.config import KernelConfig
from tilemla.costs import ScheduleCosts, formula_costs
from tilemla.launch import Kernels, num_sms_of
from tilemla.loader import LoadedModule
from tilemla.options import DEFAULT_OPTIONS, Traits
from tilemla.plan import DecodePlan
from tilemla.schedule import SchedulePlan, num_sm_parts_for
from tilemla.spec import KernelSpec
from tilemla.tuning.trial import Resources, Run, Trial

_Schedule = tuple[torch.Tensor, torch.Tensor]


class Timed(NamedTuple):
    """What was timed in turn: the default's times at both ends of a turn, the candidates', and who has none."""

    default: tuple[float, ...]
    again: tuple[float, ...]
    times_us: dict[int, tuple[float, ...]]
    failures: dict[int, str]


def _num_sm_parts(case: GridCase, device: torch.device) -> int:
    """Parts of a case's schedule on a device."""
    return num_sm_parts_for(num_sms_of(device), case.rows, case.num_heads_k)


def _formula_costs(case: GridCase, device: torch.device) -> ScheduleCosts:
    """The costs of a case's schedule on a device where none were chosen: what candidates are compared with."""
    return formula_costs(case.rows, case.batch_size, _num_sm_parts(case, device))


def _schedule(module: LoadedModule, case: GridCase, inputs: GridInputs, costs: ScheduleCosts) -> _Schedule:
    num_sm_parts = _num_sm_parts(case, inputs.q.device)
    schedule = module.functions["get_mla_metadata"]
    plan = SchedulePlan(
        inputs.q.device, case.batch_size, num_sm_parts, case.rows, costs=costs, get_mla_metadata=schedule
    )
    return plan.run(inputs.cache_seqlens)


def _make_call(
    spec: KernelSpec, module: LoadedModule, case: GridCase, inputs: GridInputs, schedule: _Schedule
) -> Decode:
    """A decode call of one module that follows a schedule, as ``flash_mla_with_kvcache`` makes it."""
    plan = DecodePlan(
        Kernels.of(spec, module, inputs.q.device),
        inputs.q,
        num_heads_k=case.num_heads_k,
        head_dim_v=HEAD_DIM_V,
        num_sm_parts=schedule[0].shape[0],
        softmax_scale=None,
        traits=Traits.of(DEFAULT_OPTIONS, case.causal, case.seq_len_q),
    )
    return lambda: plan.run(inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens, *schedule)


def time_in_turn(default: Decode, candidates: Sequence[Decode], rounds: int, clock: Clock) -> Timed:
    """Time candidates between two timings of the default, in the other order every second round.

    A candidate that fails, or whose result is not the default's, gets no time but a reason.
    """
    expected, _ = default()
    calls: dict[int, Call] = {}
    failures: dict[int, str] = {}
    for number, candidate in enumerate(candidates):
        try:
            check_agreement(candidate()[0], expected)
            calls[number] = clock.ready(candidate)
        except Exception as error:  # a configuration that does not work is a result, and must not end the run
            failures[number] = describe(error)
    del expected
    ready = clock.ready(default)
    first, again = -1, -2
    order: dict[int, Call] = {first: ready, **calls, again: ready}
    times_us: dict[int, list[float]] = {number: [] for number in order}
    for turn in range(rounds):
        for number in order if turn % 2 == 0 else reversed(order):
            times_us[number].append(clock.time_us(order[number]))
    times = {number: tuple(each) for number, each in times_us.items()}
    return Timed(times.pop(first), times.pop(again), times, failures)


def try_configs(
    run: Run,
    modules: Mapping[KernelConfig, LoadedModule],
    case: GridCase,
    case_list: str,
    device: torch.device,
    clock: Clock,
) -> list[Trial]:
    """Time the modules of several configurations in turn, all with the schedule that the formula's costs lead to.

    Parameters
    ----------
    run : Run
        What the trials belong to.
    modules : mapping of KernelConfig to LoadedModule
        The default's first.
    case, case_list : GridCase, str
        What is timed, and the list that it is of.
    device : torch.device
        Where.
    clock : Clock
        A ``Timer`` for the device.

    Returns
    -------
    list of Trial
        The default's first and last.
    """
    inputs = make_inputs(case, device, poison=False)
    costs = _formula_costs(case, device)
    default = next(iter(modules))
    schedule = _schedule(modules[default], case, inputs, costs)
    calls = [_make_call(run.spec, module, case, inputs, schedule) for module in modules.values()]
    timed = time_in_turn(calls[0], calls[1:], run.timing.rounds, clock)
    trials = [
        Trial(
            run=run,
            stage="config",
            role="candidate",
            config=config,
            costs=(costs,),
            case=case,
            case_list=case_list,
            num_sm_parts=schedule[0].shape[0],
            resources=Resources.of(module.manifest),
        )
        for config, module in modules.items()
    ]
    return _with_times(trials, timed)


def try_costs(
    run: Run,
    config: KernelConfig,
    module: LoadedModule,
    costs: Iterable[ScheduleCosts],
    case: GridCase,
    case_list: str,
    device: torch.device,
    clock: Clock,
) -> list[Trial]:
    """Time the schedules that several costs lead to in turn, all with one module; equal schedules are timed once.

    Parameters
    ----------
    run, case, case_list, device, clock
        As of ``try_configs``.
    config, module : KernelConfig, LoadedModule
        What decodes.
    costs : iterable of ScheduleCosts
        What to try beside the formula's.

    Returns
    -------
    list of Trial
        The formula's first and last.
    """
    inputs = make_inputs(case, device, poison=False)
    schedules: dict[bytes, _Schedule] = {}
    alike: dict[bytes, list[ScheduleCosts]] = {}
    for each in dict.fromkeys((_formula_costs(case, device), *costs)):
        schedule = _schedule(module, case, inputs, each)
        key = b"".join(part.cpu().numpy().tobytes() for part in schedule)
        schedules[key] = schedule
        alike.setdefault(key, []).append(each)
    calls = [_make_call(run.spec, module, case, inputs, schedule) for schedule in schedules.values()]
    timed = time_in_turn(calls[0], calls[1:], run.timing.rounds, clock)
    trials = [
        Trial(
            run=run,
            stage="costs",
            role="candidate",
            config=config,
            costs=tuple(group),
            case=case,
            case_list=case_list,
            num_sm_parts=_num_sm_parts(case, device),
            resources=Resources.of(module.manifest),
        )
        for group in alike.values()
    ]
    return _with_times(trials, timed)


def _with_times(trials: Sequence[Trial], timed: Timed) -> list[Trial]:
    """Trials of what was timed, the default's second timing last: a turn without it was not finished."""
    default, *candidates = trials
    return [
        dataclasses.replace(default, role="default", times_us=timed.default),
        *(
            dataclasses.replace(
                candidate, times_us=timed.times_us.get(number, ()), failure=timed.failures.get(number, "")
            )
            for number, candidate in enumerate(candidates)
        ),
        dataclasses.replace(default, role="again", times_us=timed.again),
    ]
