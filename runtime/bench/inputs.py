"""The tensors of a case, made on the device that runs it."""

from __future__ import annotations

import dataclasses

import torch

from tilemla.bench.cases import HEAD_DIM_QK, PAGE_BLOCK_SIZE, GridCase

UNUSED_PAGE_IDS = (2147480000, -1)
_SPARE_PAGES, _SPARE_COLUMNS = 3, 2


@dataclasses.dataclass(frozen=True)
class GridInputs:
    """The tensors of one decode call.

    Parameters
    ----------
    q : Tensor, (batch_size, seq_len_q, num_heads_q, 576)
        Queries, of the case's dtype.
    k_cache : Tensor, (num_blocks, 64, num_heads_k, 576)
        Pages of the cache, of the case's dtype.
    block_table : Tensor, (batch_size, columns), int32
        Page ids of each request, in an order of chance; entries past its length are no page.
    cache_seqlens : Tensor, (batch_size,), int32
        Tokens of each request.
    lengths : list of int
        The same on the host.
    """

    q: torch.Tensor
    k_cache: torch.Tensor
    block_table: torch.Tensor
    cache_seqlens: torch.Tensor
    lengths: list[int]


def make_inputs(case: GridCase, device: torch.device, *, poison: bool) -> GridInputs:
    """Draw values as upstream does, and shuffle the pages.

    Parameters
    ----------
    case : GridCase
        Equal cases get equal tensors on the same device.
    device : torch.device
        Where the tensors are made.
    poison : bool
        Put NaN wherever nothing may be read: slots past a request's length, and pages that no request has. A check
        wants that; a timing must not time NaN.
    """
    dtype: torch.dtype = getattr(torch, case.dtype)
    generator = torch.Generator(device=device).manual_seed(case.seed)
    lengths = case.make_lengths()
    num_pages = [-(-length // PAGE_BLOCK_SIZE) for length in lengths]
    num_blocks = sum(num_pages) + _SPARE_PAGES
    k_cache = torch.empty((num_blocks, PAGE_BLOCK_SIZE, case.num_heads_k, HEAD_DIM_QK), dtype=dtype, device=device)
    k_cache.normal_(generator=generator).div_(10).clamp_(-1, 1)
    q = torch.randn(
        (case.batch_size, case.seq_len_q, case.num_heads_q, HEAD_DIM_QK), generator=generator, device=device
    )
    pages = torch.randperm(num_blocks, generator=generator, device=device).to(torch.int32)
    columns = max(num_pages, default=0) + _SPARE_COLUMNS
    unused = UNUSED_PAGE_IDS[case.seed % len(UNUSED_PAGE_IDS)]
    block_table = torch.full((case.batch_size, columns), unused, dtype=torch.int32, device=device)
    first = 0
    for request, (length, count) in enumerate(zip(lengths, num_pages, strict=True)):
        block_table[request, :count] = pages[first : first + count]
        first += count
        if poison and length % PAGE_BLOCK_SIZE:
            k_cache[int(pages[first - 1]), length % PAGE_BLOCK_SIZE :] = torch.nan
    if poison:
        k_cache[pages[first:].long()] = torch.nan
    cache_seqlens = torch.tensor(lengths, dtype=torch.int32, device=device)
    return GridInputs(q.div_(10).clamp_(-1, 1).to(dtype), k_cache, block_table, cache_seqlens, lengths)
