"""The published benchmark's cases: what FlashMLA's own test checks and times, made on the device that runs them."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator

import torch

from cases import HEAD_DIM_QK, PAGE_BLOCK_SIZE

UNUSED_PAGE_IDS = (2147480000, -1)


@dataclasses.dataclass(frozen=True)
class GridCase:
    """One line of the grid. A varied length is normal around ``mean_length`` with half of it as deviation."""

    batch_size: int
    mean_length: int
    num_heads_q: int
    seq_len_q: int
    num_heads_k: int = 1
    is_varied: bool = False
    has_zero_lengths: bool = False
    causal: bool = True
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0

    def __str__(self) -> str:
        dtype = {torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]
        lengths = ("~" if self.is_varied else "") + str(self.mean_length) + ("/0" if self.has_zero_lengths else "")
        mask = "causal" if self.causal else "full"
        return f"b{self.batch_size} L{lengths} h{self.num_heads_q}k{self.num_heads_k} s{self.seq_len_q} {mask} {dtype}"

    def make_lengths(self) -> list[int]:
        draw = random.Random(self.seed)
        lengths = [self.mean_length] * self.batch_size
        if self.is_varied:
            lengths = [
                max(int(draw.normalvariate(self.mean_length, self.mean_length / 2)), self.seq_len_q) for _ in lengths
            ]
        if self.has_zero_lengths:
            lengths = [length if draw.random() < 0.5 else 0 for length in lengths]
        return lengths


@dataclasses.dataclass
class GridInputs:
    """q (b, s_q, h_q, 576), k_cache (num_blocks, 64, h_k, 576), block_table (b, columns), cache_seqlens (b,)."""

    q: torch.Tensor
    k_cache: torch.Tensor
    block_table: torch.Tensor
    cache_seqlens: torch.Tensor
    lengths: list[int]


def make_grid_inputs(case: GridCase, device: torch.device, *, poison: bool = True) -> GridInputs:
    """Random values as upstream draws them, a shuffled block table, and NaN wherever nothing may be read."""
    generator = torch.Generator(device=device).manual_seed(case.seed)
    lengths = case.make_lengths()
    num_pages = [-(-length // PAGE_BLOCK_SIZE) for length in lengths]
    num_blocks = sum(num_pages) + 3
    k_cache = torch.empty((num_blocks, PAGE_BLOCK_SIZE, case.num_heads_k, HEAD_DIM_QK), dtype=case.dtype, device=device)
    k_cache.normal_(generator=generator).div_(10).clamp_(-1, 1)
    q = torch.randn(
        (case.batch_size, case.seq_len_q, case.num_heads_q, HEAD_DIM_QK), generator=generator, device=device
    )
    pages = torch.randperm(num_blocks, generator=generator, device=device).to(torch.int32)
    columns = max(num_pages, default=0) + 2
    block_table = torch.full(
        (case.batch_size, columns), UNUSED_PAGE_IDS[case.seed % 2], dtype=torch.int32, device=device
    )
    first = 0
    for request, (length, count) in enumerate(zip(lengths, num_pages, strict=True)):
        block_table[request, :count] = pages[first : first + count]
        first += count
        if poison and length % PAGE_BLOCK_SIZE:
            k_cache[int(pages[first - 1]), length % PAGE_BLOCK_SIZE :] = torch.nan
    if poison:
        k_cache[pages[first:].long()] = torch.nan
    cache_seqlens = torch.tensor(lengths, dtype=torch.int32, device=device)
    return GridInputs(q.div_(10).clamp_(-1, 1).to(case.dtype), k_cache, block_table, cache_seqlens, lengths)


def benchmark_grid() -> Iterator[GridCase]:
    """The 32 cases that FlashMLA publishes times of."""
    for mean_length, num_heads_q, seq_len_q, is_varied in itertools.product(
        (4096, 8192), (16, 32, 64, 128), (1, 2), (False, True)
    ):
        yield GridCase(128, mean_length, num_heads_q, seq_len_q, is_varied=is_varied)


def small_grid() -> Iterator[GridCase]:
    """What a CPU gets through in a minute."""
    for num_heads_q, seq_len_q, is_varied in itertools.product((16, 64), (1, 2), (False, True)):
        yield GridCase(2, 256, num_heads_q, seq_len_q, is_varied=is_varied)


HEAD_COUNTS = ((1, 1), (3, 1), (9, 1), (16, 1), (63, 1), (64, 1), (126, 1), (128, 1), (6, 2), (9, 3), (64, 8))


def correctness_cases() -> Iterator[GridCase]:
    """Over 1,000 cases: batches, lengths fixed, varied and zero, head counts, queries, masks and dtypes."""
    shapes = itertools.product((1, 2, 6, 64, 128), (1, 2, 4), (20, 140, 4096), HEAD_COUNTS, (False, True))
    for seed, (batch_size, seq_len_q, mean_length, (num_heads_q, num_heads_k), causal) in enumerate(shapes):
        if batch_size * mean_length * num_heads_k > 128 * 4096:
            continue  # several KV heads and the longest lengths: the cache alone would be gigabytes
        for kind in ("fixed", "varied", "zero") if seed % 3 == 0 else (("fixed", "varied", "zero")[seed % 3],):
            yield GridCase(
                batch_size,
                mean_length,
                num_heads_q,
                seq_len_q,
                num_heads_k=num_heads_k,
                is_varied=kind != "fixed",
                has_zero_lengths=kind == "zero",
                causal=causal,
                dtype=torch.float16 if seed % 4 == 3 else torch.bfloat16,
                seed=seed,
            )
