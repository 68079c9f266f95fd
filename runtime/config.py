"""What a module is tuned by: constants of its kernels that change nothing but rounding. Standard library only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tilemla.spec import KernelSpec

_SPLITS_AHEAD = (2, 4, 8)  # more spill
_MOST_GROUPS_LEFT = 3
_INT32_MAX = 2**31 - 1
_MOST_BLOCKS = 2**30  # a request has fewer, and a sum of two fits int32
# Architectures whose modules may have another configuration than the default.
TUNABLE_ARCHS = ("sm_90a",)


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """The tunable constants of a module; the defaults are what was best on an H100 before there was a tuner.

    What the register and shared memory budgets fix is not here: three stages and 31 of Q's 36 K steps in registers fill
    both to the last, and a step more spills.

    Parameters
    ----------
    short_piece : int
        Pages of a piece of up to this many blocks are loaded as the first to be evicted from L2: 6 to 9% faster on an
        H100 where a call is over before the cache is full, as other data can stay.
    evict_normal_blocks : int
        So are those of a longer piece but for the first this many blocks of a part. Partial results then stay in L2 for
        the combine kernel: 2.5 to 4% faster on an H200 where lengths vary. The first blocks push out what was written
        before the call; left beside pages that are the first to be evicted, dirty lines cost 3 to 6%.
    groups_left_at_handover : int
        P of a block is announced when this many wgmma groups of the next block's scores are still to come. The tensor
        cores then have P V of a block to work on while the score warpgroup is in the softmax of the next.
    full_grid : int
        Warps of the combine kernel, four to a row, from which on a row gets one: waves of CTAs would become the cost.
    splits_ahead : int
        Splits that a warp of the combine kernel loads at once, since it would else wait for L2 at each, and sums up in
        one piece. Another number rounds results otherwise.
    """

    short_piece: int = 16
    evict_normal_blocks: int = 16
    groups_left_at_handover: int = 1
    full_grid: int = 4096
    splits_ahead: int = 8

    @property
    def name(self) -> str:
        """``"default"``, or the fields that differ from the default, such as ``"short_piece8-splits_ahead4"``."""
        changed = [f"{name}{value}" for name, value in self.changes().items()]
        return "-".join(changed) or "default"

    def changes(self) -> dict[str, int]:
        """The fields that differ from the default."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }

    def why_invalid(self, spec: KernelSpec) -> str | None:
        """The one validity predicate.

        Parameters
        ----------
        spec : KernelSpec
            Of the module.

        Returns
        -------
        str or None
            None when a module can be built so, else the first reason why not, with the received value.
        """
        if spec.arch not in TUNABLE_ARCHS or spec.kernel != "mla_decode":
            changed, what = ", ".join(self.changes()), f"{spec.arch} kernels"
            if spec.kernel != "mla_decode":
                what = f"{spec.kernel} kernels"
            return f"{changed} must be left at the default: {what} are not tuned" if changed else None
        if not 0 <= self.short_piece <= _INT32_MAX:
            return f"short_piece must be 0 to {_INT32_MAX}, got {self.short_piece}"
        if not 0 <= self.evict_normal_blocks <= _MOST_BLOCKS:
            return f"evict_normal_blocks must be 0 to {_MOST_BLOCKS}, got {self.evict_normal_blocks}"
        if not 0 <= self.groups_left_at_handover <= _MOST_GROUPS_LEFT:
            return f"groups_left_at_handover must be 0 to {_MOST_GROUPS_LEFT}, got {self.groups_left_at_handover}"
        if not 0 <= self.full_grid <= _INT32_MAX:
            return f"full_grid must be 0 to {_INT32_MAX}, got {self.full_grid}"
        if self.splits_ahead not in _SPLITS_AHEAD:
            return f"splits_ahead must be one of {', '.join(map(str, _SPLITS_AHEAD))}, got {self.splits_ahead}"
        return None

    def to_dict(self) -> dict[str, int]:
        """The fields as plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> KernelConfig:
        """Make a configuration of what ``to_dict`` gave, now or before it had some of its fields.

        Raises
        ------
        ValueError
            On a field that is unknown or no integer.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name, value in fields.items():
            if name not in known:
                raise ValueError(f"config has no field {name!r}; its fields are {', '.join(known)}")
            if type(value) is not int:
                raise ValueError(f"config field {name} must be int, got {value!r}")
        return cls(**fields)


DEFAULT_CONFIG = KernelConfig()
