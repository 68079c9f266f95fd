"""A decode call whose arguments were checked: what is left to do is to take memory and to enqueue the kernels."""

from __future__ import annotations

import math

import torch

from tilemla.launch import Kernels
from tilemla.workspace import take_workspace

_LOG2E = math.log2(math.e)
_LN_2 = math.log(2.0)
_FLOAT32_TINY = 2.0**-126  # the smallest normal number


def _template(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """One element that looks like a tensor: ``empty_like`` of it takes half the time of ``empty`` with a shape."""
    return torch.empty(1, dtype=dtype, device=device).expand(shape)


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
    causal : bool
        Whether query i sees only the first ``cache_seqlens - seq_len_q + i + 1`` tokens.
    """

    def __init__(
        self,
        kernels: Kernels,
        q: torch.Tensor,
        *,
        num_heads_k: int,
        head_dim_v: int,
        num_sm_parts: int,
        softmax_scale: float | None,
        causal: bool,
    ) -> None:
        batch_size, seq_len_q, num_heads_q, head_dim_qk = q.shape
        group = num_heads_q // num_heads_k
        rows = seq_len_q * group
        self._mla_decode = kernels.mla_decode
        self._out = _template((batch_size, num_heads_k, rows, head_dim_v), q.dtype, q.device)
        self._softmax_lse = _template((batch_size, num_heads_k, rows), torch.float32, q.device)
        self._workspace = (q.device, batch_size + num_sm_parts, num_heads_k, rows, head_dim_v)
        scale = head_dim_qk**-0.5 if softmax_scale is None else softmax_scale
        # A scale of 0 still has to leave a masked score at -inf; times this, every finite score is 0 in float32.
        scale_log2 = max(scale * _LOG2E, _FLOAT32_TINY)
        # An attention sink that is not there, and two windows without an end on the left; causal ends at the query.
        self._no_sink = torch.zeros((num_heads_k, 1), dtype=torch.float32, device=q.device)
        self._scalars = (scale_log2, _LN_2, seq_len_q, group, -1, 0 if causal else -1, 0)
        self._is_folded = num_heads_k == 1 == seq_len_q  # q and out have the kernel's shape already
        self._lse_shape = (batch_size, num_heads_q, seq_len_q)

    def run(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        block_table: torch.Tensor,
        cache_seqlens: torch.Tensor,
        tile_scheduler_metadata: torch.Tensor,
        num_splits: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Enqueue the kernels on the current stream and return ``out`` and ``softmax_lse``.

        Raises
        ------
        TypeError, ValueError
            On a tensor that the module cannot take; then nothing was enqueued.
        """
        out = torch.empty_like(self._out, memory_format=torch.contiguous_format)
        softmax_lse = torch.empty_like(self._softmax_lse, memory_format=torch.contiguous_format)
        if self._lse_shape[0]:  # no kernel runs for an empty batch
            workspace = take_workspace(*self._workspace)
            with workspace.lock:
                self._mla_decode(
                    q if self._is_folded else self._fold_heads(q),
                    k_cache,
                    block_table,
                    cache_seqlens,
                    tile_scheduler_metadata,
                    num_splits,
                    out,
                    softmax_lse,
                    workspace.out_accum,
                    workspace.lse_accum_log2,
                    self._no_sink,
                    *self._scalars,
                )
        if self._is_folded:
            return out, softmax_lse.view(self._lse_shape)
        return self._unfold_heads(out), self._unfold_lse(softmax_lse)

    def _fold_heads(self, q: torch.Tensor) -> torch.Tensor:
        """Bring queries to (batch_size, num_heads_k, seq_len_q * group, head_dim_qk), by view where possible."""
        batch_size, seq_len_q, _, head_dim_qk = q.shape
        num_heads_k, rows = self._softmax_lse.shape[1:]
        if num_heads_k > 1:
            q = q.view(batch_size, seq_len_q, num_heads_k, rows // seq_len_q, head_dim_qk).transpose(1, 2)
        return q.reshape(batch_size, num_heads_k, rows, head_dim_qk)

    def _unfold_heads(self, out: torch.Tensor) -> torch.Tensor:
        """Bring (batch_size, num_heads_k, seq_len_q * group, head_dim_v) to (batch_size, seq_len_q, num_heads_q, …)."""
        batch_size, num_heads_q, seq_len_q = self._lse_shape
        _, num_heads_k, rows, head_dim_v = out.shape
        if num_heads_k == 1:
            return out.view(batch_size, seq_len_q, num_heads_q, head_dim_v)
        out = out.view(batch_size, num_heads_k, seq_len_q, rows // seq_len_q, head_dim_v).transpose(1, 2)
        return out.reshape(batch_size, seq_len_q, num_heads_q, head_dim_v).contiguous()

    def _unfold_lse(self, softmax_lse: torch.Tensor) -> torch.Tensor:
        """Bring (batch_size, num_heads_k, seq_len_q * group) to (batch_size, num_heads_q, seq_len_q)."""
        batch_size, num_heads_q, seq_len_q = self._lse_shape
        if seq_len_q == 1:
            return softmax_lse.view(batch_size, num_heads_q, 1)
        num_heads_k, rows = softmax_lse.shape[1:]
        softmax_lse = softmax_lse.view(batch_size, num_heads_k, seq_len_q, rows // seq_len_q).transpose(2, 3)
        return softmax_lse.reshape(batch_size, num_heads_q, seq_len_q)
