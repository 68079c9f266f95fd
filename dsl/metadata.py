"""The tile scheduler: cuts a batch of sequences of any lengths into parts of about equal cost.

The walk follows FlashMLA's ``get_mla_metadata``: a request costs its blocks plus a fixed overhead, and parts are filled
in order. Within its payload a part takes whole requests while they fit, then cuts the next one, or, in a plan without
cuts, leaves it to the next part.

Which payload, and whether requests may be cut, is tried out: each lane of a warp plays one plan through, and the
cheapest that fits into the parts is carried out. A plan costs its payload, since parts run side by side, and where it
cuts, what merging costs (``tilemla.costs``). With ``share`` the equal share of the total cost, a payload of
``share + overhead`` always works: a part either adds an overhead by cutting a request or leaves at most that much
unused.

With a sliding window the blocks of a request are those that some of its queries sees. The walk counts from the first of
them, and what it writes counts from the start of the cache.
"""

import tilelang.language as T

from tilemla.dsl.attention import first_visible_block
from tilemla.dsl.program import Program
from tilemla.dsl.schedule import BLOCK_N, NUM_COLUMNS, Part, count_blocks, idle_row, write_part

# Names of the elements of the walk's state, a local int32 buffer. The first three are the open part's row so far.
_BEGIN_REQUEST, _BEGIN_BLOCK, _BEGIN_SPLIT, _PART, _REMAINING, _BLOCK, _SPLIT, _NUM_SPLITS, _STATE_SIZE = range(9)

_FIRST, _END, _PREVIOUS_END, _BLOCKS_SIZE = range(4)  # of the request that is walked, and the one before it
_PAYLOADS = 16  # that are tried, from the equal share on
# Of the state of a plan that is played: parts so far, what the open one may still take, cuts of all requests; which
# request the open part begins with, which split of it, and what was left then; cuts of the request that is cut most.
_PARTS, _LEFT, _CUTS, _OPENED_BY, _OPENED_SPLIT, _OPENED_LEFT, _MOST_CUTS, _PLAYED_SIZE = range(8)
_NUM_MARKED = _MOST_CUTS  # of these, a walk goes on from the first ones
_NEVER = 1 << 14  # more than there can be parts; 65,536 times that is still an int32
_CHUNK = 1024  # lengths staged through shared memory at a time
_THREADS = 2 * _PAYLOADS  # one warp: a lane a plan, then a lane a segment of the requests
_LOADS = 4  # of a lane that are under way at once


@T.macro
def _close_part(metadata, state, end_request_inclusive, end_block, is_cut):
    """Write the open part's row. `is_cut`: its last request goes on in the next part."""
    is_one_request = state[_BEGIN_REQUEST] == end_request_inclusive
    is_begun_before = T.if_then_else(state[_BEGIN_SPLIT] > 0, 1, 0)
    row = Part(
        begin_request=state[_BEGIN_REQUEST],
        end_request_inclusive=end_request_inclusive,
        begin_block=state[_BEGIN_BLOCK],
        end_block=end_block,
        begin_split=state[_BEGIN_SPLIT],
        is_first_request_split=T.if_then_else(is_one_request, T.max(is_begun_before, is_cut), is_begun_before),
        is_last_request_split=T.if_then_else(is_one_request, T.max(is_begun_before, is_cut), is_cut),
    )
    write_part(metadata, state[_PART], row)


@T.macro
def _start_walk(state, first, payload):
    """Open the first part at block `first` of the first request."""
    for i in T.unroll(_STATE_SIZE):
        state[i] = 0
    state[_BEGIN_BLOCK] = first
    state[_REMAINING] = payload


@T.macro
def _walk_request(
    metadata, num_splits, state, request, first, end, previous_end, payload, may_cut, num_sm_parts, overhead
):
    """Give blocks `first` to `end` of a request to the open part and, while they do not fit, to the parts after it."""
    state[_BLOCK] = first
    state[_SPLIT] = 0
    while (state[_REMAINING] < end - state[_BLOCK] + overhead) & (state[_PART] < num_sm_parts - 1):
        if (state[_REMAINING] > overhead) & (may_cut != 0):
            state[_BLOCK] = state[_BLOCK] + state[_REMAINING] - overhead
            state[_SPLIT] = state[_SPLIT] + 1
            _close_part(metadata, state, request, state[_BLOCK], 1)
        else:
            _close_part(metadata, state, request - 1, previous_end, 0)
        state[_PART] = state[_PART] + 1
        state[_BEGIN_REQUEST] = request
        state[_BEGIN_BLOCK] = state[_BLOCK]
        state[_BEGIN_SPLIT] = state[_SPLIT]
        state[_REMAINING] = payload
    state[_REMAINING] = state[_REMAINING] - (end - state[_BLOCK] + overhead)
    state[_NUM_SPLITS] = state[_NUM_SPLITS] + state[_SPLIT] + 1
    num_splits[request + 1] = state[_NUM_SPLITS]


def _share(total_cost, num_sm_parts):
    return T.truncdiv(total_cost + num_sm_parts - 1, num_sm_parts)


def _plan_payload(plan, share):
    """The payload of plan number `plan`, int32: half of the plans cut requests, half do not."""
    return share + plan % _PAYLOADS


def _plan_may_cut(plan):
    """Whether plan number `plan` may cut requests, int32."""
    return T.if_then_else(plan < _PAYLOADS, 1, 0)


def _first_block(cache_seqlen, seq_len_q, window_left):
    return first_visible_block(cache_seqlen, seq_len_q, window_left, BLOCK_N)


def _end_block(cache_seqlen):
    return count_blocks(cache_seqlen, BLOCK_N)


def _count_visible(cache_seqlen, seq_len_q, window_left):
    """Blocks that some query sees, int32."""
    return _end_block(cache_seqlen) - _first_block(cache_seqlen, seq_len_q, window_left)


@T.macro
def _start_play(played, first_blocks, payload, overhead):
    """Begin to count with the first part open, which takes `first_blocks` of the first request if they fit."""
    for i in T.unroll(_PLAYED_SIZE):
        played[i] = 0
    played[_PARTS] = 1
    played[_LEFT] = payload
    played[_OPENED_LEFT] = payload - overhead - first_blocks


@T.macro
def _play_request(played, request, num_blocks, payload, may_cut, overhead):
    """Count on with a request of so many blocks; too many parts if the plan fails."""
    # Without branches but for what is seldom: this is what lanes of a warp wait for, for each request.
    room = payload - overhead  # for blocks in a part of their own
    spare = T.alloc_var("int32", init=played[_LEFT] - overhead)  # for blocks in the open part
    fits = num_blocks <= spare
    is_begun = (may_cut != 0) & (spare > 0)  # there, if it does not fit
    rest = T.alloc_var("int32", init=num_blocks - T.Select(is_begun, spare, 0))  # then, for the parts after
    pieces = T.alloc_var("int32", init=1)
    left = T.alloc_var("int32", init=room - rest)
    if T.Not(fits) & (rest > room):
        if may_cut != 0:
            pieces = T.truncdiv(rest + room - 1, room)
            left = room - (rest - (pieces - 1) * room)
        else:
            pieces = _NEVER
    cuts = T.alloc_var("int32", init=T.Select(fits, 0, pieces - T.Select(is_begun, 0, 1)))
    played[_PARTS] += T.Select(fits, 0, pieces)
    played[_LEFT] = T.Select(fits, spare - num_blocks, left)
    played[_CUTS] += cuts
    played[_MOST_CUTS] = T.max(played[_MOST_CUTS], cuts)
    played[_OPENED_BY] = T.Select(fits, played[_OPENED_BY], request)
    played[_OPENED_SPLIT] = T.Select(fits, played[_OPENED_SPLIT], cuts)
    played[_OPENED_LEFT] = T.Select(fits, played[_OPENED_LEFT], left)


def _plan_cost(played, plan, num_sm_parts, combine_eighths, piece_eighths):
    """What a plan costs more than an equal share, in eighths of a block, int32."""
    merging = combine_eighths + (played[_MOST_CUTS] + 1) * piece_eighths
    cost = 8 * (plan % _PAYLOADS) + T.if_then_else(played[_MOST_CUTS] > 0, merging, 0)
    return cost + T.if_then_else(played[_PARTS] <= num_sm_parts, 0, _NEVER)


def make_metadata_program_cpu() -> Program:
    """The scheduler as a serial C function.

    Returns
    -------
    Program
        ``get_mla_metadata(cache_seqlens (b,) int32, tile_scheduler_metadata (num_sm_parts, 8) int32,
        num_splits (b + 1,) int32, overhead, combine_eighths, piece_eighths, seq_len_q, window_left)``; fills the
        second and the third. The integers after them are int32: three costs, as ``tilemla.costs`` has them, the
        queries of a request, and how far back from its own position a query sees, as ``attention.first_visible_key``
        has it.
    """
    b, num_sm_parts = T.dynamic("b, num_sm_parts")

    @T.prim_func
    def get_mla_metadata(
        cache_seqlens: T.Tensor((b,), "int32"),
        tile_scheduler_metadata: T.Tensor((num_sm_parts, NUM_COLUMNS), "int32"),
        num_splits: T.Tensor((b + 1,), "int32"),
        overhead: T.int32,
        combine_eighths: T.int32,
        piece_eighths: T.int32,
        seq_len_q: T.int32,
        window_left: T.int32,
    ):
        with T.Kernel(1, threads=1) as _:
            state = T.alloc_local((_STATE_SIZE,), "int32")
            total = T.alloc_local((1,), "int32")
            blocks = T.alloc_local((_BLOCKS_SIZE,), "int32")
            played = T.alloc_local((_PLAYED_SIZE,), "int32")
            best = T.alloc_local((2,), "int32")  # plan and its cost
            total[0] = 0
            for request in T.serial(b):
                total[0] = total[0] + _count_visible(cache_seqlens[request], seq_len_q, window_left) + overhead
            share = T.alloc_var("int32", init=_share(total[0], num_sm_parts))
            best[0] = 0
            best[1] = _NEVER
            for plan in T.serial(2 * _PAYLOADS):
                if _plan_payload(plan, share) > overhead:
                    _start_play(played, 0, _plan_payload(plan, share), overhead)
                    for request in T.serial(b):
                        num_blocks = T.alloc_var(
                            "int32", init=_count_visible(cache_seqlens[request], seq_len_q, window_left)
                        )
                        _play_request(
                            played, request, num_blocks, _plan_payload(plan, share), _plan_may_cut(plan), overhead
                        )
                    if _plan_cost(played, plan, num_sm_parts, combine_eighths, piece_eighths) < best[1]:
                        best[0] = plan
                        best[1] = _plan_cost(played, plan, num_sm_parts, combine_eighths, piece_eighths)
            for part in T.serial(num_sm_parts):
                write_part(tile_scheduler_metadata, part, idle_row(b))
            num_splits[0] = 0
            if b > 0:
                first = _first_block(cache_seqlens[0], seq_len_q, window_left)
                _start_walk(state, first, _plan_payload(best[0], share))
            blocks[_PREVIOUS_END] = 0
            for request in T.serial(b):
                blocks[_FIRST] = _first_block(cache_seqlens[request], seq_len_q, window_left)
                blocks[_END] = _end_block(cache_seqlens[request])
                _walk_request(
                    tile_scheduler_metadata,
                    num_splits,
                    state,
                    request,
                    blocks[_FIRST],
                    blocks[_END],
                    blocks[_PREVIOUS_END],
                    _plan_payload(best[0], share),
                    _plan_may_cut(best[0]),
                    num_sm_parts,
                    overhead,
                )
                blocks[_PREVIOUS_END] = blocks[_END]
            if b > 0:
                _close_part(tile_scheduler_metadata, state, b - 1, blocks[_PREVIOUS_END], 0)

    return Program(get_mla_metadata, {"tl.disable_safe_memory_legalize": True})


def make_metadata_program_sm90() -> Program:
    """The scheduler as one warp: a lane a plan, then a lane a segment of the requests.

    A lane that plays a plan marks where it stands at the first request of each segment, and from there the chosen plan
    is walked. While plans are played lengths pass through shared memory in chunks, so that any batch size fits.

    Returns
    -------
    Program
        As `make_metadata_program_cpu`.
    """
    b, num_sm_parts = T.dynamic("b, num_sm_parts")

    @T.macro
    def load_chunk(blocks_shared, cache_seqlens, chunk, tx, seq_len_q, window_left):
        for step in T.serial(T.ceildiv(T.min(_CHUNK, b - chunk * _CHUNK), _LOADS * _THREADS)):
            for load in T.unroll(_LOADS):
                at = (step * _LOADS + load) * _THREADS + tx
                if chunk * _CHUNK + at < b:
                    blocks_shared[at] = _count_visible(cache_seqlens[chunk * _CHUNK + at], seq_len_q, window_left)

    @T.macro
    def start_walk_at(state, marks, segment, plan, request, payload, overhead, cache_seqlens):
        # The open part's first request has used it up to what was left then.
        opened_by = T.alloc_var("int32", init=marks[_OPENED_BY, segment, plan])
        in_part = payload - overhead - marks[_OPENED_LEFT, segment, plan]
        state[_BEGIN_REQUEST] = opened_by
        state[_BEGIN_BLOCK] = _end_block(cache_seqlens[opened_by]) - in_part
        state[_BEGIN_SPLIT] = marks[_OPENED_SPLIT, segment, plan]
        state[_PART] = marks[_PARTS, segment, plan] - 1
        state[_REMAINING] = marks[_LEFT, segment, plan]
        state[_NUM_SPLITS] = request + marks[_CUTS, segment, plan]

    @T.prim_func
    def get_mla_metadata(
        cache_seqlens: T.Tensor((b,), "int32"),
        tile_scheduler_metadata: T.Tensor((num_sm_parts, NUM_COLUMNS), "int32"),
        num_splits: T.Tensor((b + 1,), "int32"),
        overhead: T.int32,
        combine_eighths: T.int32,
        piece_eighths: T.int32,
        seq_len_q: T.int32,
        window_left: T.int32,
    ):
        with T.Kernel(1, threads=_THREADS) as _:
            blocks_shared = T.alloc_shared((_CHUNK,), "int32")
            marks = T.alloc_shared((_NUM_MARKED, _THREADS, _THREADS), "int32")  # what is marked, segment, plan
            state = T.alloc_local((_STATE_SIZE,), "int32")
            total = T.alloc_var("int32", init=0)
            tx = T.get_thread_binding()
            for step in T.serial(T.ceildiv(b, _LOADS * _THREADS)):
                for load in T.unroll(_LOADS):
                    request = (step * _LOADS + load) * _THREADS + tx
                    if request < b:
                        total += _count_visible(cache_seqlens[request], seq_len_q, window_left) + overhead
            share = T.alloc_var("int32", init=_share(T.warp_reduce_sum(total), num_sm_parts))
            segment_size = T.alloc_var("int32", init=T.truncdiv(b + _THREADS - 1, _THREADS))
            segment = T.alloc_var("int32", init=0)
            played = T.alloc_local((_PLAYED_SIZE,), "int32")
            cost = T.alloc_var("int32", init=_NEVER)
            for chunk in T.serial(T.ceildiv(b, _CHUNK)):
                T.sync_threads()  # the last chunk has been played
                load_chunk(blocks_shared, cache_seqlens, chunk, tx, seq_len_q, window_left)
                T.sync_threads()
                if _plan_payload(tx, share) > overhead:
                    # Read one ahead: the latency of shared memory is not waited for.
                    following = T.alloc_var("int32", init=blocks_shared[0])
                    if chunk == 0:
                        _start_play(played, following, _plan_payload(tx, share), overhead)
                    at = T.alloc_var("int32", init=0)
                    in_chunk = T.alloc_var("int32", init=T.min(_CHUNK, b - chunk * _CHUNK))
                    while at < in_chunk:
                        if chunk * _CHUNK + at == segment * segment_size:
                            for i in T.unroll(_NUM_MARKED):
                                marks[i, segment, tx] = played[i]
                            segment += 1
                        stop = T.alloc_var("int32", init=T.min(segment * segment_size - chunk * _CHUNK, in_chunk))
                        while at < stop:
                            num_blocks = T.alloc_var("int32", init=following)
                            following = blocks_shared[T.min(at + 1, _CHUNK - 1)]
                            _play_request(
                                played,
                                chunk * _CHUNK + at,
                                num_blocks,
                                _plan_payload(tx, share),
                                _plan_may_cut(tx),
                                overhead,
                            )
                            at += 1
            if (b > 0) & (_plan_payload(tx, share) > overhead):
                cost = T.min(_plan_cost(played, tx, num_sm_parts, combine_eighths, piece_eighths), _NEVER)
            plan = T.alloc_var("int32", init=T.warp_reduce_min(cost * _THREADS + tx) % _THREADS)
            payload = T.alloc_var("int32", init=_plan_payload(plan, share))
            may_cut = T.alloc_var("int32", init=_plan_may_cut(plan))
            for step in T.serial(T.ceildiv(num_sm_parts, _THREADS)):
                part = step * _THREADS + tx
                if part < num_sm_parts:
                    write_part(tile_scheduler_metadata, part, idle_row(b))
            if tx == 0:
                num_splits[0] = 0
            T.sync_threads()  # idle rows are written before live ones, and what the chosen plan's lane marked is there
            request = T.alloc_var("int32", init=tx * segment_size)
            if request < b:
                start_walk_at(state, marks, tx, plan, request, payload, overhead, cache_seqlens)
                end_request = T.alloc_var("int32", init=T.min(request + segment_size, b))
                # Of the request before; read one ahead, too.
                previous_end = T.alloc_var("int32", init=_end_block(cache_seqlens[T.max(request - 1, 0)]))
                seqlen = T.alloc_var("int32", init=cache_seqlens[request])
                while request < end_request:
                    first = T.alloc_var("int32", init=_first_block(seqlen, seq_len_q, window_left))
                    end = T.alloc_var("int32", init=_end_block(seqlen))
                    seqlen = cache_seqlens[T.min(request + 1, b - 1)]
                    _walk_request(
                        tile_scheduler_metadata,
                        num_splits,
                        state,
                        request,
                        first,
                        end,
                        previous_end,
                        payload,
                        may_cut,
                        num_sm_parts,
                        overhead,
                    )
                    previous_end = end
                    request += 1
                if request == b:
                    _close_part(tile_scheduler_metadata, state, b - 1, previous_end, 0)

    return Program(
        get_mla_metadata,
        {
            # Barriers are placed by hand: lanes walk by themselves, and an automatic one inside their loops would hang.
            "tl.disable_thread_storage_sync": True,
            "tl.disable_warp_specialized": True,
            "tl.disable_safe_memory_legalize": True,
        },
    )
