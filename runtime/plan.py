"""A decode call whose arguments were checked: what is left to do is to take memory and to enqueue the kernels."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch

from tilemla.allocate import allocator_for, contiguous_strides
from tilemla.launch import Kernels
from tilemla.options import Traits
from tilemla.spec import NARROW_ROWS
from tilemla.streams import current_device
from tilemla.workspace import Scratch

_LOG2E = math.log2(math.e)
_FLOAT32_TINY = 2.0**-126  # the smallest normal number
# The plain decode program is faster where memory and latency bound a call. Where the tensor cores and the power that
# they draw do, with three and more tiles of 64 rows to a stream of KV, the general one was 1 to 3% faster on an H100,
# in each of seven comparisons; the loops of both hold the same instructions in another order.
_MOST_PLAIN_ROWS = 128

MAX_PLANS = 4096
_Kind = TypeVar("_Kind")
_Plan = TypeVar("_Plan")


def log2_scale(softmax_scale: float | None, head_dim_qk: int) -> float:
    """The factor of scores in log2 units; ``head_dim_qk ** -0.5`` by default.

    A scale of 0 still has to leave a masked score at -inf; times what is returned, every finite score is 0 in float32.
    """
    scale = head_dim_qk**-0.5 if softmax_scale is None else softmax_scale
    return max(scale * _LOG2E, _FLOAT32_TINY)


def exact_values(head_dim_v: Any, softmax_scale: Any, causal: Any) -> tuple[Any, ...]:
    """Arguments of a call as plans are found by them: each with its class, since True is 1 and 1 is 1.0."""
    return (head_dim_v, head_dim_v.__class__, softmax_scale, softmax_scale.__class__, causal, causal.__class__)


def remember(plans: dict[_Kind, _Plan], kind: _Kind, plan: _Plan) -> None:
    """Keep a plan for calls of a kind. When there are too many kinds all are forgotten, and those in use come back."""
    if len(plans) >= MAX_PLANS:
        plans.clear()
    plans[kind] = plan


class DecodePlan:
    """What all calls of a kind share.

    Parameters
    ----------
    kernels : Kernels
        The module's functions for the device.
    q : Tensor, (batch_size, seq_len_q, num_heads_q, head_dim_qk)
        The queries of one such call; only what they look like counts.
    num_heads_k, head_dim_v, num_sm_parts : int
        KV heads, elements of a value, parts of the schedule.
    softmax_scale : float or None
        Factor of the scores; ``head_dim_qk ** -0.5`` by default.
    traits : Traits
        The window, the base of the log-sum-exp, and whether there is an attention sink.
    out_dtype : torch.dtype, optional
        Of the output; q's by default.

    Attributes
    ----------
    copies : bool
        Whether strides cannot fold the heads, so that queries and results are copied: with several KV heads and
        several queries. The module then does not see the tensors of the call, and leaves them unchecked.
    num_sm_parts : int
        The largest schedule that there is room for.
    """

    __slots__ = (
        "_decode",
        "_dtype",
        "_empty",
        "_folded",
        "_has_sink",
        "_index",
        "_lse_shape",
        "_lse_strides",
        "_no_sink",
        "_out_shape",
        "_out_strides",
        "_rest",
        "_scratch",
        "_sink_shape",
        "copies",
        "num_sm_parts",
    )

    def __init__(
        self,
        kernels: Kernels,
        q: torch.Tensor,
        *,
        num_heads_k: int,
        head_dim_v: int,
        num_sm_parts: int,
        softmax_scale: float | None,
        traits: Traits,
        out_dtype: torch.dtype | None = None,
    ) -> None:
        batch_size, seq_len_q, num_heads_q, head_dim_qk = q.shape
        group = num_heads_q // num_heads_k
        rows = seq_len_q * group
        self.num_sm_parts = num_sm_parts
        self._dtype = out_dtype or q.dtype
        self._index: int | None = q.device.index if q.device.type == "cuda" else None
        self._empty = allocator_for(q.device)
        self._out_shape = (batch_size, seq_len_q, num_heads_q, head_dim_v)
        self._out_strides = contiguous_strides(self._out_shape)
        # A query's heads lie side by side, as upstream.
        self._lse_shape = (batch_size, num_heads_q, seq_len_q)
        self._lse_strides = (num_heads_q * seq_len_q, 1, num_heads_q if seq_len_q > 1 else 1)
        self._scratch = Scratch(kernels.spec, q.device, batch_size + num_sm_parts, num_heads_k, rows, head_dim_v)
        self._has_sink = traits.has_sink
        self._sink_shape = (num_heads_k, group)
        common = (log2_scale(softmax_scale, head_dim_qk), traits.lse_scale, seq_len_q, group)
        self._rest: tuple[Any, ...]
        self._no_sink: tuple[Any, ...] = ()
        narrow, narrow_unfolded = kernels.mla_decode_narrow, kernels.mla_decode_narrow_unfolded
        if narrow is not None and narrow_unfolded is not None and rows <= NARROW_ROWS:
            general, plain = (narrow, narrow_unfolded), None
        else:
            general = kernels.mla_decode, kernels.mla_decode_unfolded
            plain = kernels.mla_decode_plain, kernels.mla_decode_plain_unfolded
        if plain is not None and traits.is_plain and rows <= _MOST_PLAIN_ROWS:
            self._folded, unfolded = plain
            self._rest = (*common, traits.window_right)
        else:
            self._folded, unfolded = general
            self._rest = (*common, traits.window_left, traits.window_right, int(traits.has_sink))
            if not traits.has_sink:
                import tvm_ffi

                no_sink = torch.empty((num_heads_k, 1), dtype=torch.float32, device=q.device)
                self._no_sink = (tvm_ffi.from_dlpack(no_sink),)
        self.copies = num_heads_k > 1 and seq_len_q > 1
        self._decode = self._decode_copies if self.copies else unfolded

    def run(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        block_table: torch.Tensor,
        cache_seqlens: torch.Tensor,
        tile_scheduler_metadata: torch.Tensor,
        num_splits: torch.Tensor,
        out: torch.Tensor | None = None,
        softmax_lse: torch.Tensor | None = None,
        attn_sink: torch.Tensor | None = None,
        scales: tuple[torch.Tensor, ...] = (),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Enqueue the kernels on the current stream of the tensors' device and return ``out`` and ``softmax_lse``.

        Results that are given are written in place; the module refuses those that are not laid out as new ones.
        ``scales`` are what the module's programs take between the attention sink and their numbers.

        Raises
        ------
        TypeError, ValueError
            On a tensor that the module cannot take; then nothing was enqueued.
        """
        index = self._index
        if index is not None and current_device() != index:
            with torch.cuda.device(index):
                return self.run(
                    q,
                    k_cache,
                    block_table,
                    cache_seqlens,
                    tile_scheduler_metadata,
                    num_splits,
                    out,
                    softmax_lse,
                    attn_sink,
                    scales,
                )
        if out is None:
            out = self._empty(self._out_shape, self._out_strides, self._dtype)
        if softmax_lse is None:
            softmax_lse = self.empty_lse()
        if self._out_shape[0]:  # no kernel runs for an empty batch
            workspace = self._scratch.take()
            sink = self._no_sink
            if self._has_sink:
                sink = (attn_sink.view(self._sink_shape),)  # type: ignore[union-attr]
            self._decode(
                q,
                k_cache,
                block_table,
                cache_seqlens,
                tile_scheduler_metadata,
                num_splits,
                out,
                softmax_lse,
                workspace.out_accum,
                workspace.lse_accum_log2,
                *sink,
                *scales,
                *self._rest,
            )
        return out, softmax_lse

    def empty_lse(self) -> torch.Tensor:
        """A log-sum-exp, (batch_size, num_heads_q, seq_len_q), that the module can write; not initialised."""
        return self._empty(self._lse_shape, self._lse_strides, torch.float32)

    def _decode_copies(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        block_table: torch.Tensor,
        cache_seqlens: torch.Tensor,
        tile_scheduler_metadata: torch.Tensor,
        num_splits: torch.Tensor,
        out: torch.Tensor,
        softmax_lse: torch.Tensor,
        *rest: Any,
    ) -> None:
        """What the unfolded function does, with q, out and softmax_lse brought to the kernel's shapes and back."""
        batch_size, seq_len_q, num_heads_q, head_dim_qk = q.shape
        num_heads_k, head_dim_v = k_cache.shape[2], out.shape[3]
        split = (batch_size, seq_len_q, num_heads_k, num_heads_q // num_heads_k)
        folded = (batch_size, num_heads_k, seq_len_q * split[3])
        folded_out = out.new_empty((*folded, head_dim_v))
        folded_lse = softmax_lse.new_empty(folded)
        self._folded(
            q.reshape(*split, head_dim_qk).transpose(1, 2).reshape(*folded, head_dim_qk),
            k_cache,
            block_table,
            cache_seqlens,
            tile_scheduler_metadata,
            num_splits,
            folded_out,
            folded_lse,
            *rest,
        )
        by_query = (batch_size, num_heads_k, seq_len_q, split[3])
        out.detach().view(*split, head_dim_v).copy_(folded_out.view(*by_query, head_dim_v).transpose(1, 2))
        softmax_lse.detach().transpose(1, 2).view(split).copy_(folded_lse.view(by_query).transpose(1, 2))
