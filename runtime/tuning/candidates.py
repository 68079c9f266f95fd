"""What is tried: configurations of a module and costs of a schedule, each valid by its one predicate."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

from tilemla.config import DEFAULT_CONFIG, TUNABLE_ARCHS, KernelConfig
from tilemla.costs import ScheduleCosts
from tilemla.spec import KernelSpec

# Values that are tried, each by itself, beside the default's of all other fields: a build takes half a minute.
CONFIG_VALUES: dict[str, tuple[int, ...]] = {
    "short_piece": (0, 8, 32, 64, 2**20),
    "evict_normal_blocks": (0, 8, 32, 2**20),
    "groups_left_at_handover": (0, 2),
    "full_grid": (1024, 16384),
    "splits_ahead": (2, 4),
}
# Values that are tried with each other: costs are arguments of a call, and most lead to a schedule that others lead to.
COST_VALUES: dict[str, tuple[int, ...]] = {
    "overhead": (1, 2, 3, 5, 8),
    "combine_eighths": (0, 16, 32, 64, 128),
    "piece_64ths": (0, 2, 4, 8, 16, 32, 64),
    "crowded_eighths": (0, 9),
}
CONFIG_FIELDS = tuple(field.name for field in dataclasses.fields(KernelConfig))


def parse_parameters(texts: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Read ``NAME=V1,V2``, the values that a field is to be tried with.

    Raises
    ------
    ValueError
        On a name that is no field, a value that is no integer, and a field that is given twice.
    """
    values: dict[str, tuple[int, ...]] = {}
    known = (*CONFIG_FIELDS, *ScheduleCosts._fields)
    for text in texts:
        name, _, listed = text.partition("=")
        if name not in known:
            raise ValueError(f"{text!r} must be NAME=V1,V2 with NAME one of {', '.join(known)}")
        if name in values:
            raise ValueError(f"{name} was given twice; list its values as {name}=V1,V2")
        try:
            values[name] = tuple(dict.fromkeys(int(value) for value in listed.split(",")))
        except ValueError:
            raise ValueError(f"{text!r} must list integers, such as {name}=1,2") from None
    return values


def list_configs(spec: KernelSpec, values: Mapping[str, Sequence[int]] | None = None) -> list[KernelConfig]:
    """The configurations to try for a spec, the default first.

    Parameters
    ----------
    spec : KernelSpec
        The kernel.
    values : mapping of str to sequence of int, optional
        Fields and their values, which are tried with each other; those that are no fields of ``KernelConfig`` do not
        count. Without any, the values of ``CONFIG_VALUES``, one field at a time.

    Raises
    ------
    ValueError
        On a configuration that is not valid for the spec.
    """
    asked = {name: list(listed) for name, listed in (values or {}).items() if name in CONFIG_FIELDS}
    if asked:
        products = itertools.product(*asked.values())
        tried = [dataclasses.replace(DEFAULT_CONFIG, **dict(zip(asked, each, strict=True))) for each in products]
    elif values is None and spec.arch in TUNABLE_ARCHS:
        tried = [
            dataclasses.replace(DEFAULT_CONFIG, **{name: value})
            for name, listed in CONFIG_VALUES.items()
            for value in listed
        ]
    else:
        tried = []
    for config in tried:
        reason = config.why_invalid(spec)
        if reason is not None:
            raise ValueError(f"{spec.name}: {reason}")
    return list(dict.fromkeys([DEFAULT_CONFIG, *tried]))


def list_costs(values: Mapping[str, Sequence[int]] | None = None) -> list[ScheduleCosts]:
    """The costs to try, apart from the formula's.

    Parameters
    ----------
    values : mapping of str to sequence of int, optional
        Fields and their values, in place of those of ``COST_VALUES``; those that are no fields of ``ScheduleCosts`` do
        not count. Where it has no such field at all, no costs are tried.

    Raises
    ------
    ValueError
        On costs that are not valid.
    """
    asked = {name: listed for name, listed in (values or {}).items() if name in ScheduleCosts._fields}
    if values is not None and not asked:
        return []
    tried = [ScheduleCosts(*each) for each in itertools.product(*(COST_VALUES | asked).values())]
    for costs in tried:
        reason = costs.why_invalid()
        if reason is not None:
            raise ValueError(reason)
    return tried
