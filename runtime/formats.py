"""Functions of FlashMLA's forks for dense fp8 caches: names that callers import, without kernels yet."""

from __future__ import annotations

from typing import NoReturn

import torch


def get_mla_metadata_dense_fp8(cache_seqlens: torch.Tensor, num_q_tokens_per_head_k: int, num_heads_k: int) -> NoReturn:
    """Plan a decode call over a dense fp8 cache, as vLLM's function of that name; not there yet.

    Raises
    ------
    NotImplementedError
        Always.
    """
    _refuse("get_mla_metadata_dense_fp8", "dense decode of an fp8 cache")


def flash_mla_with_kvcache_fp8(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    head_dim_v: int,
    tile_scheduler_metadata: torch.Tensor,
    num_splits: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    descale_q: torch.Tensor | None = None,
    descale_k: torch.Tensor | None = None,
) -> NoReturn:
    """Attend to a dense fp8 cache, as vLLM's function of that name; not there yet.

    Raises
    ------
    NotImplementedError
        Always.
    """
    _refuse("flash_mla_with_kvcache_fp8", "dense decode of an fp8 cache")


def _refuse(function: str, feature: str) -> NoReturn:
    raise NotImplementedError(
        f"{function} was called, but there is no kernel for {feature}: use a bfloat16 or float16 cache and "
        "flash_mla_with_kvcache, or FlashMLA itself"
    )
