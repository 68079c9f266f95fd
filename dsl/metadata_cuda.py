"""The tile scheduler: cuts a batch of sequences of any lengths into parts of about equal cost.

Which payload, whether requests may be cut, and in which order they come is tried out: plans are played through beside
each other, and the cheapest that fits into the parts is carried out (`plans`, `order`, `walk`). With ``share`` the
equal share of the total cost, a payload of ``share + overhead`` always works: a part either adds an overhead by cutting
a request or leaves at most that much unused.
"""

from types import SimpleNamespace

import tilelang.language as T

from tilemla.dsl.order import may_be_keys, play_ordered_warp, rank_of
from tilemla.dsl.plans import (
    CUTS,
    NEVER,
    NUM_MARKED,
    NUM_ORDERED,
    NUM_UNORDERED,
    OPENED_BY,
    PLAYED_SIZE,
    is_ordered,
    mark_play,
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
    resume_walk,
    walk_request,
)

_CHUNK = 1024  # lengths staged through shared memory at a time
_LANES = NUM_UNORDERED  # of the warp that plays a plan a lane, then walks a segment of the places a lane
_ORDERED_THREADS = 32 * NUM_ORDERED  # a warp a plan
_LOADS = 4  # of a lane that are under way at once


def make_metadata_program_cuda() -> Program:
    """The scheduler as a warp for requests as they come, and one for each plan that has an order.

    Of the first warp each lane plays a plan, then walks a segment of the places. Who plays a plan marks where it stands
    at the first place of each segment, and from there the chosen plan is walked. While plans are played lengths pass
    through shared memory in chunks, so that any batch size fits.

    Returns
    -------
    Program
        As `metadata_cpu.make_metadata_program_cpu`.
    """
    b, num_sm_parts = T.dynamic("b, num_sm_parts")

    @T.macro
    def load_chunk(blocks_shared, cache_seqlens, chunk, lane, seq_len_q, window_left):
        for step in T.serial(T.ceildiv(T.min(_CHUNK, b - chunk * _CHUNK), _LOADS * _LANES)):
            for load in T.unroll(_LOADS):
                at = (step * _LOADS + load) * _LANES + lane
                if chunk * _CHUNK + at < b:
                    blocks_shared[at] = count_visible(cache_seqlens[chunk * _CHUNK + at], seq_len_q, window_left)

    @T.macro
    def play_unordered(
        played, marks, blocks_shared, cache_seqlens, segment_size, share, overhead, seq_len_q, window_left, lane
    ):
        payload = T.alloc_var("int32", init=payload_of(lane, share))
        segment = T.alloc_var("int32", init=0)
        for chunk in T.serial(T.ceildiv(b, _CHUNK)):
            T.sync_warp()  # the last chunk has been played
            load_chunk(blocks_shared, cache_seqlens, chunk, lane, seq_len_q, window_left)
            T.sync_warp()
            if payload > overhead:
                # Read one ahead: the latency of shared memory is not waited for.
                following = T.alloc_var("int32", init=blocks_shared[0])
                if chunk == 0:
                    start_play(played, 0, following, payload, overhead)
                at = T.alloc_var("int32", init=0)
                in_chunk = T.alloc_var("int32", init=T.min(_CHUNK, b - chunk * _CHUNK))
                while at < in_chunk:
                    if chunk * _CHUNK + at == segment * segment_size:
                        mark_play(marks, segment, lane, played)
                        segment += 1
                    stop = T.alloc_var("int32", init=T.min(segment * segment_size - chunk * _CHUNK, in_chunk))
                    while at < stop:
                        num_blocks = T.alloc_var("int32", init=following)
                        following = blocks_shared[T.min(at + 1, _CHUNK - 1)]
                        play_request(played, chunk * _CHUNK + at, num_blocks, payload, may_cut(lane), overhead)
                        at += 1

    @T.macro
    def rank_requests(ranked, ranked_blocks, num_blocks, batch_size, cache_seqlens, seq_len_q, window_left, thread):
        # A thread a request, of all threads; what lies behind the last one is read by lanes and not used.
        if thread < b:
            num_blocks[thread] = count_visible(cache_seqlens[thread], seq_len_q, window_left)
        if thread < MOST_ORDERED:
            ranked_blocks[thread] = 0
        T.sync_threads()
        if thread < b:
            rank = T.alloc_var("int32", init=0)
            rank_of(rank, num_blocks, thread, batch_size)
            ranked[rank] = thread
            ranked_blocks[rank] = num_blocks[thread]
        T.sync_threads()

    @T.macro
    def sum_up_splits(num_splits, pieces, lane):
        # Of an ordered plan, whose pieces are counted out of turn.
        run = T.alloc_var("int32", init=T.truncdiv(b + _LANES - 1, _LANES))
        own = T.alloc_var("int32", init=0)
        for i in T.serial(run):
            if lane * run + i < b:
                own += pieces[lane * run + i]
        before = T.alloc_var("int32", init=own)
        for distance in (1, 2, 4, 8, 16):
            others = T.alloc_var("int32", init=T.shfl_up(before, distance))
            before += T.if_then_else(lane >= distance, others, 0)
        before -= own
        for i in T.serial(run):
            if lane * run + i < b:
                before += pieces[lane * run + i]
                num_splits[lane * run + i + 1] = before

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
        with T.Kernel(1, threads=_LANES + _ORDERED_THREADS) as _:
            blocks_shared = T.alloc_shared((_CHUNK,), "int32")
            # What is marked, segment, plan.
            marks = T.alloc_shared((NUM_MARKED, _LANES, NUM_UNORDERED + NUM_ORDERED), "int32")
            num_blocks = T.alloc_shared((MOST_ORDERED,), "int32")
            ranked = T.alloc_shared((MOST_ORDERED,), "int32")
            ranked_blocks = T.alloc_shared((MOST_ORDERED,), "int32")
            orders = T.alloc_shared((NUM_ORDERED, MOST_ORDERED), "int32")
            pieces = T.alloc_shared((MOST_ORDERED,), "int32")
            ordered_costs = T.alloc_shared((NUM_ORDERED,), "int32")
            state = T.alloc_local((STATE_SIZE,), "int32")
            played = T.alloc_local((PLAYED_SIZE,), "int32")
            tx = T.get_thread_binding()
            lane = tx % _LANES
            costs = SimpleNamespace(
                num_sm_parts=num_sm_parts,
                combine_eighths=combine_eighths,
                piece_64ths=piece_64ths,
                crowded_eighths=crowded_eighths,
                may_order=may_order(reorder, b, num_sm_parts),
            )
            # Bound, since a macro would rename a dynamic size.
            batch_size = T.alloc_var("int32", init=b)
            parts_there = T.alloc_var("int32", init=num_sm_parts)
            segment_size = T.alloc_var("int32", init=T.truncdiv(b + _LANES - 1, _LANES))
            total = T.alloc_var("int32", init=0)
            cost = T.alloc_var("int32", init=NEVER)
            share = T.alloc_var("int32", init=0)
            if costs.may_order:
                rank_requests(ranked, ranked_blocks, num_blocks, batch_size, cache_seqlens, seq_len_q, window_left, tx)
            if tx < _LANES:
                for step in T.serial(T.ceildiv(b, _LOADS * _LANES)):
                    for load in T.unroll(_LOADS):
                        request = (step * _LOADS + load) * _LANES + tx
                        if request < b:
                            total += count_visible(cache_seqlens[request], seq_len_q, window_left) + overhead
                share = share_of(T.warp_reduce_sum(total), num_sm_parts)
                play_unordered(
                    played,
                    marks,
                    blocks_shared,
                    cache_seqlens,
                    segment_size,
                    share,
                    overhead,
                    seq_len_q,
                    window_left,
                    tx,
                )
                if (b > 0) & (payload_of(tx, share) > overhead):
                    cost = plan_cost(played, tx, costs)
            else:
                number = T.alloc_var("int32", init=tx // _LANES - 1)
                plan = T.alloc_var("int32", init=NUM_UNORDERED + number)
                if costs.may_order:
                    for i in T.unroll(MOST_ORDERED // _LANES):
                        total += ranked_blocks[i * _LANES + lane]
                    share = share_of(T.warp_reduce_sum(total) + b * overhead, num_sm_parts)
                    payload = T.alloc_var("int32", init=payload_of(plan, share))
                    if (payload > overhead) & may_be_keys(ranked_blocks):
                        play_ordered_warp(
                            played,
                            orders,
                            marks,
                            plan,
                            ranked,
                            ranked_blocks,
                            batch_size,
                            parts_there,
                            segment_size,
                            payload,
                            may_cut(plan),
                            overhead,
                            lane,
                        )
                        cost = plan_cost(played, plan, costs)
                if lane == 0:
                    ordered_costs[number] = cost
            # What was marked is there, and what plans of an order cost.
            T.sync_threads()
            if tx < _LANES:
                best = T.alloc_var("int32", init=cost * (2 * _LANES) + tx)
                if tx < NUM_ORDERED:
                    best = T.min(best, ordered_costs[tx] * (2 * _LANES) + NUM_UNORDERED + tx)
                plan = T.alloc_var("int32", init=T.warp_reduce_min(best) % (2 * _LANES))
                row = T.alloc_var("int32", init=T.max(plan - NUM_UNORDERED, 0))
                ordered = T.alloc_var("bool", init=is_ordered(plan))
                first_place = T.alloc_var("int32", init=T.if_then_else(ordered, ORDERED, 0))
                payload = T.alloc_var("int32", init=payload_of(plan, share))
                cuts_requests = T.alloc_var("int32", init=may_cut(plan))
                for step in T.serial(T.ceildiv(num_sm_parts, _LANES)):
                    part = step * _LANES + tx
                    if part < num_sm_parts:
                        write_part(tile_scheduler_metadata, part, idle_row(b))
                        write_order(
                            tile_scheduler_metadata,
                            part,
                            T.if_then_else(ordered, four_places(orders, row, part, b), 0),
                        )
                if tx == 0:
                    num_splits[0] = 0
                T.sync_warp()  # idle rows are written before live ones
                step = T.alloc_var("int32", init=tx * segment_size)
                if step < b:
                    opened_by = T.alloc_var(
                        "int32", init=request_at_step(orders, row, ordered, marks[OPENED_BY, tx, plan] - first_place)
                    )
                    resume_walk(state, marks, tx, plan, payload, overhead, blocks_of(cache_seqlens[opened_by]))
                    num_so_far = T.alloc_var("int32", init=step + marks[CUTS, tx, plan])
                    end_step = T.alloc_var("int32", init=T.min(step + segment_size, b))
                    # Of the request before; read one ahead, too.
                    request = T.alloc_var("int32", init=request_at_step(orders, row, ordered, T.max(step - 1, 0)))
                    previous_end = T.alloc_var("int32", init=blocks_of(cache_seqlens[request]))
                    following = T.alloc_var("int32", init=request_at_step(orders, row, ordered, step))
                    seqlen = T.alloc_var("int32", init=cache_seqlens[following])
                    while step < end_step:
                        request = following
                        first = T.alloc_var("int32", init=first_visible(seqlen, seq_len_q, window_left))
                        end = T.alloc_var("int32", init=blocks_of(seqlen))
                        following = request_at_step(orders, row, ordered, T.min(step + 1, b - 1))
                        seqlen = cache_seqlens[following]
                        walk_request(
                            tile_scheduler_metadata,
                            state,
                            first_place + step,
                            first,
                            end,
                            previous_end,
                            payload,
                            cuts_requests,
                            num_sm_parts,
                            overhead,
                        )
                        num_so_far += state[SPLIT] + 1
                        if ordered:
                            pieces[request] = state[SPLIT] + 1
                        else:
                            num_splits[request + 1] = num_so_far
                        previous_end = end
                        step += 1
                    if step == b:
                        close_part(tile_scheduler_metadata, state, first_place + b - 1, previous_end, 0)
                if ordered:
                    T.sync_warp()
                    sum_up_splits(num_splits, pieces, tx)

    return Program(
        get_mla_metadata,
        {
            # Barriers are placed by hand: lanes walk by themselves, and an automatic one inside their loops would hang.
            "tl.disable_thread_storage_sync": True,
            "tl.disable_warp_specialized": True,
            "tl.disable_safe_memory_legalize": True,
        },
    )
