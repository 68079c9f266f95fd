"""The tile scheduler: cuts a batch of sequences of any lengths into parts of about equal cost.

The walk follows FlashMLA's ``get_mla_metadata``: a request costs its blocks plus a fixed overhead, and parts are filled
in order. Within its payload a part takes whole requests while they fit, then cuts the next one, or, in a plan without
cuts, leaves it to the next part.

Which payload, whether requests may be cut, and in which order they come is tried out: plans are played through beside
each other, and the cheapest that fits into the parts is carried out (`plans`). With ``share`` the equal share of the
total cost, a payload of ``share + overhead`` always works: a part either adds an overhead by cutting a request or
leaves at most that much unused.

With a sliding window the blocks of a request are those that some of its queries sees. The walk counts from the first of
them, and what it writes counts from the start of the cache.
"""

from types import SimpleNamespace
from typing import Any

import tilelang.language as T

from tilemla.dsl.attention import first_visible_block
from tilemla.dsl.order import may_be_keys, play_ordered_cpu, play_ordered_warp, rank_of
from tilemla.dsl.plans import (
    CUTS,
    LEFT,
    NEVER,
    NUM_MARKED,
    NUM_ORDERED,
    NUM_UNORDERED,
    OPENED_BY,
    OPENED_LEFT,
    OPENED_SPLIT,
    PARTS,
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
from tilemla.dsl.schedule import (
    BLOCK_N,
    MOST_ORDERED,
    NUM_COLUMNS,
    ORDERED,
    PLACES_PER_ROW,
    Part,
    count_blocks,
    idle_row,
    write_order,
    write_part,
)

# Names of the elements of the walk's state, a local int32 buffer. The first three are the open part's row so far.
_BEGIN_PLACE, _BEGIN_BLOCK, _BEGIN_SPLIT, _PART, _REMAINING, _BLOCK, _SPLIT, _STATE_SIZE = range(8)

_FIRST, _END, _PREVIOUS_END, _BLOCKS_SIZE = range(4)  # of the request that is walked, and the one before it
_CHUNK = 1024  # lengths staged through shared memory at a time
_LANES = NUM_UNORDERED  # of the warp that plays a plan a lane, then walks a segment of the places a lane
_ORDERED_THREADS = 32 * NUM_ORDERED  # a warp a plan
_LOADS = 4  # of a lane that are under way at once


@T.macro
def _close_part(metadata, state, end_place_inclusive, end_block, is_cut):
    """Write the open part's row. `is_cut`: its last request goes on in the next part."""
    is_one_request = state[_BEGIN_PLACE] == end_place_inclusive
    is_begun_before = T.if_then_else(state[_BEGIN_SPLIT] > 0, 1, 0)
    row = Part(
        begin_place=state[_BEGIN_PLACE],
        end_place_inclusive=end_place_inclusive,
        begin_block=state[_BEGIN_BLOCK],
        end_block=end_block,
        begin_split=state[_BEGIN_SPLIT],
        is_first_request_split=T.if_then_else(is_one_request, T.max(is_begun_before, is_cut), is_begun_before),
        is_last_request_split=T.if_then_else(is_one_request, T.max(is_begun_before, is_cut), is_cut),
    )
    write_part(metadata, state[_PART], row)


@T.macro
def _start_walk(state, place, first, payload):
    """Open the first part at block `first` of the request at the first place."""
    for i in T.unroll(_STATE_SIZE):
        state[i] = 0
    state[_BEGIN_PLACE] = place
    state[_BEGIN_BLOCK] = first
    state[_REMAINING] = payload


@T.macro
def _walk_request(metadata, state, place, first, end, previous_end, payload, cuts_requests, num_sm_parts, overhead):
    """Give blocks `first` to `end` of a request to the open part and, while they do not fit, to the parts after it.

    Leaves the number of its last split in the state.
    """
    state[_BLOCK] = first
    state[_SPLIT] = 0
    while (state[_REMAINING] < end - state[_BLOCK] + overhead) & (state[_PART] < num_sm_parts - 1):
        if (state[_REMAINING] > overhead) & (cuts_requests != 0):
            state[_BLOCK] = state[_BLOCK] + state[_REMAINING] - overhead
            state[_SPLIT] = state[_SPLIT] + 1
            _close_part(metadata, state, place, state[_BLOCK], 1)
        else:
            _close_part(metadata, state, place - 1, previous_end, 0)
        state[_PART] = state[_PART] + 1
        state[_BEGIN_PLACE] = place
        state[_BEGIN_BLOCK] = state[_BLOCK]
        state[_BEGIN_SPLIT] = state[_SPLIT]
        state[_REMAINING] = payload
    state[_REMAINING] = state[_REMAINING] - (end - state[_BLOCK] + overhead)


def _four_places(orders, row, part, batch_size) -> Any:
    """What part `part`'s row says of an order, a row of `orders`, int32: the requests at its four places."""
    four = 0
    for i in range(PLACES_PER_ROW):
        place = part * PLACES_PER_ROW + i
        four = four + T.if_then_else(place < batch_size, T.shift_left(orders[row, place], 8 * i), 0)
    return four


def _first_block(cache_seqlen, seq_len_q, window_left):
    return first_visible_block(cache_seqlen, seq_len_q, window_left, BLOCK_N)


def _end_block(cache_seqlen):
    return count_blocks(cache_seqlen, BLOCK_N)


def _count_visible(cache_seqlen, seq_len_q, window_left):
    """Blocks that some query sees, int32."""
    return _end_block(cache_seqlen) - _first_block(cache_seqlen, seq_len_q, window_left)


def _request_at(orders, row, ordered, step) -> Any:
    return T.if_then_else(ordered, orders[row, step], step)


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
            num_blocks[request] = _count_visible(cache_seqlens[request], seq_len_q, window_left)
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
            state = T.alloc_local((_STATE_SIZE,), "int32")
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
                total[0] = total[0] + _count_visible(cache_seqlens[request], seq_len_q, window_left) + overhead
            share = T.alloc_var("int32", init=share_of(total[0], num_sm_parts))
            best[0] = 0
            best[1] = NEVER
            for plan in T.serial(NUM_UNORDERED):
                payload = payload_of(plan, share)
                if payload > overhead:
                    start_play(played, 0, 0, payload, overhead)
                    for request in T.serial(b):
                        visible = T.alloc_var(
                            "int32", init=_count_visible(cache_seqlens[request], seq_len_q, window_left)
                        )
                        play_request(played, request, visible, payload, may_cut(plan), overhead)
                    if plan_cost(played, plan, costs) < best[1]:
                        best[0] = plan
                        best[1] = plan_cost(played, plan, costs)
            if costs.may_order:
                rank_requests(ranked, ranked_blocks, num_blocks, batch_size, cache_seqlens, seq_len_q, window_left)
                for number in T.serial(NUM_ORDERED):
                    plan = NUM_UNORDERED + number
                    payload = payload_of(plan, share)
                    if (payload > overhead) & may_be_keys(ranked_blocks):
                        play_ordered_cpu(
                            played, tried, is_taken, ranked, ranked_blocks, batch_size, payload, may_cut(plan), overhead
                        )
                        if plan_cost(played, plan, costs) < best[1]:
                            best[0] = plan
                            best[1] = plan_cost(played, plan, costs)
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
                    T.if_then_else(ordered, _four_places(order, 0, part, b), 0),
                )
            blocks[_PREVIOUS_END] = 0
            for step in T.serial(b):
                request = T.alloc_var("int32", init=_request_at(order, 0, ordered, step))
                blocks[_FIRST] = _first_block(cache_seqlens[request], seq_len_q, window_left)
                blocks[_END] = _end_block(cache_seqlens[request])
                if step == 0:
                    _start_walk(state, first_place, blocks[_FIRST], payload)
                _walk_request(
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
                num_splits[request + 1] = state[_SPLIT] + 1
                blocks[_PREVIOUS_END] = blocks[_END]
            if b > 0:
                _close_part(tile_scheduler_metadata, state, first_place + b - 1, blocks[_PREVIOUS_END], 0)
            num_splits[0] = 0
            for request in T.serial(b):
                num_splits[request + 1] = num_splits[request + 1] + num_splits[request]

    return Program(get_mla_metadata, {"tl.disable_safe_memory_legalize": True})


def make_metadata_program_sm90() -> Program:
    """The scheduler as a warp for requests as they come, and one for each plan that has an order.

    Of the first warp each lane plays a plan, then walks a segment of the places. Who plays a plan marks where it stands
    at the first place of each segment, and from there the chosen plan is walked. While plans are played lengths pass
    through shared memory in chunks, so that any batch size fits.

    Returns
    -------
    Program
        As `make_metadata_program_cpu`.
    """
    b, num_sm_parts = T.dynamic("b, num_sm_parts")

    @T.macro
    def load_chunk(blocks_shared, cache_seqlens, chunk, lane, seq_len_q, window_left):
        for step in T.serial(T.ceildiv(T.min(_CHUNK, b - chunk * _CHUNK), _LOADS * _LANES)):
            for load in T.unroll(_LOADS):
                at = (step * _LOADS + load) * _LANES + lane
                if chunk * _CHUNK + at < b:
                    blocks_shared[at] = _count_visible(cache_seqlens[chunk * _CHUNK + at], seq_len_q, window_left)

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
            num_blocks[thread] = _count_visible(cache_seqlens[thread], seq_len_q, window_left)
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
    def start_walk_at(state, marks, segment, plan, payload, overhead, opened_end):
        # The open part's first request has used it up to what was left then.
        in_part = payload - overhead - marks[OPENED_LEFT, segment, plan]
        state[_BEGIN_PLACE] = marks[OPENED_BY, segment, plan]
        state[_BEGIN_BLOCK] = opened_end - in_part
        state[_BEGIN_SPLIT] = marks[OPENED_SPLIT, segment, plan]
        state[_PART] = marks[PARTS, segment, plan] - 1
        state[_REMAINING] = marks[LEFT, segment, plan]

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
            state = T.alloc_local((_STATE_SIZE,), "int32")
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
                            total += _count_visible(cache_seqlens[request], seq_len_q, window_left) + overhead
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
                            T.if_then_else(ordered, _four_places(orders, row, part, b), 0),
                        )
                if tx == 0:
                    num_splits[0] = 0
                T.sync_warp()  # idle rows are written before live ones
                step = T.alloc_var("int32", init=tx * segment_size)
                if step < b:
                    opened_by = T.alloc_var(
                        "int32", init=_request_at(orders, row, ordered, marks[OPENED_BY, tx, plan] - first_place)
                    )
                    start_walk_at(state, marks, tx, plan, payload, overhead, _end_block(cache_seqlens[opened_by]))
                    num_so_far = T.alloc_var("int32", init=step + marks[CUTS, tx, plan])
                    end_step = T.alloc_var("int32", init=T.min(step + segment_size, b))
                    # Of the request before; read one ahead, too.
                    request = T.alloc_var("int32", init=_request_at(orders, row, ordered, T.max(step - 1, 0)))
                    previous_end = T.alloc_var("int32", init=_end_block(cache_seqlens[request]))
                    following = T.alloc_var("int32", init=_request_at(orders, row, ordered, step))
                    seqlen = T.alloc_var("int32", init=cache_seqlens[following])
                    while step < end_step:
                        request = following
                        first = T.alloc_var("int32", init=_first_block(seqlen, seq_len_q, window_left))
                        end = T.alloc_var("int32", init=_end_block(seqlen))
                        following = _request_at(orders, row, ordered, T.min(step + 1, b - 1))
                        seqlen = cache_seqlens[following]
                        _walk_request(
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
                        num_so_far += state[_SPLIT] + 1
                        if ordered:
                            pieces[request] = state[_SPLIT] + 1
                        else:
                            num_splits[request + 1] = num_so_far
                        previous_end = end
                        step += 1
                    if step == b:
                        _close_part(tile_scheduler_metadata, state, first_place + b - 1, previous_end, 0)
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
