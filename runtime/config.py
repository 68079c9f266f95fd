"""What a module is tuned by: constants of its kernels that change no result. Standard library only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tilemla.spec import KernelSpec

_LOADS_AHEAD = (4, 8, 16, 32)
_MOST_GROUPS_LEFT = 3
_INT32_MAX = 2**31 - 1
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
        H100 where a call is over before the cache is full, as other data can stay. Where it streams for long that costs
        3%.
    groups_left_at_handover : int
        P of a block is announced when this many wgmma groups of the next block's scores are still to come. The tensor
        cores then have P V of a block to work on while the score warpgroup is in the softmax of the next.
    full_grid : int
        Rows of a batch from which on the combine kernel gives a row a warp, not a CTA: launching CTAs would become the
        cost.
    loads_ahead : int
        16-byte loads of a combine kernel's lane that are under way at once: a serial loop would wait for L2 at each.
    """

    short_piece: int = 16
    groups_left_at_handover: int = 1
    full_grid: int = 4096
    loads_ahead: int = 16

    @property
    def name(self) -> str:
        """``"default"``, or the fields that differ from the default, such as ``"short_piece8-loads_ahead32"``."""
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
        if not 0 <= self.groups_left_at_handover <= _MOST_GROUPS_LEFT:
            return f"groups_left_at_handover must be 0 to {_MOST_GROUPS_LEFT}, got {self.groups_left_at_handover}"
        if not 0 <= self.full_grid <= _INT32_MAX:
            return f"full_grid must be 0 to {_INT32_MAX}, got {self.full_grid}"
        if self.loads_ahead not in _LOADS_AHEAD:
            return f"loads_ahead must be one of {', '.join(map(str, _LOADS_AHEAD))}, got {self.loads_ahead}"
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
