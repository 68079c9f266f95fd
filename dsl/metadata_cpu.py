"""The tile scheduler as a serial C function; `metadata_cuda` says what it does."""

from types import SimpleNamespace

import tilelang.language as T

from tilemla.dsl.order import may_be_keys, play_ordered_cpu, rank_of
from tilemla.dsl.plans import (
    NEVER,
    NUM_ORDERED,
    NUM_UNORDERED,
    PLAYED_SIZE,
    is_ordered,
    may_cut,
    may_order,
    payload_of,
    plan_cost,
    play_request,
    share_of,
    start_play,
)
from tilemla.dsl.program import Program
from tilemla.dsl.schedule import MOST_ORDERED, NUM_COLUMNS, ORDERED, idle_row, write_order, write_part
from tilemla.dsl.walk import (
    SPLIT,
    STATE_SIZE,
    blocks_of,
    close_part,
    count_visible,
    first_visible,
    four_places,
    request_at_step,
    start_walk,
    walk_request,
)

_FIRST, _END, _PREVIOUS_END, _BLOCKS_SIZE = range(4)  # of the request that is walked, and the one before it


def make_metadata_program_cpu() -> Program:
    """The scheduler as a serial C function.

    Returns
    -------
    Program
        ``get_mla_metadata(cache_seqlens (b,) int32, tile_scheduler_metadata (num_sm_parts, 8) int32,
        num_splits (b + 1,) int32, overhead, combine_eighths, piece_64ths, crowded_eighths, seq_len_q, window_left,
        reorder)``; fills the second and the third. The integers after them are int32: four costs, as ``tilemla.costs``
        has them, the queries of a request, how far back from its own position a query sees, as
        ``attention.first_visible_key`` has it, and whether requests may be visited in another order: 0 for sparse
        decode, whose kernels take none.
    """
    b, num_sm_parts = T.dynamic("b, num_sm_parts")

    @T.macro
    def rank_requests(ranked, ranked_blocks, num_blocks, batch_size, cache_seqlens, seq_len_q, window_left):
        rank = T.alloc_var("int32", init=0)
        for request in T.serial(b):
            num_blocks[request] = count_visible(cache_seqlens[request], seq_len_q, window_left)
        for request in T.serial(b):
            rank_of(rank, num_blocks, request, batch_size)
            ranked[rank] = request
            ranked_blocks[rank] = num_blocks[request]

    @T.prim_func
    def get_mla_metadata(
        cache_seqlens: T.Tensor((b,), "int32"),
        tile_scheduler_metadata: T.Tensor((num_sm_parts, NUM_COLUMNS), "int32"),
        num_splits: T.Tensor((b + 1,), "int32"),
        overhead: T.int32,
        combine_eighths: T.int32,
        piece_64ths: T.int32,
        crowded_eighths: T.int32,
        seq_len_q: T.int32,
        window_left: T.int32,
        reorder: T.int32,
    ):
        with T.Kernel(1, threads=1) as _:
            batch_size = T.alloc_var("int32", init=b)  # a dynamic size itself would be renamed by a macro
            state = T.alloc_local((STATE_SIZE,), "int32")
            total = T.alloc_local((1,), "int32")
            blocks = T.alloc_local((_BLOCKS_SIZE,), "int32")
            played = T.alloc_local((PLAYED_SIZE,), "int32")
            best = T.alloc_local((2,), "int32")  # plan and its cost
            num_blocks = T.alloc_local((MOST_ORDERED,), "int32")
            ranked = T.alloc_local((MOST_ORDERED,), "int32")
            ranked_blocks = T.alloc_local((MOST_ORDERED,), "int32")
            is_taken = T.alloc_local((MOST_ORDERED,), "int32")
            tried = T.alloc_local((MOST_ORDERED,), "int32")
            order = T.alloc_local((1, MOST_ORDERED), "int32")  # of the best plan
            costs = SimpleNamespace(
                num_sm_parts=num_sm_parts,
                combine_eighths=combine_eighths,
                piece_64ths=piece_64ths,
                crowded_eighths=crowded_eighths,
                may_order=may_order(reorder, b, num_sm_parts),
            )
            total[0] = 0
            for request in T.serial(b):
                total[0] = total[0] + count_visible(cache_seqlens[request], seq_len_q, window_left) + overhead
            share = T.alloc_var("int32", init=share_of(total[0], num_sm_parts))
            best[0] = 0
            best[1] = NEVER
            for plan in T.serial(NUM_UNORDERED):
                payload = payload_of(plan, share)
                if payload > overhead:
                    start_play(played, 0, 0, payload, overhead)
                    for request in T.serial(b):
                        visible = T.alloc_var(
                            "int32", init=count_visible(cache_seqlens[request], seq_len_q, window_left)
                        )
                        play_request(played, request, visible, payload, may_cut(plan), overhead)
                    cost = T.alloc_var("int32", init=plan_cost(played, plan, costs))
                    if cost < best[1]:
                        best[0] = plan
                        best[1] = cost
            if costs.may_order:
                rank_requests(ranked, ranked_blocks, num_blocks, batch_size, cache_seqlens, seq_len_q, window_left)
                for number in T.serial(NUM_ORDERED):
                    plan = NUM_UNORDERED + number
                    payload = payload_of(plan, share)
                    if (payload > overhead) & may_be_keys(ranked_blocks):
                        play_ordered_cpu(
                            played, tried, is_taken, ranked, ranked_blocks, batch_size, payload, may_cut(plan), overhead
                        )
                        cost = T.alloc_var("int32", init=plan_cost(played, plan, costs))
                        if cost < best[1]:
                            best[0] = plan
                            best[1] = cost
                            for place in T.serial(b):
                                order[0, place] = tried[place]
            ordered = T.alloc_var("bool", init=is_ordered(best[0]))
            first_place = T.alloc_var("int32", init=T.if_then_else(ordered, ORDERED, 0))
            payload = T.alloc_var("int32", init=payload_of(best[0], share))
            for part in T.serial(num_sm_parts):
                write_part(tile_scheduler_metadata, part, idle_row(b))
                write_order(
                    tile_scheduler_metadata,
                    part,
                    T.if_then_else(ordered, four_places(order, 0, part, b), 0),
                )
            blocks[_PREVIOUS_END] = 0
            for step in T.serial(b):
                request = T.alloc_var("int32", init=request_at_step(order, 0, ordered, step))
                blocks[_FIRST] = first_visible(cache_seqlens[request], seq_len_q, window_left)
                blocks[_END] = blocks_of(cache_seqlens[request])
                if step == 0:
                    start_walk(state, first_place, blocks[_FIRST], payload)
                walk_request(
                    tile_scheduler_metadata,
                    state,
                    first_place + step,
                    blocks[_FIRST],
                    blocks[_END],
                    blocks[_PREVIOUS_END],
                    payload,
                    may_cut(best[0]),
                    num_sm_parts,
                    overhead,
                )
                num_splits[request + 1] = state[SPLIT] + 1
                blocks[_PREVIOUS_END] = blocks[_END]
            if b > 0:
                close_part(tile_scheduler_metadata, state, first_place + b - 1, blocks[_PREVIOUS_END], 0)
            num_splits[0] = 0
            for request in T.serial(b):
                num_splits[request + 1] = num_splits[request + 1] + num_splits[request]

    return Program(get_mla_metadata, {"tl.disable_safe_memory_legalize": True})
