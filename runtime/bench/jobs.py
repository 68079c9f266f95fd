"""What a run measures, one after the other: cases, each with its mode and what is timed beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

from tilemla.bench.cases import CASE_LISTS, GridCase, select_cases
from tilemla.bench.further import Case, further_cases

# A list of lists: everything that the targets of `targets` are about, in one run.
TARGETS = "targets"
_FURTHER = "further"
JOB_LISTS = (*CASE_LISTS, _FURTHER, TARGETS)

# The list of which `get_mla_metadata` is timed, too.
_PLANNING = "planning"


@dataclasses.dataclass(frozen=True)
class Job:
    """One case, and how it is measured.

    Parameters
    ----------
    case_list : str
        The list that the case is of.
    case : GridCase or FurtherCase
        What is timed.
    flush : "dirty" or "clean"
        How L2 is flushed on a GPU, as of ``timing.Timer``.
    graph : bool
        Time the replay of a CUDA graph.
    with_even : bool
        Time the case with its tokens spread evenly, too.
    """

    case_list: str
    case: Case
    flush: Literal["dirty", "clean"] = "dirty"
    graph: bool = False
    with_even: bool = False

    @property
    def with_planning(self) -> bool:
        """Whether ``get_mla_metadata`` is timed, too."""
        return self.case_list == _PLANNING


def plan_jobs(
    names: Sequence[str],
    *,
    dtype: str = "bfloat16",
    match: str = "",
    flush: Literal["dirty", "clean"] = "dirty",
    graph: bool = False,
) -> list[Job]:
    """The jobs of some lists.

    Parameters
    ----------
    names : sequence of str
        Keys of ``CASE_LISTS``, and ``"further"``; or ``"targets"`` alone, whose jobs have modes of their own.
    dtype : str
        The dtype that every case gets.
    match : str
        Keep the cases whose text contains this.
    flush, graph
        The mode of every job of these.

    Raises
    ------
    ValueError
        On ``"targets"`` beside another list, and on a case that has no kernel for the dtype.
    """
    if TARGETS not in names:
        jobs: list[Job] = []
        for name in names:
            if name == _FURTHER:
                further = (dataclasses.replace(case, dtype=dtype) for case in further_cases())
                jobs += [Job(name, case, flush, graph) for case in further if match in str(case)]
            else:
                selected = select_cases([name], dtype=dtype, match=match)
                jobs += [Job(name, case, flush, graph) for _, case in selected]
        return jobs
    if len(set(names)) > 1:
        raise ValueError(f"{TARGETS} is made of other lists and stands alone, got {', '.join(names)}")
    of_dtype = (dataclasses.replace(job, case=dataclasses.replace(job.case, dtype=dtype)) for job in _target_jobs())
    return [job for job in of_dtype if match in str(job.case)]


def _target_jobs() -> Iterator[Job]:
    for case in CASE_LISTS["grid"]():
        yield Job("grid", case, with_even=case.is_varied)
    for case in CASE_LISTS["grid"]():
        if is_memory_bound_target(case):
            yield Job("grid", case, flush="clean")
    for name in ("long", "small", "imbalanced", _PLANNING):
        for case in CASE_LISTS[name]():
            yield Job(name, case)
    for case in CASE_LISTS["small"]():
        if is_shortest_target(case):
            yield Job("small", case, graph=True)


def is_memory_bound_target(case: GridCase) -> bool:
    """Whether the targets count the case as bound by memory: few heads, one query, lengths of 8192."""
    return case.num_heads_q <= 64 and case.seq_len_q == 1 and case.mean_length == 8192


def is_shortest_target(case: GridCase) -> bool:
    """Whether it is the case of which launches are the larger part."""
    return (case.batch_size, case.mean_length, case.num_heads_q) == (1, 1024, 16)
