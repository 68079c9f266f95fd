"""The schedule of a batch-invariant call: a request is cut by its own length alone, never by its neighbours'.

Cuts lie at the multiples of ``blocks_per_split`` blocks, counted from the start of a request's cache, and every piece
has a part of its own: part ``num_splits[request] + piece``. Parts that are left over are idle. There is room for
``num_sm_parts // b`` pieces of a request; should one be longer than its caller said, the last of them takes the rest.
"""

from typing import Any

import tilelang.language as T

from tilemla.dsl.attention import first_visible_block
from tilemla.dsl.program import Program
from tilemla.dsl.schedule import BLOCK_N, NUM_COLUMNS, Part, count_blocks, idle_row, write_order, write_part

_SCAN_STEPS = 10
_SCAN_THREADS = 1 << _SCAN_STEPS
_THREADS = 256  # of a CTA that writes parts, one each


def _first_piece(first, blocks_per_split) -> Any:
    """Pieces that lie before the window, int32."""
    return T.truncdiv(first, blocks_per_split)


def _count_pieces(cache_seqlen, max_pieces, cut) -> Any:
    """Pieces of a request, 1 or more, int32."""
    first = first_visible_block(cache_seqlen, cut.seq_len_q, cut.window_left, BLOCK_N)
    end_piece = T.truncdiv(count_blocks(cache_seqlen, BLOCK_N) + cut.blocks_per_split - 1, cut.blocks_per_split)
    return T.max(T.min(end_piece - _first_piece(first, cut.blocks_per_split), max_pieces), 1)


def _piece(request, piece, pieces, cache_seqlen, cut) -> Part:
    """The row of a part that is one piece of a request."""
    first = first_visible_block(cache_seqlen, cut.seq_len_q, cut.window_left, BLOCK_N)
    end = count_blocks(cache_seqlen, BLOCK_N)
    begin_cut = (_first_piece(first, cut.blocks_per_split) + piece) * cut.blocks_per_split
    is_split = T.if_then_else(pieces > 1, 1, 0)
    return Part(
        begin_place=request,
        end_place_inclusive=request,
        begin_block=T.max(begin_cut, first),
        end_block=T.if_then_else(piece < pieces - 1, begin_cut + cut.blocks_per_split, end),
        begin_split=piece,
        is_first_request_split=is_split,
        is_last_request_split=is_split,
    )


@T.macro
def _write_part(cache_seqlens, metadata, num_splits, b, part, cut):
    """Find the request that a part belongs to in the prefix sum, and write the part's row."""
    bounds = T.alloc_local((2,), "int32")  # num_splits[bounds[0]] <= part < num_splits[bounds[1]], if not idle
    bounds[0] = 0
    bounds[1] = b
    while bounds[1] - bounds[0] > 1:
        middle = T.truncdiv(bounds[0] + bounds[1], 2)
        if num_splits[middle] <= part:
            bounds[0] = middle
        else:
            bounds[1] = middle
    if part < num_splits[b]:
        request = bounds[0]
        pieces = num_splits[request + 1] - num_splits[request]
        write_part(metadata, part, _piece(request, part - num_splits[request], pieces, cache_seqlens[request], cut))
    else:
        write_part(metadata, part, idle_row(b))
    write_order(metadata, part, 0)


class _Cut:
    """What decides where requests are cut, as int32 expressions."""

    def __init__(self, blocks_per_split, seq_len_q, window_left) -> None:
        self.blocks_per_split = blocks_per_split
        self.seq_len_q = seq_len_q
        self.window_left = window_left


def make_batch_invariant_program_cpu() -> Program:
    """The schedule as a serial C function.

    Returns
    -------
    Program
        ``get_batch_invariant_metadata(cache_seqlens (b,) int32, tile_scheduler_metadata (num_sm_parts, 8) int32,
        num_splits (b + 1,) int32, blocks_per_split, seq_len_q, window_left)``; fills the second and the third. The
        integers after them are int32: blocks between two cuts, and as for ``get_mla_metadata``.
    """
    b, num_sm_parts = T.dynamic("b, num_sm_parts")

    @T.prim_func
    def get_batch_invariant_metadata(
        cache_seqlens: T.Tensor((b,), "int32"),
        tile_scheduler_metadata: T.Tensor((num_sm_parts, NUM_COLUMNS), "int32"),
        num_splits: T.Tensor((b + 1,), "int32"),
        blocks_per_split: T.int32,
        seq_len_q: T.int32,
        window_left: T.int32,
    ):
        cut = _Cut(blocks_per_split, seq_len_q, window_left)
        with T.Kernel(1, threads=1) as _:
            num_splits[0] = 0
            for request in T.serial(b):
                num_splits[request + 1] = num_splits[request] + _count_pieces(
                    cache_seqlens[request], T.truncdiv(num_sm_parts, b), cut
                )
            for part in T.serial(num_sm_parts):
                _write_part(cache_seqlens, tile_scheduler_metadata, num_splits, b, part, cut)

    return Program(get_batch_invariant_metadata, {"tl.disable_safe_memory_legalize": True})


def make_batch_invariant_program_cuda() -> Program:
    """The schedule in parallel: one CTA adds up the pieces of all requests, then each part has a thread.

    Returns
    -------
    Program
        As `make_batch_invariant_program_cpu`.
    """
    b, num_sm_parts = T.dynamic("b, num_sm_parts")

    @T.prim_func
    def get_batch_invariant_metadata(
        cache_seqlens: T.Tensor((b,), "int32"),
        tile_scheduler_metadata: T.Tensor((num_sm_parts, NUM_COLUMNS), "int32"),
        num_splits: T.Tensor((b + 1,), "int32"),
        blocks_per_split: T.int32,
        seq_len_q: T.int32,
        window_left: T.int32,
    ):
        cut = _Cut(blocks_per_split, seq_len_q, window_left)
        with T.Kernel(1, threads=_SCAN_THREADS) as _:
            # Of the pieces of all threads up to this one; a thread has a run of requests, whatever their number.
            sums = T.alloc_shared((_SCAN_THREADS,), "int32", scope="shared")
            tx = T.get_thread_binding()
            max_pieces = T.truncdiv(num_sm_parts, T.max(b, 1))
            run = T.ceildiv(b, _SCAN_THREADS)
            own = T.alloc_var("int32", init=0)
            before = T.alloc_var("int32", init=0)
            for i in T.serial(run):
                if tx * run + i < b:
                    own += _count_pieces(cache_seqlens[tx * run + i], max_pieces, cut)
            sums[tx] = own
            T.sync_threads()
            for step in T.serial(_SCAN_STEPS):
                distance = T.shift_left(1, step)
                before = T.if_then_else(tx >= distance, sums[T.max(tx - distance, 0)], 0)
                T.sync_threads()
                sums[tx] += before
                T.sync_threads()
            before = sums[tx] - own
            if tx == 0:
                num_splits[0] = 0
            for i in T.serial(run):
                if tx * run + i < b:
                    before += _count_pieces(cache_seqlens[tx * run + i], max_pieces, cut)
                    num_splits[tx * run + i + 1] = before

        with T.Kernel(T.ceildiv(num_sm_parts, _THREADS), threads=_THREADS) as block:
            part = block * _THREADS + T.get_thread_binding()
            if part < num_sm_parts:
                _write_part(cache_seqlens, tile_scheduler_metadata, num_splits, b, part, cut)

    return Program(
        get_batch_invariant_metadata,
        {
            "tl.disable_thread_storage_sync": True,  # barriers are placed by hand
            "tl.disable_warp_specialized": True,
            "tl.disable_safe_memory_legalize": True,
        },
    )
