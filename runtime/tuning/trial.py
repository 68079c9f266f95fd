"""One trial, and the log that every trial is added to; the fields are described in tuning_logs/README.md."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tilemla.bench.cases import GridCase
from tilemla.bench.record import TimingMode, grid_case_of, rounded, shape_fields
from tilemla.config import KernelConfig
from tilemla.costs import ScheduleCosts
from tilemla.log import logger
from tilemla.manifest import Manifest
from tilemla.spec import KernelSpec

Stage = Literal["config", "costs"]
Role = Literal["default", "again", "candidate"]


class Resources(NamedTuple):
    """What the decode kernel takes: registers of a thread, bytes spilled by one, shared memory of a CTA."""

    registers: int
    spill_bytes: int
    smem_bytes: int

    @classmethod
    def of(cls, manifest: Manifest) -> Resources | None:
        """Those of a module's heaviest kernel; None for a CPU module."""
        heaviest = max(manifest.kernels, key=lambda kernel: kernel.smem_bytes, default=None)
        if heaviest is None:
            return None
        spills = sum(kernel.spill_store_bytes + kernel.spill_load_bytes for kernel in manifest.kernels)
        return cls(heaviest.registers, spills, heaviest.smem_bytes)


@dataclasses.dataclass(frozen=True)
class Run:
    """What all trials of a run share.

    Parameters
    ----------
    spec : KernelSpec
        The kernel that is tuned.
    gpu : str
        The device's name; ``"cpu"`` for a CPU.
    versions : dict of str to str or None
        Of tilemla, torch, CUDA and the tools that built the modules, and the fingerprint of their sources.
    date : str
        When the run began, ISO 8601; tells runs apart.
    timing : TimingMode
        How times were taken.
    """

    spec: KernelSpec
    gpu: str
    versions: dict[str, str | None]
    date: str
    timing: TimingMode


@dataclasses.dataclass(frozen=True)
class Trial:
    """A configuration, timed in turn with the others of its run, stage and case, or why it was not.

    Parameters
    ----------
    run : Run
        The run that it belongs to.
    stage : "config" or "costs"
        What differs between those that were timed in turn.
    role : "default", "again" or "candidate"
        The default is timed at both ends of a turn: what differs between the two is noise.
    config : KernelConfig
        What the module is tuned by.
    costs : tuple of ScheduleCosts
        All costs that lead to the schedule that was timed, the formula's first; empty where nothing was.
    case : GridCase or None
        What was timed; None for a module that could not be built.
    case_list : str
        The list that the case is of.
    num_sm_parts : int
        Parts of the schedule that was timed; 0 where nothing was.
    times_us : tuple of float
        The time in each round, in microseconds; empty where it failed.
    failure : str
        Why there is no time; empty where there is.
    resources : Resources or None
        None for a CPU module, and one that could not be built.
    """

    run: Run
    stage: Stage
    role: Role
    config: KernelConfig
    costs: tuple[ScheduleCosts, ...] = ()
    case: GridCase | None = None
    case_list: str = ""
    num_sm_parts: int = 0
    times_us: tuple[float, ...] = ()
    failure: str = ""
    resources: Resources | None = None

    @property
    def time_us(self) -> float | None:
        """Median over the rounds; None where it failed."""
        return statistics.median(self.times_us) if self.times_us else None

    def to_dict(self) -> dict[str, Any]:
        """The fields of a line of a log, as plain values."""
        run, case, time_us = self.run, self.case, self.time_us
        rates: dict[str, float | None] = {"bandwidth_gbs": None, "tflops": None}
        if case is not None and time_us is not None:
            rates = {"bandwidth_gbs": case.num_bytes / time_us * 1e-3, "tflops": case.flop / time_us * 1e-6}
        fields: dict[str, Any] = {
            "spec": run.spec.to_dict(),
            "stage": self.stage,
            "role": self.role,
            "config": self.config.to_dict(),
            "costs": [list(each) for each in self.costs],
            "case_list": self.case_list,
            "shape": None if case is None else shape_fields(case),
            "num_sm_parts": self.num_sm_parts,
            "time_us": time_us,
            "times_us": list(self.times_us),
            **rates,
            "failure": self.failure or None,
            **(self.resources._asdict() if self.resources else dict.fromkeys(Resources._fields)),
            "gpu": run.gpu,
            "versions": run.versions,
            "date": run.date,
            "timing": dataclasses.asdict(run.timing),
        }
        result: dict[str, Any] = rounded(fields)
        return result

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Trial:
        """Make a trial of what ``to_dict`` gave, now or when a configuration had other fields.

        Raises
        ------
        ValueError, KeyError, TypeError
            When the fields are not those of a trial.
        """
        spec = KernelSpec.from_dict(fields["spec"])
        if fields["stage"] not in ("config", "costs") or fields["role"] not in ("default", "again", "candidate"):
            raise ValueError(f"no trial has stage {fields['stage']!r} and role {fields['role']!r}")
        # Lines of other versions are history, and must not end the reading of a log.
        kept = [field.name for field in dataclasses.fields(KernelConfig) if field.name in fields["config"]]
        run = Run(
            spec=spec,
            gpu=fields["gpu"],
            versions=dict(fields["versions"]),
            date=fields["date"],
            timing=TimingMode(**fields["timing"]),
        )
        return cls(
            run=run,
            stage=fields["stage"],
            role=fields["role"],
            config=KernelConfig.from_dict({name: fields["config"][name] for name in kept}),
            costs=tuple(_costs_of(*each) for each in fields["costs"]),
            case=None if fields["shape"] is None else grid_case_of(fields["shape"], spec.dtype),
            case_list=fields["case_list"],
            num_sm_parts=fields["num_sm_parts"],
            times_us=tuple(fields["times_us"]),
            failure=fields["failure"] or "",
            resources=(
                None
                if fields["registers"] is None
                else Resources(fields["registers"], fields["spill_bytes"], fields["smem_bytes"])
            ),
        )


def append_trial(path: Path, trial: Trial) -> None:
    """Add a line to a log, whole and on the disk, whoever else is adding lines.

    What a process left that was killed while it wrote, the beginning of a line, is taken away first.
    """
    line = (json.dumps(trial.to_dict(), separators=(",", ":")) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b", buffering=0) as log:
        fcntl.flock(log, fcntl.LOCK_EX)  # until the file is closed
        _mend_end(log, path)
        while line:
            line = line[log.write(line) :]
        os.fsync(log.fileno())


def _mend_end(log: Any, path: Path) -> None:
    size = log.seek(0, os.SEEK_END)
    if size == 0:
        return
    log.seek(size - 1)
    if log.read(1) == b"\n":
        return
    log.seek(0)
    content = log.read()
    begin = content.rfind(b"\n") + 1
    if _is_whole(content[begin:]):
        log.write(b"\n")
    else:
        logger().warning("%s: its last line was never finished and is taken away", path)
        log.truncate(begin)


def _costs_of(overhead: int, combine_eighths: int, piece: int, crowded_eighths: int | None = None) -> ScheduleCosts:
    """What a line holds of costs. Three are older: a piece's are eighths there, and crowding cost nothing."""
    if crowded_eighths is None:
        return ScheduleCosts(overhead, combine_eighths, 8 * piece, 0)
    return ScheduleCosts(overhead, combine_eighths, piece, crowded_eighths)


def _is_whole(line: bytes | str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False  # no beginning of an object is JSON
    return True


def read_trials(path: Path) -> list[Trial]:
    """Read a log's trials; the first one is that of line 1. A last line that was never finished does not count.

    Raises
    ------
    ValueError
        On a line that is no trial, with its number.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    tail = lines.pop()
    if tail and _is_whole(tail):
        lines.append(tail)
    elif tail:
        logger().warning("%s: its last line was never finished and is passed over", path)
    trials = []
    for number, line in enumerate(lines, 1):
        try:
            trials.append(Trial.from_dict(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}:{number} is not a trial: {type(error).__name__}: {error}") from error
    return trials
