"""Scratch memory of decode calls on a GPU: kept for each stream, taken anew while a CUDA graph is captured.

Calls on one stream run one after the other, so they can share it. A graph that is being captured gets memory from its
own pool, which eager calls never see: it may be replayed on any stream, at any time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

# The number of splits is rounded up to this, so that a batch that grows by one request does not allocate.
_SPLITS_STEP = 128


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
    out_accum : Tensor, (max_num_splits, num_heads_k, rows, head_dim_v), float32
    lse_accum_log2 : Tensor, (max_num_splits, num_heads_k, rows), float32
    lock : threading.Lock
        Held while the kernels of one call are enqueued: another thread's must not come between them.
    """

    __slots__ = ("lock", "lse_accum_log2", "max_num_splits", "out_accum")

    def __init__(self, device: torch.device, max_num_splits: int, num_heads_k: int, rows: int, head_dim_v: int) -> None:
        shape = (max_num_splits, num_heads_k, rows)
        self.max_num_splits = max_num_splits
        self.out_accum = torch.empty((*shape, head_dim_v), dtype=torch.float32, device=device)
        self.lse_accum_log2 = torch.empty(shape, dtype=torch.float32, device=device)
        self.lock = threading.Lock()


# By device index, stream handle, KV heads, rows and head dim.
_workspaces: dict[tuple[int, int, int, int, int], Workspace] = {}


def _current_stream(device_index: int) -> int:
    return torch.cuda.current_stream(device_index).cuda_stream


# What torch's generated code calls: the public function builds an object, for several microseconds.
_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _current_stream)


def _is_capturing(device_index: int) -> bool:
    if torch.cuda.current_device() == device_index:
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device_index):
        return torch.cuda.is_current_stream_capturing()


def take_workspace(
    device: torch.device, max_num_splits: int, num_heads_k: int, rows: int, head_dim_v: int
) -> Workspace:
    """Scratch memory for one call on the current stream of ``device``, with room for at least that many splits.

    Parameters
    ----------
    device, max_num_splits, num_heads_k, rows, head_dim_v
        As for ``Workspace``. A CPU's is made anew each time: there is no stream to order calls by.
    """
    index = device.index
    if index is None or _is_capturing(index):
        return Workspace(device, max_num_splits, num_heads_k, rows, head_dim_v)
    key = (index, _raw_stream(index), num_heads_k, rows, head_dim_v)
    workspace = _workspaces.get(key)
    if workspace is None or workspace.max_num_splits < max_num_splits:
        rounded = -(-max_num_splits // _SPLITS_STEP) * _SPLITS_STEP
        workspace = _workspaces[key] = Workspace(device, rounded, num_heads_k, rows, head_dim_v)
    return workspace


def release_workspaces() -> None:
    """Give the scratch memory of all streams back to torch's allocator; the next calls take new memory.

    Safe at any time: the allocator hands memory on in the order of the stream that it was used on.
    """
    _workspaces.clear()
