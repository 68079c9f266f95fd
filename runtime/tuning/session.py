"""A run of the tuner for one kernel: what was built is opened, timed, logged, and the table chosen."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

import tilemla
from tilemla.bench.cases import GridCase
from tilemla.bench.record import TimingMode
from tilemla.bench.run import Clock
from tilemla.config import DEFAULT_CONFIG, KernelConfig
from tilemla.costs import ScheduleCosts
from tilemla.launch import gpu_name_of
from tilemla.loader import LoadedModule, open_module
from tilemla.manifest import Manifest
from tilemla.spec import KernelSpec
from tilemla.store import Entry
from tilemla.tuning.choose import choose
from tilemla.tuning.measure import try_configs, try_costs
from tilemla.tuning.table import Table
from tilemla.tuning.trial import Run, Trial, append_trial, read_trials

Cases = Sequence[tuple[str, GridCase]]
OnTurn = Callable[[list[Trial]], None]


class TuneError(RuntimeError):
    """A run that cannot go on; says what to do."""


def make_run(manifest: Manifest, device: torch.device, timing: TimingMode) -> Run:
    """What the trials of a run share.

    Parameters
    ----------
    manifest : Manifest
        Of any of the modules that are timed.
    device : torch.device
        Where.
    timing : TimingMode
        How times are taken.
    """
    return Run(
        spec=KernelSpec.from_dict(manifest.spec),
        gpu=gpu_name_of(device),
        versions={
            "tilemla": tilemla.__version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "fingerprint": manifest.fingerprint,
            **manifest.tools,
        },
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        timing=timing,
    )


def tune_kernel(
    run: Run,
    entries: Mapping[KernelConfig, Entry],
    failures: Mapping[KernelConfig, str],
    costs: Sequence[ScheduleCosts],
    cases: Cases,
    log: Path,
    device: torch.device,
    clock: Clock,
    on_turn: OnTurn,
) -> Table:
    """Try configurations, then, with the best of them, costs; every trial goes into the log as soon as it is there.

    Parameters
    ----------
    run : Run
        What the trials share.
    entries : mapping of KernelConfig to Entry
        The modules, the default's among them.
    failures : mapping of KernelConfig to str
        Why others are missing.
    costs : sequence of ScheduleCosts
        What to try beside the formula's; nothing leaves the second half out.
    cases : sequence of (str, GridCase)
        What is timed, each with the list that it is of.
    log : Path
        The log; other runs may be in it.
    device : torch.device
        Where.
    clock : Clock
        A ``Timer`` for the device.
    on_turn : callable
        Told the trials of each turn.

    Returns
    -------
    Table
        What the whole log says.

    Raises
    ------
    TuneError
        When the default's module is missing, or costs are to be tried with a configuration whose module is.
    """
    if DEFAULT_CONFIG not in entries:
        raise TuneError(f"the default of {run.spec.name} is missing: {failures.get(DEFAULT_CONFIG, 'not built')}")
    for config, reason in failures.items():
        append_trial(log, Trial(run, "config", "candidate", config, failure=reason))
    modules: dict[KernelConfig, LoadedModule] = {DEFAULT_CONFIG: open_module(entries[DEFAULT_CONFIG])}
    modules |= {config: open_module(entry) for config, entry in entries.items() if config != DEFAULT_CONFIG}

    def add(trials: list[Trial]) -> None:
        for trial in trials:
            append_trial(log, trial)
        on_turn(trials)

    if len(modules) > 1:
        for case_list, case in cases:
            add(try_configs(run, modules, case, case_list, device, clock))
    if costs:
        config = _config_so_far(run, log)
        if config not in modules:
            named = " ".join(f"--param {name}={value}" for name, value in config.changes().items())
            raise TuneError(
                f"{log} chose the configuration {config.name}, with which costs are to be tried, but this run has no "
                f"module of it; add {named}"
            )
        for case_list, case in cases:
            add(try_costs(run, config, modules[config], costs, case, case_list, device, clock))
    return choose(read_trials(log), log.name)


def _config_so_far(run: Run, log: Path) -> KernelConfig:
    """What the log says is best, of trials with this run's versions."""
    trials = [trial for trial in read_trials(log) if trial.run.versions == run.versions] if log.exists() else []
    return choose(trials, log.name).config if any(trial.times_us for trial in trials) else DEFAULT_CONFIG
