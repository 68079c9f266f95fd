"""Memory for results, from torch's own allocator, past its dispatcher where torch has such a way.

What comes from it is like any other tensor of torch: ``record_stream``, memory pools and graph capture see it. Tensors
made by a module through TVM-FFI would not be: torch holds them as foreign memory, and ``record_stream`` ignores them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Allocate = Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor]

# What the code that torch generates calls, in a third of the time of the public functions.
_empty_strided_cuda: Allocate | None = getattr(
    getattr(getattr(torch._C, "_dynamo", None), "guards", None), "_empty_strided_cuda", None
)


def allocator_for(device: torch.device) -> Allocate:
    """A function of shape, strides and dtype that makes an uninitialised tensor.

    Parameters
    ----------
    device : torch.device
        Where; a CUDA device must be the current one when the function is called.
    """
    if device.type == "cuda" and _empty_strided_cuda is not None:
        return _empty_strided_cuda
    return lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device=device)


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor, in elements."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides))
