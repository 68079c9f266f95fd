"""Merging partial attention: two decode results of the same queries over different keys."""

from __future__ import annotations

from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from tilemla import operators  # noqa: F401  # torch.ops.tilemla
from tilemla.launch import module_for
from tilemla.spec import DTYPES, HEAD_DIMS
from tilemla.validate import check_lse_base, check_tensor, describe

_DTYPES = tuple(getattr(torch, name) for name in DTYPES)
_HEAD_DIMS_V = sorted({head_dim_v for _, head_dim_v in HEAD_DIMS})


def merge_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor, *, lse_base: str = "e"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge what queries found in two sets of keys into what they would have found in both.

    For caches that lie in parts: on several GPUs (context parallelism), or a prefix that requests share. Nothing may be
    in both sets.

    Parameters
    ----------
    out_a, out_b : Tensor, (batch_size, seq_len_q, num_heads_q, head_dim_v), bfloat16 or float16
        Outputs, as ``flash_mla_with_kvcache`` returns them: normalised, without an attention sink. A copy is made of
        one that is not contiguous.
    lse_a, lse_b : Tensor, (batch_size, num_heads_q, seq_len_q), float32
        Their log-sum-exp, with any strides. An infinite one says that the query saw no key: the other state is then
        returned bit for bit, whatever the output beside it holds.
    lse_base : {"e", "2"}
        Base of the logarithms, those that are returned too.

    Returns
    -------
    out : Tensor, (batch_size, seq_len_q, num_heads_q, head_dim_v), dtype of ``out_a``
        0 for a query that saw no key in either.
    lse : Tensor, (batch_size, num_heads_q, seq_len_q), float32
        +inf for a query that saw no key in either. Not contiguous where seq_len_q > 1, as a decode call's.

    Raises
    ------
    TypeError, ValueError
        On an argument that does not fit, naming it, what it must be and what it got.
    NotImplementedError
        When there is no kernel for the device, dtype or head dim, or it cannot be built (``ModuleNotBuiltError``).
    """
    if is_dynamo_compiling():
        return torch.ops.tilemla.merge_states(out_a, lse_a, out_b, lse_b, lse_base)  # type: ignore[no-any-return]
    lse_scale = check_lse_base(lse_base)
    _check_state("a", out_a, lse_a)
    _check_state("b", out_b, lse_b)
    for name, value, like in (("out_b", out_b, out_a), ("lse_b", lse_b, lse_a)):
        expected = name.replace("b", "a")
        if value.shape != like.shape:
            raise ValueError(f"{name} must have shape {tuple(like.shape)}, as {expected}, got {describe(value)}")
        if value.device != like.device:
            raise ValueError(f"{name} must be on {like.device}, as {expected}, got {describe(value)}")
    if out_b.dtype is not out_a.dtype:
        raise TypeError(f"out_b must be {out_a.dtype}, as out_a, got {describe(out_b)}")
    out_a, lse_a, out_b, lse_b = (tensor.detach() for tensor in (out_a, lse_a, out_b, lse_b))
    batch_size, seq_len_q, num_heads_q, _ = out_a.shape
    out = torch.empty_like(out_a, memory_format=torch.contiguous_format)
    lse = lse_a.new_empty((batch_size, seq_len_q, num_heads_q)).transpose(1, 2)
    if lse.numel():
        module = module_for(out_a.device, "merge_states", out_a.dtype)
        module.functions["merge_states"](out_a.contiguous(), lse_a, out_b.contiguous(), lse_b, out, lse, lse_scale)
    return out, lse


def _check_state(suffix: str, out: Any, lse: Any) -> None:
    """Check one state by itself."""
    out_name, lse_name = f"out_{suffix}", f"lse_{suffix}"
    check_tensor(out_name, out, 4, "(batch_size, seq_len_q, num_heads_q, head_dim_v)")
    check_tensor(lse_name, lse, 3, "(batch_size, num_heads_q, seq_len_q)")
    if out.dtype not in _DTYPES:
        raise NotImplementedError(f"{out_name} must be {' or '.join(DTYPES)}, got {describe(out)}")
    batch_size, seq_len_q, num_heads_q, head_dim_v = out.shape
    if head_dim_v not in _HEAD_DIMS_V:
        choice = " or ".join(map(str, _HEAD_DIMS_V))
        raise NotImplementedError(f"{out_name} must have head_dim_v = {choice}, got {describe(out)}")
    if lse.dtype is not torch.float32:
        raise TypeError(f"{lse_name} must be float32, got {describe(lse)}")
    if lse.device != out.device:
        raise ValueError(f"{lse_name} must be on {out.device}, as {out_name}, got {describe(lse)}")
    if lse.shape != (batch_size, num_heads_q, seq_len_q):
        raise ValueError(
            f"{lse_name} must have shape (batch_size, num_heads_q, seq_len_q) = "
            f"{(batch_size, num_heads_q, seq_len_q)}, as {out_name} says, got {describe(lse)}"
        )
