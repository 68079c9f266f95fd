"""Small tensors that kernels are given in place of arguments which were left out."""

from __future__ import annotations

import functools

import torch

from tilemla.streams import is_capturing


def constant(device: torch.device, count: int, value: float, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """A tensor of equal elements, (count,), that nobody may write to.

    It is kept for good, since a CUDA graph may know its address; one that a graph's memory holds is not kept.
    """
    make = _make_constant.__wrapped__ if device.type == "cuda" and is_capturing() else _make_constant
    return make(device, count, value, dtype)


@functools.cache
def _make_constant(device: torch.device, count: int, value: float, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((count,), value, dtype=dtype, device=device)


@functools.lru_cache(maxsize=64)
def no_sink(device: torch.device) -> torch.Tensor:
    """What kernels are given in place of sinks that there are none of; never read."""
    return torch.empty((1,), dtype=torch.float32, device=device)
