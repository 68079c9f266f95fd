"""Calls of further kernels: fp8 caches, and attention to the tokens that indices name. Without torch, as ``cases``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from tilemla.bench.cases import HEAD_DIM_QK, HEAD_DIM_V, PAGE_BLOCK_SIZE, SHORT_DTYPE, GridCase
from tilemla.kv_formats import FP8_LAYOUTS
from tilemla.spec import BLOCK_M, KernelSpec

_BYTES_OF_INDEX = 4
_SHORT_FORMAT = {"dense_fp8": "e4m3", "dense": ""}
# Below it, the cosine difference of two results is one of rounding; a peer that multiplies with e4m3 rounds coarsely.
_AGREEMENT, _AGREEMENT_E4M3 = 5e-5, 5e-3


@dataclasses.dataclass(frozen=True)
class FurtherCase:
    """The shapes of one call.

    Parameters
    ----------
    kernel, kv_format : str
        As of ``KernelSpec``.
    batch_size, seq_len_q, num_heads_q : int
        Requests, queries of a request and query heads; prefill has one request.
    num_tokens : int
        Tokens of each request with ``kernel="mla_decode"``, else of the whole cache.
    topk : int
        Indices of each query; 0 with ``kernel="mla_decode"``, whose calls are causal.
    dtype : str
        Of queries, and of a cache that has no bytes; e4m3 comes with the format.
    seed : int
        Of values and indices.

    Raises
    ------
    ValueError
        When no kernel is specialised on these.
    """

    kernel: str
    kv_format: str
    batch_size: int
    seq_len_q: int
    num_heads_q: int
    num_tokens: int
    topk: int = 0
    dtype: str = "bfloat16"
    seed: int = 0

    def __post_init__(self) -> None:
        reason = self.spec("cpu").why_invalid()
        if reason is not None:
            raise ValueError(reason)
        if self.has_indices != (self.topk > 0):
            raise ValueError(f"topk must be {'more than ' * self.has_indices}0 for {self.kernel}, got {self.topk}")

    def __str__(self) -> str:
        name = _SHORT_FORMAT.get(self.kv_format, self.kv_format) or SHORT_DTYPE[self.dtype]
        if self.kernel == "mla_sparse_prefill":
            return f"prefill {name} s{self.seq_len_q} h{self.num_heads_q} topk{self.topk}"
        if self.has_indices:
            return f"sparse {name} b{self.batch_size} s{self.seq_len_q} h{self.num_heads_q} topk{self.topk}"
        return f"{name} b{self.batch_size} L{self.num_tokens} h{self.num_heads_q} s{self.seq_len_q} causal"

    @property
    def has_indices(self) -> bool:
        """Whether queries attend to the tokens that indices name."""
        return self.kernel != "mla_decode"

    @property
    def head_dim_qk(self) -> int:
        """Elements of a query and a key."""
        return FP8_LAYOUTS[self.kv_format].head_dim if self.kv_format in FP8_LAYOUTS else HEAD_DIM_QK

    def spec(self, arch: str) -> KernelSpec:
        """Of the module that serves the call."""
        return KernelSpec(
            arch=arch,
            dtype=self.dtype,
            kv_format=self.kv_format,
            head_dim_qk=self.head_dim_qk,
            page_block_size=0 if self.has_indices else PAGE_BLOCK_SIZE,
            block_m=BLOCK_M[arch],
            kernel=self.kernel,
        )

    @property
    def num_queries(self) -> int:
        """Queries of all requests, each of all heads."""
        return self.batch_size * self.seq_len_q

    @property
    def flop(self) -> int:
        """Multiplications and additions of both matrix products: without a mask, and with every index."""
        keys = self.topk or self.num_tokens
        return 2 * self.num_queries * self.num_heads_q * keys * (self.head_dim_qk + HEAD_DIM_V)

    @property
    def num_bytes(self) -> int:
        """Bytes that must move: each token that is attended to once, indices, queries and outputs."""
        named = self.num_queries * self.topk
        tokens = min(named, self.num_tokens) if self.has_indices else self.batch_size * self.num_tokens
        element = 1 if self.kv_format == "dense_fp8" else 2
        in_bytes = self.kv_format in FP8_LAYOUTS
        token = FP8_LAYOUTS[self.kv_format].bytes_per_token if in_bytes else element * self.head_dim_qk
        rows = self.num_queries * self.num_heads_q
        return tokens * token + named * _BYTES_OF_INDEX + rows * (self.head_dim_qk * element + HEAD_DIM_V * 2)

    @property
    def agreement(self) -> float:
        """The most that the cosine difference of two right results is."""
        return _AGREEMENT_E4M3 if self.kv_format == "dense_fp8" else _AGREEMENT


# What a run may time.
Case = GridCase | FurtherCase


def further_cases() -> Iterator[FurtherCase]:
    """What FlashMLA publishes of fp8 caches and of indices, the same over other caches, and small batches."""
    for num_heads_q, seq_len_q in ((16, 1), (128, 1), (128, 2)):
        yield FurtherCase("mla_decode", "dense_fp8", 128, seq_len_q, num_heads_q, 8192)
    yield FurtherCase("mla_decode", "dense_fp8", 1, 1, 128, 8192)
    for num_heads_q in (16, 128):
        yield FurtherCase("mla_decode", "fp8_656", 128, 1, num_heads_q, 8192)
    for kv_format in ("fp8_656", "fp8_584", "dense"):
        for num_heads_q in (64, 128):
            yield FurtherCase("mla_sparse_decode", kv_format, 128, 2, num_heads_q, 262144, 2048)
    for batch_size in (1, 4):
        yield FurtherCase("mla_sparse_decode", "fp8_656", batch_size, 1, 128, 262144, 2048)
    for num_heads_q, topk in ((64, 2048), (128, 2048), (128, 512)):
        yield FurtherCase("mla_sparse_prefill", "dense", 1, 4096, num_heads_q, 8192, topk)
