"""The floor that is measured beside ours: a kernel that reads the pages of a call and does nothing with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tilemla.bench.cases import PAGE_BLOCK_SIZE, GridCase
from tilemla.bench.inputs import GridInputs
from tilemla.launch import num_sms_of
from tilemla.loader import load_module
from tilemla.select import arch_of
from tilemla.spec import BENCHMARK_SPECS
from tilemla.validate import METADATA_FIELDS


def spread_pages(lengths: Sequence[int], num_parts: int) -> list[list[int]]:
    """Cut the pages of a batch into parts that differ by one page at most, whatever cutting would cost a decode call.

    Parameters
    ----------
    lengths : sequence of int
        Tokens of each request.
    num_parts : int
        How many parts there are.

    Returns
    -------
    list of list of int
        The rows of ``tile_scheduler_metadata``. The columns that only a decode kernel reads are 0.
    """
    pages = [(request, page) for request, length in enumerate(lengths) for page in range(-(-length // PAGE_BLOCK_SIZE))]
    share, rest = divmod(len(pages), num_parts)
    rows, first = [], 0
    for part in range(num_parts):
        own = pages[first : first + share + (part < rest)]
        first += len(own)
        if own:
            (begin, begin_page), (end, last_page) = own[0], own[-1]
            rows.append([begin, end, begin_page, last_page + 1] + [0] * (METADATA_FIELDS - 4))
        else:
            rows.append([len(lengths), len(lengths) - 1] + [0] * (METADATA_FIELDS - 2))
    return rows


class PageReader:
    """The module of kernel ``read_pages`` for a device.

    Parameters
    ----------
    device : torch.device
        Where it runs.
    dtype : str
        Of the cache.

    Raises
    ------
    NotImplementedError
        When there is no such kernel for the device, or its module is not built and cannot be.
    """

    name = "read-only"

    def __init__(self, device: torch.device, dtype: str) -> None:
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        arch = arch_of(device.type, capability)
        spec = next((spec for spec in BENCHMARK_SPECS if (spec.arch, spec.dtype) == (arch, dtype)), None)
        if spec is None:
            raise NotImplementedError(f"there is no kernel that only reads for {arch or device.type} and {dtype}")
        self._read_pages = load_module(spec).functions["read_pages"]

    def prepare(self, case: GridCase, inputs: GridInputs) -> Callable[[], None]:
        """Spread the pages of a case over the device; returns the call that reads them."""
        device = inputs.k_cache.device
        rows = spread_pages(inputs.lengths, max(num_sms_of(device) // case.num_heads_k, 1))
        schedule = torch.tensor(rows, dtype=torch.int32, device=device)

        def call() -> None:
            self._read_pages(inputs.k_cache, inputs.block_table, inputs.cache_seqlens, schedule)

        return call


def find_reader(device: torch.device, dtype: str) -> PageReader | str:
    """The reader for a device, or why there is none: the benchmark says something without it."""
    try:
        return PageReader(device, dtype)
    except NotImplementedError as error:
        return str(error)
