"""One decode case: the tensors of a call, with everything that must not be used poisoned."""

from __future__ import annotations

import dataclasses

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
        return HEAD_DIM_QK**-0.5 if self.softmax_scale is None else self.softmax_scale

    def __str__(self) -> str:
        lengths = "-".join(map(str, self.lengths[:4])) + ("…" if len(self.lengths) > 4 else "")
        dtype = {torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]
        return (
            f"b{self.batch_size}_L{lengths}_h{self.num_heads_q}k{self.num_heads_k}_s{self.seq_len_q}"
            f"_{'causal' if self.causal else 'full'}_{dtype}"
        )


@dataclasses.dataclass
class Inputs:
    q: torch.Tensor
    k_cache: torch.Tensor
    block_table: torch.Tensor
    cache_seqlens: torch.Tensor

    def to(self, device: torch.device) -> Inputs:
        return Inputs(*(getattr(self, field.name).to(device) for field in dataclasses.fields(self)))


def make_inputs(case: Case) -> Inputs:
    """CPU tensors of a case: shuffled pages, NaN wherever nothing may be read, garbage in unused table entries."""
    generator = torch.Generator().manual_seed(case.seed)
    num_pages = [-(-length // PAGE_BLOCK_SIZE) for length in case.lengths]
    num_blocks = sum(num_pages) + case.spare_pages
    columns = max(num_pages, default=0) + case.spare_columns
    q = torch.randn((case.batch_size, case.seq_len_q, case.num_heads_q, HEAD_DIM_QK), generator=generator)
    k_cache = torch.full((num_blocks, PAGE_BLOCK_SIZE, case.num_heads_k, HEAD_DIM_QK), float("nan"), dtype=case.dtype)
    block_table = torch.full((case.batch_size, columns), case.unused_page_id, dtype=torch.int32)
    free = torch.randperm(num_blocks, generator=generator).tolist()
    for request, length in enumerate(case.lengths):
        for column in range(num_pages[request]):
            page = free.pop()
            block_table[request, column] = page
            tokens = min(length - column * PAGE_BLOCK_SIZE, PAGE_BLOCK_SIZE)
            values = torch.randn((tokens, case.num_heads_k, HEAD_DIM_QK), generator=generator)
            k_cache[page, :tokens] = values.to(case.dtype)
    cache_seqlens = torch.tensor(case.lengths, dtype=torch.int32)
    return Inputs((q * case.q_std).to(case.dtype), k_cache, block_table, cache_seqlens)
