"""A paged latent cache: who owns which page, and the table that says so to the kernels."""

from __future__ import annotations

import math
from collections import deque

import torch

PAGE_BLOCK_SIZE = 64
HEAD_DIM_LATENT, HEAD_DIM_ROPE = 512, 64
# What stands where no page is. A kernel that believed it would leave the cache by far.
NO_PAGE = 2147480000


class PagedLatentCache:
    """The latents of every layer and request, in pages that requests take and give back.

    A token takes 512 + 64 elements in each layer: its compressed latent and the rotated part of its key, both shared by
    all heads. A page has the same id in every layer, so that one block table serves them all.

    Parameters
    ----------
    num_layers : int
        Layers of the model.
    num_blocks : int
        Pages of 64 tokens that requests share.
    max_requests : int
        Requests that may hold pages at a time.
    max_tokens : int
        The longest request, prompt and answer together.
    dtype : torch.dtype
        bfloat16 or float16.
    device : torch.device
        Where the pages and the table live.

    Attributes
    ----------
    pages : Tensor, (num_layers, num_blocks + 1, 64, 1, 576), dtype
        The latents. They begin as NaN: whoever reads a slot that was never written shows it. The page after the last is
        nobody's; rows that only fill up a batch write there.
    block_table : Tensor, (max_requests + 1, max_num_blocks_per_seq), int32
        Page ids of each request, ``NO_PAGE`` where it has none. The last row belongs to no request.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        max_requests: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, num_blocks + 1, PAGE_BLOCK_SIZE, 1, HEAD_DIM_LATENT + HEAD_DIM_ROPE)
        self.pages = torch.full(shape, math.nan, dtype=dtype, device=device)
        width = -(-max_tokens // PAGE_BLOCK_SIZE)
        self.block_table = torch.full((max_requests + 1, width), NO_PAGE, dtype=torch.int32, device=device)
        self.idle_row = max_requests
        self.block_table[self.idle_row, 0] = num_blocks
        self._free_pages = deque(range(num_blocks))
        self._free_rows = deque(range(max_requests))
        self._owned: dict[int, list[int]] = {}
        self._max_tokens, self._num_blocks = max_tokens, num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Pages that no request holds."""
        return len(self._free_pages)

    def admit(self, num_tokens: int) -> int | None:
        """Give a request all the pages that it can come to need.

        Parameters
        ----------
        num_tokens : int
            Tokens of its prompt and answer.

        Returns
        -------
        row : int or None
            Its row of ``block_table``; None when there is no row or there are not enough pages until another request
            leaves.

        Raises
        ------
        ValueError
            When the request would not fit even if it were alone.
        """
        needed = -(-num_tokens // PAGE_BLOCK_SIZE)
        if num_tokens > self._max_tokens or needed > self._num_blocks:
            raise ValueError(
                f"a request of {num_tokens} tokens ({needed} pages) can never be served from a cache of "
                f"{self._num_blocks} pages for requests of up to {self._max_tokens} tokens; make the cache larger"
            )
        if not self._free_rows or needed > len(self._free_pages):
            return None
        row = self._free_rows.popleft()
        self._owned[row] = [self._free_pages.popleft() for _ in range(needed)]
        self.block_table[row, :needed] = torch.tensor(self._owned[row], dtype=torch.int32)
        return row

    def release(self, row: int) -> None:
        """Take back the row and the pages of a request that is done."""
        self._free_pages.extend(self._owned.pop(row))
        self._free_rows.append(row)
        self.block_table[row] = NO_PAGE
