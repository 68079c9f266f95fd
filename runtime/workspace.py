"""Scratch memory of decode calls on a GPU: kept for each stream, taken anew while a CUDA graph is captured.

Calls on one stream run one after the other, so they can share it; the module sees to it that their kernels do not mix.
A graph that is being captured gets memory from its own pool, which eager calls never see: it may be replayed on any
stream, at any time.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

import torch

from tilemla.streams import is_capturing, raw_stream

# The number of splits is rounded up to this, so that a batch that grows by one request does not allocate; to less where
# splits are so large that it would take more than some memory.
_SPLITS_STEP = 128
_STEP_BYTES = 64 << 20


class Workspace:
    """What the split kernel leaves for the combine kernel.

    Parameters
    ----------
    device : torch.device
        A CUDA device, or the CPU.
    max_num_splits : int
        Splits that there is room for.
    num_heads_k, rows, head_dim_v : int
        KV heads, rows of queries that share one, elements of a value.

    Attributes
    ----------
    out_accum : tvm_ffi.Tensor, (max_num_splits, num_heads_k, rows, head_dim_v), float32
        Made by torch, and converted once instead of in each call.
    lse_accum_log2 : tvm_ffi.Tensor, (max_num_splits, num_heads_k, rows), float32
    """

    __slots__ = ("lse_accum_log2", "max_num_splits", "out_accum")

    def __init__(self, device: torch.device, max_num_splits: int, num_heads_k: int, rows: int, head_dim_v: int) -> None:
        import tvm_ffi

        shape = (max_num_splits, num_heads_k, rows)
        self.max_num_splits = max_num_splits
        self.out_accum = tvm_ffi.from_dlpack(torch.empty((*shape, head_dim_v), dtype=torch.float32, device=device))
        self.lse_accum_log2 = tvm_ffi.from_dlpack(torch.empty(shape, dtype=torch.float32, device=device))


# By what shares them, then by stream handle. The inner dictionaries are emptied but never replaced: plans hold them.
_workspaces: dict[Hashable, dict[int, Workspace]] = {}


class Scratch:
    """Where one kind of call takes its workspace from.

    Parameters
    ----------
    owner : Hashable
        What enqueues the kernels: calls of different modules do not wait for each other, so they share nothing.
    device, num_heads_k, rows, head_dim_v
        As for ``Workspace``. A CPU's is made anew each time: there is no stream to order calls by.
    max_num_splits : int
        Splits that there must be room for.
    """

    __slots__ = ("_by_stream", "_device", "_geometry", "_index", "max_num_splits")

    def __init__(
        self,
        owner: Hashable,
        device: torch.device,
        max_num_splits: int,
        num_heads_k: int,
        rows: int,
        head_dim_v: int,
    ) -> None:
        self.max_num_splits = max_num_splits
        self._device = device
        self._index: int | None = device.index if device.type == "cuda" else None
        self._geometry = (num_heads_k, rows, head_dim_v)
        self._by_stream: dict[int, Workspace] = {}
        if self._index is not None:
            self._by_stream = _workspaces.setdefault((owner, device, *self._geometry), self._by_stream)

    def take(self) -> Workspace:
        """Memory for one call on the current stream of the device, which must be the current one."""
        stream = raw_stream(self._index) if self._index is not None else 0
        # The default stream, 0, cannot be captured: the driver need not be asked.
        if self._index is None or (stream and is_capturing()):
            return Workspace(self._device, self.max_num_splits, *self._geometry)
        workspace = self._by_stream.get(stream)
        if workspace is None or workspace.max_num_splits < self.max_num_splits:
            step = min(max(_STEP_BYTES // (4 * math.prod(self._geometry)), 1), _SPLITS_STEP)
            rounded = -(-self.max_num_splits // step) * step
            workspace = self._by_stream[stream] = Workspace(self._device, rounded, *self._geometry)
        return workspace


def release_workspaces() -> None:
    """Give the scratch memory of all streams back to torch's allocator; the next calls take new memory.

    Safe at any time: the allocator hands memory on in the order of the stream that it was used on.
    """
    for by_stream in tuple(_workspaces.values()):
        by_stream.clear()
