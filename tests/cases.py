"""One decode case: the tensors of a call, with everything that must not be used poisoned."""

from __future__ import annotations

import dataclasses
import math

import torch

PAGE_BLOCK_SIZE = 64
HEAD_DIM_QK = 576
HEAD_DIM_V = 512


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and values of a call; equal cases make equal tensors."""

    lengths: tuple[int, ...]
    seq_len_q: int = 1
    num_heads_q: int = 16
    num_heads_k: int = 1
    causal: bool = False
    dtype: torch.dtype = torch.bfloat16
    page_block_size: int = PAGE_BLOCK_SIZE
    head_dim_qk: int = HEAD_DIM_QK
    # How far to the left and to the right of its own position a query sees; -1 is all the way.
    window: tuple[int, int] = (-1, -1)
    # With attention sinks: one is -inf, one is +inf, the rest are about as large as a log-sum-exp.
    has_sink: bool = False
    softmax_scale: float | None = None
    # Standard deviation of q: large values make the softmax peaky and its running maximum grow.
    q_std: float = 1.0
    # Pages that no request uses, and columns of block_table past the longest request.
    spare_pages: int = 2
    spare_columns: int = 1
    unused_page_id: int = 2147480000
    seed: int = 0

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def scale(self) -> float:
        return self.head_dim_qk**-0.5 if self.softmax_scale is None else self.softmax_scale

    def pages(self, request: int) -> range:
        """Columns of the block table that are used: pages that hold a token that some query sees."""
        length, left = self.lengths[request], self.window[0]
        first = max(length - self.seq_len_q - left, 0) if left >= 0 else 0
        return range(first // self.page_block_size, -(-length // self.page_block_size))

    def __str__(self) -> str:
        lengths = "-".join(map(str, self.lengths[:4])) + ("…" if len(self.lengths) > 4 else "")
        dtype = {torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]
        return (
            f"b{self.batch_size}_L{lengths}_h{self.num_heads_q}k{self.num_heads_k}_s{self.seq_len_q}"
            f"_{'causal' if self.causal else 'full'}_{dtype}_p{self.page_block_size}_d{self.head_dim_qk}"
            f"_w{self.window[0]},{self.window[1]}{'_sink' if self.has_sink else ''}"
        )


@dataclasses.dataclass
class Inputs:
    q: torch.Tensor
    k_cache: torch.Tensor
    block_table: torch.Tensor
    cache_seqlens: torch.Tensor
    attn_sink: torch.Tensor | None = None

    def to(self, device: torch.device) -> Inputs:
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return Inputs(*(value if value is None else value.to(device) for value in values))


def make_inputs(case: Case) -> Inputs:
    """CPU tensors of a case: shuffled pages, NaN wherever nothing may be read, garbage in unused table entries."""
    generator = torch.Generator().manual_seed(case.seed)
    pages = [case.pages(request) for request in range(case.batch_size)]
    num_blocks = sum(map(len, pages)) + case.spare_pages
    columns = max((columns.stop for columns in pages), default=0) + case.spare_columns
    q = torch.randn((case.batch_size, case.seq_len_q, case.num_heads_q, case.head_dim_qk), generator=generator)
    k_cache = torch.full(
        (num_blocks, case.page_block_size, case.num_heads_k, case.head_dim_qk), float("nan"), dtype=case.dtype
    )
    block_table = torch.full((case.batch_size, columns), case.unused_page_id, dtype=torch.int32)
    free = torch.randperm(num_blocks, generator=generator).tolist()
    for request, length in enumerate(case.lengths):
        for column in pages[request]:
            page = free.pop()
            block_table[request, column] = page
            tokens = min(length - column * case.page_block_size, case.page_block_size)
            values = torch.randn((tokens, case.num_heads_k, case.head_dim_qk), generator=generator)
            k_cache[page, :tokens] = values.to(case.dtype)
    cache_seqlens = torch.tensor(case.lengths, dtype=torch.int32)
    attn_sink = None
    if case.has_sink:
        attn_sink = 2 * torch.randn(case.num_heads_q, generator=generator) + 3
        if case.num_heads_q > 2:
            attn_sink[:2] = torch.tensor([math.inf, -math.inf])
    return Inputs((q * case.q_std).to(case.dtype), k_cache, block_table, cache_seqlens, attn_sink)
