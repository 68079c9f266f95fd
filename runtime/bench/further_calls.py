"""The tensors of a further case, its calls, and what is right."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import torch

from tilemla.bench.cases import HEAD_DIM_V, PAGE_BLOCK_SIZE
from tilemla.bench.further import FurtherCase
from tilemla.kv_formats import FP8_LAYOUTS
from tilemla.quantize import dequantize_k_cache, quantize_k_cache

_SPARE_PAGES = 3
_CHECKED_QUERIES = 4  # of the first request: enough to tell how a kernel rounds


@dataclasses.dataclass(frozen=True)
class FurtherInputs:
    """The tensors of one call.

    Parameters
    ----------
    q : Tensor, (batch_size, seq_len_q, num_heads_q, head_dim_qk)
        Without its first dimension for prefill.
    k_cache : Tensor
        Pages as the format has them; (num_tokens, 1, head_dim_qk) for prefill.
    block_table : Tensor, (batch_size, pages), int32, or None
        Page ids in an order of chance.
    cache_seqlens : Tensor, (batch_size,), int32
        Tokens of each request; with indices how many of them count.
    indices : Tensor, (batch_size, seq_len_q, topk), int32
        (seq_len_q, 1, topk) for prefill; empty beside a block table.
    """

    q: torch.Tensor
    k_cache: torch.Tensor
    block_table: torch.Tensor | None
    cache_seqlens: torch.Tensor
    indices: torch.Tensor


def make_further_inputs(case: FurtherCase, device: torch.device) -> FurtherInputs:
    """Draw values and indices; equal cases get equal tensors on the same device."""
    generator = torch.Generator(device=device).manual_seed(case.seed)

    def draw(*shape: int) -> torch.Tensor:
        drawn = torch.empty(shape, dtype=getattr(torch, case.dtype), device=device)
        return drawn.normal_(generator=generator)

    is_prefill = case.kernel == "mla_sparse_prefill"
    is_e4m3 = case.kv_format == "dense_fp8"
    batch_size, seq_len_q, head_dim = case.batch_size, case.seq_len_q, case.head_dim_qk
    q = draw(batch_size, seq_len_q, case.num_heads_q, head_dim)
    pages = -(-case.num_tokens // PAGE_BLOCK_SIZE)
    block_table, indices = None, torch.empty(0, dtype=torch.int32, device=device)
    count = case.topk or case.num_tokens
    if case.has_indices:
        shape = (seq_len_q, 1, case.topk) if is_prefill else (batch_size, seq_len_q, case.topk)
        indices = torch.randint(0, case.num_tokens, shape, generator=generator, dtype=torch.int32, device=device)
    else:
        order = torch.randperm(batch_size * pages + _SPARE_PAGES, generator=generator, device=device)
        block_table = order[: batch_size * pages].view(batch_size, pages).to(torch.int32)
        pages = batch_size * pages + _SPARE_PAGES
    cache = draw(case.num_tokens, 1, head_dim) if is_prefill else draw(pages, PAGE_BLOCK_SIZE, 1, head_dim)
    if is_e4m3:
        q, cache = q.to(torch.float8_e4m3fn), cache.to(torch.float8_e4m3fn)
    elif case.kv_format in FP8_LAYOUTS:
        cache = quantize_k_cache(cache, case.kv_format)
    cache_seqlens = torch.full((batch_size,), count, dtype=torch.int32, device=device)
    return FurtherInputs(q[0] if is_prefill else q, cache, block_table, cache_seqlens, indices)


def prepare_further(
    module: str, case: FurtherCase, inputs: FurtherInputs
) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """Plan a call of a module with FlashMLA's API; returns the call, whose results are ``out`` and a log-sum-exp."""
    api: Any = sys.modules[module]
    tokens = case.seq_len_q * case.num_heads_q
    if case.kernel == "mla_sparse_prefill":
        scale = case.head_dim_qk**-0.5

        def prefill() -> tuple[torch.Tensor, torch.Tensor]:
            out, _, lse = api.flash_mla_sparse_fwd(inputs.q, inputs.k_cache, inputs.indices, scale)
            return out, lse

        return prefill
    decode, keywords = api.flash_mla_with_kvcache, {}
    if case.has_indices:
        is_fp8 = case.kv_format != "dense"
        schedule = api.get_mla_metadata(inputs.cache_seqlens, tokens, 1, case.num_heads_q, is_fp8, case.topk)
        keywords = {"is_fp8_kvcache": is_fp8, "indices": inputs.indices}
    elif case.kv_format == "dense_fp8":
        one = torch.ones(1, device=inputs.q.device)
        keywords = {"causal": True, "descale_q": one, "descale_k": one}
        if hasattr(api, "flash_mla_with_kvcache_fp8"):  # the function that vLLM has made of it
            decode = api.flash_mla_with_kvcache_fp8
            schedule = api.get_mla_metadata_dense_fp8(inputs.cache_seqlens, tokens, 1)
        else:
            schedule = api.get_mla_metadata(inputs.cache_seqlens, tokens, 1, case.num_heads_q, True)
    else:
        schedule = api.get_mla_metadata(inputs.cache_seqlens, tokens, 1)
        keywords = {"causal": True, "is_fp8_kvcache": True}
    lengths = None if case.has_indices else inputs.cache_seqlens

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        result: tuple[torch.Tensor, torch.Tensor] = decode(
            inputs.q, inputs.k_cache, inputs.block_table, lengths, HEAD_DIM_V, *schedule, **keywords
        )
        return result

    return call


class Exact:
    """What is right for the first queries of a case, in float64, from the cache as it is stored.

    Parameters
    ----------
    case : FurtherCase
        What is called.
    inputs : FurtherInputs
        Its tensors.
    """

    def __init__(self, case: FurtherCase, inputs: FurtherInputs) -> None:
        self._is_prefill = case.kernel == "mla_sparse_prefill"
        queries = inputs.q if self._is_prefill else inputs.q[0]
        self._out = torch.stack([self._attend(case, inputs, i, q) for i, q in enumerate(queries[:_CHECKED_QUERIES])])

    def error_of(self, out: torch.Tensor) -> float:
        """The largest difference of a result to it, over the largest value."""
        checked = (out if self._is_prefill else out[0])[:_CHECKED_QUERIES]
        return float((checked.double() - self._out).abs().max() / self._out.abs().max())

    @staticmethod
    def _attend(case: FurtherCase, inputs: FurtherInputs, query: int, q: torch.Tensor) -> torch.Tensor:
        keys = _keys_of(case, inputs, query).double()
        weights = torch.softmax(q.double() @ keys.T * case.head_dim_qk**-0.5, dim=-1)
        return torch.mm(weights, keys[:, :HEAD_DIM_V])


def _keys_of(case: FurtherCase, inputs: FurtherInputs, query: int) -> torch.Tensor:
    """What a query of the first request attends to, (count, head_dim_qk)."""
    cache = inputs.k_cache
    if inputs.block_table is not None:
        # causal: the last query sees all
        count = case.num_tokens - (case.seq_len_q - 1 - query)
        return _stored(case, cache[inputs.block_table[0].long()])[:count]
    if case.kernel == "mla_sparse_prefill":
        return cache[inputs.indices[query, 0].long(), 0]
    chosen = inputs.indices[0, query].long()
    return _stored(case, cache[chosen // PAGE_BLOCK_SIZE])[
        torch.arange(len(chosen), device=chosen.device) * PAGE_BLOCK_SIZE + chosen % PAGE_BLOCK_SIZE
    ]


def _stored(case: FurtherCase, pages: torch.Tensor) -> torch.Tensor:
    """The tokens of pages, (pages * 64, head_dim_qk) float32."""
    if case.kv_format in FP8_LAYOUTS:
        pages = dequantize_k_cache(pages, case.kv_format, torch.float32)
    return pages.float().reshape(-1, case.head_dim_qk)
