"""A call with ``indices`` whose arguments were checked: what is left is to take memory and to enqueue the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tilemla.allocate import allocator_for, contiguous_strides
from tilemla.constants import constant, no_sink
from tilemla.loader import LoadedModule
from tilemla.streams import current_device
from tilemla.workspace import Scratch

# A cache, indices into it, and how many of each request's count; None is all.
TokenList = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


class ListPlan:
    """How a cache and the indices into it are handed to a kernel.

    Parameters
    ----------
    k_cache : Tensor, (num_blocks, page_block_size, 1, head_dim_qk or bytes of a token)
        A checked cache; only what it looks like counts.
    indices : Tensor, (batch_size, seq_len_q, topk)
        Likewise.
    is_fp8 : bool
        Whether the cache is one of bytes.

    Attributes
    ----------
    page_block_size : int
        Tokens in a page.
    is_empty : bool
        Whether the cache has no page, and so no token to name.
    """

    __slots__ = ("_all", "_is_fp8", "_none", "_shape", "_strides", "is_empty", "page_block_size")

    def __init__(self, k_cache: torch.Tensor, indices: torch.Tensor, *, is_fp8: bool) -> None:
        num_blocks, self.page_block_size, _, width = k_cache.shape
        batch_size, _, topk = indices.shape
        self.is_empty = not num_blocks
        self._is_fp8 = is_fp8
        self._shape: tuple[int, ...] = (num_blocks, self.page_block_size, width)
        self._strides: tuple[int, ...] = (k_cache.stride(0), k_cache.stride(1), 1)
        if is_fp8:
            self._shape, self._strides = (num_blocks, self.page_block_size * width), (k_cache.stride(0), 1)
        self._all = constant(indices.device, batch_size, topk)
        self._none = constant(indices.device, batch_size, 0)

    def arguments(
        self, k_cache: torch.Tensor, indices: torch.Tensor, topk_length: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pages, indices and lengths as the kernel takes them."""
        if self._is_fp8:
            k_cache = k_cache.view(torch.uint8)
        if self.is_empty:  # no kernel can be given an empty tensor
            return k_cache.new_zeros((1, *self._shape[1:])), indices, self._none
        return (
            k_cache.as_strided(self._shape, self._strides),
            indices,
            self._all if topk_length is None else topk_length,
        )

    def nothing_beside(
        self, pages: torch.Tensor, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What stands for a second list where there is none: this one, of which nothing counts."""
        return pages, indices, self._none


class SparsePlan:
    """What all calls of a kind share.

    Parameters
    ----------
    module : LoadedModule
        The kernels of the kind.
    q : Tensor, (batch_size, seq_len_q, num_heads_q, head_dim_qk)
        The queries of one such call; only what they look like counts.
    main, extra : ListPlan
        What is attended to; None where there is no second cache.
    head_dim_v, num_sm_parts : int
        Elements of a value, parts of the schedule.
    scales : (float, float)
        Factor of the scores in log2 units, and the log of 2 in the base of the log-sum-exp.
    has_sink : bool
        Whether there is an attention sink.

    Attributes
    ----------
    num_sm_parts : int
        The largest schedule that there is room for.
    """

    __slots__ = (
        "_decode",
        "_empty",
        "_extra",
        "_index",
        "_lse",
        "_main",
        "_no_sink",
        "_out",
        "_rest",
        "_scratch",
        "num_sm_parts",
    )

    def __init__(
        self,
        module: LoadedModule,
        q: torch.Tensor,
        main: ListPlan,
        extra: ListPlan | None,
        *,
        head_dim_v: int,
        num_sm_parts: int,
        scales: tuple[float, float],
        has_sink: bool,
    ) -> None:
        batch_size, seq_len_q, num_heads_q, _ = q.shape
        device = q.device
        self._index: int | None = device.index if device.type == "cuda" else None
        self._empty = allocator_for(device)
        self._main, self._extra = main, extra
        self.num_sm_parts = num_sm_parts
        shape = (batch_size, seq_len_q, num_heads_q, head_dim_v)
        self._out = (shape, contiguous_strides(shape), q.dtype)
        # A query's heads lie side by side, as upstream.
        self._lse = (shape[:3], contiguous_strides(shape[:3]), torch.float32)
        # What one part does alone is not split, however many queries there are.
        max_num_splits = batch_size + num_sm_parts if num_sm_parts > 1 else 0
        self._scratch = Scratch(module.library, device, max_num_splits, seq_len_q, num_heads_q, head_dim_v)
        self._no_sink = None if has_sink else no_sink(device)
        sizes = (main.page_block_size, (extra or main).page_block_size)
        self._rest = (*scales, *sizes, int(has_sink))
        self._decode = _decode_of(module, num_heads_q)

    def run(
        self,
        q: torch.Tensor,
        main: TokenList,
        extra: TokenList | None,
        tile_scheduler_metadata: torch.Tensor,
        num_splits: torch.Tensor,
        out: torch.Tensor | None,
        softmax_lse: torch.Tensor | None,
        attn_sink: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Enqueue the kernels on the current stream of the tensors' device and return ``out`` and ``softmax_lse``.

        Results that are given are written in place; the module refuses those that are not laid out as new ones.

        Raises
        ------
        TypeError, ValueError
            On a tensor that the module cannot take; then nothing was enqueued.
        """
        index = self._index
        if index is not None and current_device() != index:
            with torch.cuda.device(index):
                return self.run(q, main, extra, tile_scheduler_metadata, num_splits, out, softmax_lse, attn_sink)
        if out is None:
            out = self._empty(*self._out)
        lse = self._empty(*self._lse) if softmax_lse is None else softmax_lse.transpose(1, 2)
        if out.shape[0]:  # no kernel runs for an empty batch
            workspace = self._scratch.take()
            pages, indices, lengths = self._main.arguments(*main)
            if self._extra is None:
                second = self._main.nothing_beside(pages, indices)
            else:
                second = self._extra.arguments(*extra)  # type: ignore[misc]
            self._decode(
                q,
                pages,
                indices,
                lengths,
                *second,
                tile_scheduler_metadata,
                num_splits,
                out,
                lse,
                workspace.out_accum,
                workspace.lse_accum_log2,
                self._no_sink if attn_sink is None else attn_sink,
                *self._rest,
            )
        return out, lse.transpose(1, 2) if softmax_lse is None else softmax_lse


def _decode_of(module: LoadedModule, num_heads_q: int) -> Callable[..., Any]:
    """The program for that many heads: of an even number of tiles two and two share the conversion of their tokens."""
    tiles = -(-num_heads_q // module.manifest.spec["block_m"])
    name = "mla_sparse_decode" if tiles % 2 else "mla_sparse_decode_paired"
    return module.functions.get(name) or module.functions["mla_sparse_decode"]
