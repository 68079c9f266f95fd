"""Prefill over the tokens that indices name: FlashMLA's ``flash_mla_sparse_fwd``."""

from __future__ import annotations

from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from tilemla import sparse_operators  # noqa: F401  # torch.ops.tilemla
from tilemla.constants import constant, no_sink
from tilemla.launch import module_of_kind
from tilemla.options import check_attn_sink
from tilemla.plan import log2_scale
from tilemla.sparse_validate import (
    check_indices,
    check_lengths,
    check_queries,
)
from tilemla.streams import on_device
from tilemla.validate import check_int, check_softmax_scale, check_tensor, describe


def flash_mla_sparse_fwd(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    indexer_topk: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend to the tokens that indices name, each query to its own (FlashMLA's function of that name).

    Parameters
    ----------
    q : Tensor, (seq_len_q, num_heads_q, head_dim_qk), bfloat16 or float16
        Queries, of any strides but the last, which is 1.
    kv : Tensor, (seq_len_kv, 1, head_dim_qk), q's dtype
        Keys, whose first ``d_v`` elements are the values; of any strides but the last, which is 1.
    indices : Tensor, (seq_len_q, 1, topk), int32
        Tokens of ``kv``; negative ones and those from seq_len_kv on name none. A token counts as often as it is named.
    sm_scale : float
        Factor of the scores, not negative.
    d_v : int
        Elements of a value.
    attn_sink : Tensor, (num_heads_q,), float32, optional
        A score of each head that no token has: ``out`` is scaled by ``exp(lse) / (exp(lse) + exp(attn_sink))``, the
        other results do not know of it. -inf changes nothing, +inf makes ``out`` 0.
    topk_length : Tensor, (seq_len_q,), int32, optional
        How many indices of each query count, from the first on: less than 0 is none, more than topk is all. What the
        others name is not read.
    indexer_topk : int
        A fork's argument; must be 0.

    Returns
    -------
    out : Tensor, (seq_len_q, num_heads_q, d_v), q's dtype
        0 for a query that sees no token.
    max_logits : Tensor, (seq_len_q, num_heads_q), float32
        The largest scaled score; -inf for a query that sees no token.
    lse : Tensor, (seq_len_q, num_heads_q), float32
        Natural log of the sum of exponentials of the scaled scores; +inf for a query that sees no token.

    Raises
    ------
    TypeError, ValueError
        On an argument that does not fit, naming it, what it must be and what it got.
    NotImplementedError
        When there is no kernel for the device, dtype or head dim, or it cannot be built (``ModuleNotBuiltError``).
    """
    if is_dynamo_compiling():
        arguments = (q, kv, indices, sm_scale, d_v, attn_sink, topk_length)
        return torch.ops.tilemla.flash_mla_sparse_fwd(*arguments)  # type: ignore[no-any-return]
    check_queries(q, 3, "(seq_len_q, num_heads_q, head_dim_qk)")
    seq_len_q, num_heads_q, head_dim_qk = q.shape
    _check_kv(kv, q)
    check_indices("indices", indices, "(seq_len_q, 1, topk)", (seq_len_q, 1), q.device)
    if sm_scale is None:
        raise TypeError(f"sm_scale must be a float, got {describe(sm_scale)}")
    check_softmax_scale("sm_scale", sm_scale)
    check_int("d_v", d_v, 1)
    sink = check_attn_sink(attn_sink, q)
    if topk_length is not None:
        check_lengths("topk_length", topk_length, "seq_len_q", seq_len_q, q.device)
    if check_int("indexer_topk", indexer_topk, 0):
        raise NotImplementedError(f"indexer_topk must be 0: no kernel chooses tokens itself, got {indexer_topk}")
    module = module_of_kind(
        q.device,
        "flash_mla_sparse_fwd",
        kernel="mla_sparse_prefill",
        kv_format="dense",
        dtype=q.dtype,
        head_dim_qk=head_dim_qk,
        head_dim_v=d_v,
    )
    q, kv = q.detach(), kv.detach()
    out = q.new_empty((seq_len_q, num_heads_q, d_v))
    max_logits = torch.empty((seq_len_q, num_heads_q), dtype=torch.float32, device=q.device)
    lse = torch.empty_like(max_logits)
    if not seq_len_q:
        return out, max_logits, lse
    if not kv.shape[0]:  # no kernel can be given an empty tensor
        kv, topk_length = kv.new_zeros((1, 1, head_dim_qk)), constant(q.device, seq_len_q, 0)
    with on_device(q.device):
        module.functions["mla_sparse_prefill"](
            q,
            kv[:, 0],
            indices[:, 0],
            constant(q.device, seq_len_q, indices.shape[2]) if topk_length is None else topk_length,
            out,
            max_logits,
            lse,
            no_sink(q.device) if sink is None else sink,
            log2_scale(sm_scale, head_dim_qk),
            int(sink is not None),
        )
    return out, max_logits, lse


def _check_kv(kv: Any, q: torch.Tensor) -> None:
    check_tensor("kv", kv, 3, "(seq_len_kv, 1, head_dim_qk)")
    if kv.dtype is not q.dtype:
        raise TypeError(f"kv must be {q.dtype}, as q, got {describe(kv)}")
    if kv.device != q.device:
        raise ValueError(f"kv must be on {q.device}, as q, got {describe(kv)}")
    if tuple(kv.shape[1:]) != (1, q.shape[2]):
        raise ValueError(f"kv must have shape (seq_len_kv, 1, head_dim_qk = {q.shape[2]}), as q, got {describe(kv)}")
    if kv.stride(2) != 1:
        raise ValueError(f"kv must have stride 1 in its last dimension, got strides {kv.stride()}")
