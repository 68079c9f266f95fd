"""A consumer warpgroup of the decode kernel for few rows: whole pages, with products transposed.

Tokens are the rows of S^T = K Q^T, output columns those of O^T += V^T P^T, and the rows of the tile are the columns of
both. What ldmatrix gives a thread of a page is widened in registers, exactly, and is wgmma's first operand there. The
scales are applied where numbers are few: to the scores of each piece of 128 columns, which have an accumulator of their
own, and to P, of which there is one for each piece. Keys become float16, which takes an instruction for two; the latent
part of Q does, too, by a power of two for each row. P and its scales may be of any size: there values are bfloat16.

A thread has elements of the same four rows of the tile in both products: ``lane % 4 * 2``, its neighbour, and those 8
further. Of S^T they are of two tokens 8 apart, of O^T of two neighbouring columns.

P is made with the running maximum as it is, while nobody knows whether a score exceeds it by too much; the barrier that
P needs tells that, too, and if so it is made again.
"""

from types import SimpleNamespace
from typing import Any

import tilelang.language as T

from tilemla.dsl.attention import (
    LAZY_MAX_MARGIN_LOG2,
    RUNNING_MAX_START,
    advance_max,
    end_key_of_query,
    final_lse,
    first_key_of_query,
    first_visible_key,
    inverse_sum,
    mask_score,
    needs_mask,
    partial_lse_log2,
    probability_of_scaled,
    rescale_factor,
    sink_share,
)
from tilemla.dsl.schedule import BLOCK_N, is_split, split_slot
from tilemla.dsl.sm90.e4m3_tile import arrive_elected
from tilemla.dsl.sm90.narrow_tile import (
    A_REGISTERS,
    ATOM_BYTES,
    CHUNK,
    COLUMNS,
    CONSUMERS,
    K_STEP,
    MERGE_BARRIER,
    NUM_PIECES,
    NUM_TILES,
    NUM_WARPGROUPS,
    OWN_FLOATS,
    PAGE_BYTES,
    PIECE_COLUMNS,
    PITCH,
    ROPE_AT,
    SCALES_AT,
    SCORES,
    phase_of,
    stage_of,
)
from tilemla.dsl.sm90.tile import WARPGROUP, begin_and_end

_STEPS_PER_ATOM = 4
_ROW_BYTES = 128  # of an atom
_PRODUCTS = 4  # of a batch, that leave together; of four accumulators, so that none waits for another
_BATCH = _PRODUCTS * A_REGISTERS  # registers of their operands; those of two batches are in use at once
_P_BYTES = NUM_PIECES * ATOM_BYTES
_HALF_TILES = NUM_TILES // 2
_MERGED = _HALF_TILES * SCORES  # outputs that a thread merges

_STEPS_PER_PIECE = PIECE_COLUMNS // K_STEP
# Batches of O^T: a K step of 16 tokens, and the first of two pieces, so of four tiles of 64 columns.
_OUTPUT_BATCHES = [(k, piece) for k in range(BLOCK_N // K_STEP) for piece in (0, 2)]


def _offset_of_step(step) -> Any:
    """Of a K step of Q, in the 16-byte units of a wgmma descriptor."""
    return step // _STEPS_PER_ATOM * (ATOM_BYTES >> 4) + step % _STEPS_PER_ATOM * (K_STEP * 2 >> 4)


def make_consumer(head_dim_qk: int, head_dim_v: int) -> Any:
    """Make the macro ``consumer(t)``.

    Parameters
    ----------
    head_dim_qk : int
        Columns of a query.
    head_dim_v : int
        Its latent columns.
    """
    accum = "float32"
    latent_steps, rope_steps = head_dim_v // K_STEP, (head_dim_qk - head_dim_v) // K_STEP

    def address(buffer):
        return T.call_extern("int32", "tilemla::shared_address", T.address_of(buffer))

    def place_of(row, unit, at):
        # The first of two chunks of 16 columns of Q.
        within = T.bitwise_xor(T.truncmod(unit, _STEPS_PER_ATOM) * 2, row % 8) * CHUNK
        return at.q + T.truncdiv(unit, _STEPS_PER_ATOM) * ATOM_BYTES + row * _ROW_BYTES + within

    @T.macro
    def take_q(request, at, t):
        # Each warp two rows.
        first_row = t.tx // 32 * 2
        for i in T.unroll(2):
            row = first_row + i
            factor = T.alloc_var(
                accum,
                init=T.call_extern(
                    accum,
                    "tilemla::store_latent",
                    place_of(row, at.lane, at),
                    T.address_of(t.q[request, t.head, t.tile[0] + row, at.lane * K_STEP]),
                    t.tile[0] + row < t.rows,
                ),
            )
            if at.lane == 0:
                t.q_factors[row] = factor
        if at.lane < 2 * rope_steps:
            row = first_row + at.lane // rope_steps
            unit = latent_steps + at.lane % rope_steps
            T.call_extern(
                "handle",
                "tilemla::copy_columns",
                place_of(row, unit, at),
                T.address_of(t.q[request, t.head, t.tile[0] + row, unit * K_STEP]),
                t.tile[0] + row < t.rows,
            )
        T.fence_proxy_async()

    @T.macro
    def clear_bytes(begin, end, at, t):
        chunk = T.alloc_var("int32", init=begin + t.tx % WARPGROUP * CHUNK)
        while chunk < end:
            T.call_extern("handle", "tilemla::clear_chunk", chunk)
            chunk += WARPGROUP * CHUNK

    @T.macro
    def clear_unseen(request, block, page, at, t):
        # P is 0 where no query sees a token, but what lies there may be NaN.
        seqlen = T.alloc_var("int32", init=t.cache_seqlens[request] - block * BLOCK_N)
        first = T.alloc_var(
            "int32",
            init=first_visible_key(t.cache_seqlens[request], t.seq_len_q, t.window_left) - block * BLOCK_N,
        )
        if (seqlen < BLOCK_N) | (first > 0):
            clear_bytes(page, page + T.min(first, BLOCK_N) * PITCH, at, t)
            clear_bytes(page + T.max(seqlen, 0) * PITCH, page + PAGE_BYTES, at, t)
            T.fence_proxy_async()  # the page is loaded over next
            T.sync_threads(at.barrier, WARPGROUP)

    @T.macro
    def read_keys(raw, step, page, at):
        # 16 columns of each piece, of two pieces at once.
        for i in T.unroll(NUM_PIECES // 2):
            T.call_extern(
                "handle",
                "tilemla::read_rows",
                T.address_of(raw[i * A_REGISTERS]),
                page + at.keys + (i * 2 * PIECE_COLUMNS + step * K_STEP),
            )

    @T.macro
    def widen_keys(operand, place, raw):
        for k in T.unroll(_PRODUCTS):
            for half in T.unroll(2):
                T.call_extern(
                    "handle",
                    "tilemla::widen_keys",
                    T.address_of(operand[place * _BATCH + k * A_REGISTERS + half]),
                    raw[k * 2 + half],
                )

    @T.macro
    def multiply(dtype, acc, first, count, operand, place, matrix, offset_of, accumulator_of, adds):
        # A batch of products, each at an offset of `matrix` and to one of the accumulators from `first` on.
        T.warpgroup_fence_operand(operand, place * _BATCH, _BATCH)
        T.warpgroup_fence_operand(acc, first * SCORES, count * SCORES)
        T.warpgroup_arrive()
        for i in T.unroll(_PRODUCTS):
            T.ptx_wgmma_rs(
                accum,
                "m64n16k16",
                True,
                dtype,
                dtype,
                "fp32",
                operand.data,
                place * _BATCH + i * A_REGISTERS,
                matrix.data,
                offset_of(i),
                acc.data,
                (first + accumulator_of(i)) * SCORES,
                adds(i),
                1,
                1,
            )
        T.warpgroup_commit_batch()
        T.warpgroup_fence_operand(acc, first * SCORES, count * SCORES)
        T.warpgroup_fence_operand(operand, place * _BATCH, _BATCH)

    @T.macro
    def score(scores, operand, raw, page, at):
        # To accumulator 0 the rope columns, to the others each piece of the latent ones, without its scale.
        for k in T.unroll(_PRODUCTS):
            T.call_extern(
                "handle",
                "tilemla::read_rows",
                T.address_of(operand[k * A_REGISTERS]),
                page + at.rope + k * K_STEP * 2,
            )
        read_keys(raw, 0, page, at)
        multiply(
            "bf16",
            scores,
            0,
            1,
            operand,
            0,
            at.queries,
            lambda i: _offset_of_step(latent_steps + i),
            lambda i: 0,
            lambda i: T.Select(i != 0, 1, 0),
        )
        for step in range(_STEPS_PER_PIECE):
            place = (step + 1) % 2
            if step > 0:
                T.wait_wgmma(1)  # the operands of the batch before the last are free
            widen_keys(operand, place, raw)
            if step + 1 < _STEPS_PER_PIECE:
                read_keys(raw, step + 1, page, at)
            multiply(
                "fp16",
                scores,
                1,
                NUM_PIECES,
                operand,
                place,
                at.queries,
                lambda i, step=step: _offset_of_step(i * _STEPS_PER_PIECE + step),
                lambda i: i,
                lambda i, step=step: 1 if step > 0 else 0,
            )
        T.wait_wgmma(0)
        T.warpgroup_fence_operand(scores, 0, (1 + NUM_PIECES) * SCORES)

    @T.macro
    def add_pieces(scaled, scores, scales, q_factors, t):
        for e in T.unroll(SCORES):
            scaled[e] = 0
            for piece in T.unroll(NUM_PIECES):
                scaled[e] = scaled[e] + scores[(1 + piece) * SCORES + e] * scales[e % 4 // 2 * NUM_PIECES + piece]
            scaled[e] = (scores[e] + scaled[e] * q_factors[e // 4 * 2 + e % 2]) * t.softmax_scale_log2

    @T.macro
    def hide_scores(scaled, request, block, at, t):
        if needs_mask(block, BLOCK_N, t.cache_seqlens[request], t.seq_len_q, t.window_left, t.window_right):
            for j in T.unroll(2):
                for v in T.unroll(2):
                    query = T.alloc_var("int32", init=T.truncdiv(t.tile[0] + at.column + j * 8 + v, t.group_size))
                    shift = T.alloc_var("int32", init=block * BLOCK_N + at.token)
                    first = T.alloc_var(
                        "int32",
                        init=first_key_of_query(query, t.cache_seqlens[request], t.seq_len_q, t.window_left) - shift,
                    )
                    end = T.alloc_var(
                        "int32",
                        init=end_key_of_query(query, t.cache_seqlens[request], t.seq_len_q, t.window_right) - shift,
                    )
                    for half in T.unroll(2):
                        scaled[j * 4 + half * 2 + v] = mask_score(
                            scaled[j * 4 + half * 2 + v], (half * 8 >= first) & (half * 8 < end)
                        )

    @T.macro
    def store_p(weights, scaled, running_max, scales, to):
        pairs = T.alloc_local((4,), "uint32")
        for e in T.unroll(SCORES):
            weights[e] = probability_of_scaled(scaled[e], running_max[e // 4 * 2 + e % 2])
        for piece in T.unroll(NUM_PIECES):
            for i in T.unroll(4):
                pairs[i] = T.call_extern(
                    "uint32",
                    "tilemla::scaled_pair",
                    weights[i * 2],
                    weights[i * 2 + 1],
                    scales[i % 2 * NUM_PIECES + piece],
                )
            T.call_extern("handle", "tilemla::store_columns", to + piece * ATOM_BYTES, T.address_of(pairs[0]))
        T.fence_proxy_async()

    @T.macro
    def raise_max(acc, scaled, running_max, row_sum, at, t):
        # The maximum over the block of each row that exceeds its running one by too much takes its place.
        block_max = T.alloc_local((COLUMNS,), accum)
        for c in T.unroll(COLUMNS):
            block_max[c] = T.max(scaled[c // 2 * 4 + c % 2], scaled[c // 2 * 4 + 2 + c % 2])
        for step in (4, 8, 16):
            for c in T.unroll(COLUMNS):
                block_max[c] = T.max(block_max[c], T.shfl_xor(block_max[c], step))
        if at.lane < 4:
            for c in T.unroll(COLUMNS):
                t.maxima[at.group, at.warp, at.column + c // 2 * 8 + c % 2] = block_max[c]
        T.sync_threads(at.barrier, WARPGROUP)
        for c in T.unroll(COLUMNS):
            column = at.column + c // 2 * 8 + c % 2
            block_max[c] = t.maxima[at.group, 0, column]
            for warp in (1, 2, 3):
                block_max[c] = T.max(block_max[c], t.maxima[at.group, warp, column])
            block_max[c] = advance_max(running_max[c], block_max[c])
        for c in T.unroll(COLUMNS):
            factor = T.alloc_var(accum, init=rescale_factor(running_max[c], block_max[c]))
            running_max[c] = block_max[c]
            row_sum[c] = row_sum[c] * factor
            for tile in T.unroll(NUM_TILES):
                for half in T.unroll(2):
                    e = tile * SCORES + c // 2 * 4 + half * 2 + c % 2
                    acc[e] = acc[e] * factor

    @T.macro
    def soften(acc, weights, scaled, running_max, row_sum, scales, to, at, t):
        exceeds = T.alloc_var("bool", init=False)
        for e in T.unroll(SCORES):
            exceeds = exceeds | (scaled[e] > running_max[e // 4 * 2 + e % 2] + LAZY_MAX_MARGIN_LOG2)
        store_p(weights, scaled, running_max, scales, to)
        if T.call_extern("int32", "tilemla::any_of_warpgroup", at.barrier, exceeds) != 0:
            raise_max(acc, scaled, running_max, row_sum, at, t)
            store_p(weights, scaled, running_max, scales, to)
            T.sync_threads(at.barrier, WARPGROUP)
        for c in T.unroll(COLUMNS):
            row_sum[c] = row_sum[c] + (weights[c // 2 * 4 + c % 2] + weights[c // 2 * 4 + 2 + c % 2])

    @T.macro
    def read_values(raw, k, piece, page, at):
        for i in T.unroll(2):
            T.call_extern(
                "handle",
                "tilemla::read_columns",
                T.address_of(raw[i * A_REGISTERS]),
                page + at.values + ((piece + i) * PIECE_COLUMNS + k * (K_STEP * PITCH)),
            )

    @T.macro
    def widen_values(operand, place, raw):
        for i in T.unroll(2 * A_REGISTERS):
            T.call_extern("handle", "tilemla::widen_values", T.address_of(operand[place * _BATCH + i * 2]), raw[i])

    @T.macro
    def add_values(acc, operand, raw, page, stage, slot, at, t):
        # The first batch has been widened, the second one read.
        for n, (k, piece) in enumerate(_OUTPUT_BATCHES):
            if n > 0:
                if n > 1:
                    T.wait_wgmma(1)
                widen_values(operand, n % 2, raw)
                if n + 1 < len(_OUTPUT_BATCHES):
                    read_values(raw, *_OUTPUT_BATCHES[n + 1], page, at)
                else:
                    T.sync_warp()
                    arrive_elected(t.empty, stage)
            multiply(
                "bf16",
                acc,
                piece * 2,
                _PRODUCTS,
                operand,
                n % 2,
                at.probabilities,
                lambda i, k=k, piece=piece: (
                    slot * (_P_BYTES >> 4) + (piece + i // 2) * (ATOM_BYTES >> 4) + k * (K_STEP * 2 >> 4)
                ),
                lambda i: i,
                lambda i: 1,
            )
        T.wait_wgmma(0)
        T.warpgroup_fence_operand(acc, 0, NUM_TILES * SCORES)

    @T.macro
    def share(acc, running_max, row_sum, at, t):
        # The sums over a row's threads, and the half of the outputs that the other warpgroup writes.
        for step in (4, 8, 16):
            for c in T.unroll(COLUMNS):
                row_sum[c] = row_sum[c] + T.shfl_xor(row_sum[c], step)
        if at.lane < 4:
            for c in T.unroll(COLUMNS):
                column = at.column + c // 2 * 8 + c % 2
                t.sums[at.group, at.warp, column] = row_sum[c]
                t.last_maxima[at.group, column] = running_max[c]
        T.sync_threads(at.barrier, WARPGROUP)  # every warp has read P
        for i in T.unroll(_MERGED):
            t.own[at.group, i * WARPGROUP + t.tx % WARPGROUP] = T.if_then_else(at.group == 0, acc[_MERGED + i], acc[i])
        T.sync_threads(MERGE_BARRIER, CONSUMERS)

    @T.macro
    def merge(acc, running_max, row_sum, mine, theirs, request, at, t):
        # Of each of a thread's rows sum, maximum, and the factors of both warpgroups' outputs. Whichever of them had
        # the first block, the results are the same.
        for c in T.unroll(COLUMNS):
            column = at.column + c // 2 * 8 + c % 2
            sums = T.alloc_local((2,), accum)
            for group in T.unroll(2):
                sums[group] = t.sums[T.bitwise_xor(at.group, group), 0, column]
                for warp in (1, 2, 3):
                    sums[group] = sums[group] + t.sums[T.bitwise_xor(at.group, group), warp, column]
            other_max = T.alloc_var(accum, init=t.last_maxima[1 - at.group, column])
            most = T.alloc_var(accum, init=T.max(running_max[c], other_max))
            mine[c] = rescale_factor(running_max[c], most)
            theirs[c] = rescale_factor(other_max, most)
            row_sum[c] = T.call_extern(accum, "tilemla::sum_of_products", sums[0], mine[c], sums[1], theirs[c])
            running_max[c] = most
            sinks = T.alloc_var(accum, init=0)
            if t.has_sink != 0:
                # A piece of a split request leaves the sink to the combine kernel.
                if T.Not(is_split(t.part, request)):
                    sink = t.attn_sink[t.head, T.truncmod(t.tile[0] + column, t.group_size)]
                    sinks = sink_share(most, sink)
            factor = T.alloc_var(accum, init=inverse_sum(row_sum[c], sinks))
            mine[c] = mine[c] * factor
            theirs[c] = theirs[c] * factor

    @T.macro
    def write_rows(acc, mine, theirs, place, to_partial, at, t):
        pair = T.alloc_local((2,), accum)
        for c in T.unroll(COLUMNS):
            row = t.tile[0] + at.column + c // 2 * 8 + c % 2
            if row < t.rows:
                for tile in T.unroll(_HALF_TILES):
                    for half in T.unroll(2):
                        i = tile * SCORES + c // 2 * 4 + half * 2 + c % 2
                        pair[half] = T.call_extern(
                            accum,
                            "tilemla::sum_of_products",
                            T.if_then_else(at.group == 0, acc[i], acc[_MERGED + i]),
                            mine[c],
                            t.own[1 - at.group, i * WARPGROUP + t.tx % WARPGROUP],
                            theirs[c],
                        )
                    column = (
                        at.group * (head_dim_v // NUM_WARPGROUPS)
                        + tile // 2 * PIECE_COLUMNS
                        + at.warp * 32
                        + tile % 2 * 16
                        + at.lane // 4 * 2
                    )
                    if to_partial:
                        T.call_extern(
                            "handle",
                            "tilemla::store_pair",
                            T.address_of(t.out_accum[place, t.head, row, column]),
                            pair[0],
                            pair[1],
                        )
                    else:
                        T.call_extern(
                            "handle",
                            "tilemla::store_halves",
                            T.address_of(t.out[place, t.head, row, column]),
                            pair[0],
                            pair[1],
                        )

    @T.macro
    def write_lse(running_max, row_sum, request, place, to_partial, at, t):
        if (at.group == 0) & (at.warp == 0) & (at.lane < 4):
            for c in T.unroll(COLUMNS):
                row = t.tile[0] + at.column + c // 2 * 8 + c % 2
                if row < t.rows:
                    if to_partial:
                        t.lse_accum_log2[place, t.head, row] = partial_lse_log2(row_sum[c], running_max[c])
                    else:
                        t.softmax_lse[request, t.head, row] = final_lse(row_sum[c], running_max[c], t.lse_scale)

    @T.macro
    def write(acc, running_max, row_sum, request, at, t):
        mine = T.alloc_local((COLUMNS,), accum)
        theirs = T.alloc_local((COLUMNS,), accum)
        merge(acc, running_max, row_sum, mine, theirs, request, at, t)
        if is_split(t.part, request):
            place = T.alloc_var("int32", init=split_slot(t.part, request, t.num_splits))
            write_rows(acc, mine, theirs, place, True, at, t)
            write_lse(running_max, row_sum, request, place, True, at, t)
        else:
            write_rows(acc, mine, theirs, request, False, at, t)
            write_lse(running_max, row_sum, request, request, False, at, t)

    @T.macro
    def consumer(t):
        acc = T.alloc_local((NUM_TILES * SCORES,), accum)
        scores = T.alloc_local(((1 + NUM_PIECES) * SCORES,), accum)
        operand = T.alloc_local((2 * _BATCH,), "uint32")
        raw = T.alloc_local((2 * A_REGISTERS,), "uint32")
        scaled = T.alloc_local((SCORES,), accum)
        weights = T.alloc_local((SCORES,), accum)
        scales = T.alloc_local((2 * NUM_PIECES,), accum)
        q_factors = T.alloc_local((COLUMNS,), accum)
        running_max = T.alloc_local((COLUMNS,), accum)
        row_sum = T.alloc_local((COLUMNS,), accum)  # over this thread's tokens until the request ends
        queries = T.alloc_wgmma_desc()
        probabilities = T.alloc_wgmma_desc()
        group = T.alloc_var("int32", init=T.truncdiv(t.tx, WARPGROUP))
        lane = t.tx % 32
        warp = t.tx % WARPGROUP // 32
        pages = T.alloc_var("int32", init=address(t.pages[0]))
        p = T.alloc_var(
            "int32",
            init=address(t.own[0, 0])
            + group * (OWN_FLOATS * 4)
            + lane // 16 * (ATOM_BYTES // 2)
            + lane % 8 * _ROW_BYTES
            + T.bitwise_xor(warp * 2 + lane // 8 % 2, lane % 8) * CHUNK,
        )
        slot = T.alloc_var("int32", init=0)
        base = T.alloc_var("int32", init=0)  # items of the requests before
        at = SimpleNamespace(
            group=group,
            lane=lane,
            warp=warp,
            barrier=1 + group,
            token=warp * 16 + lane // 4,
            column=lane % 4 * 2,
            q=address(t.q_tile[0]),
            queries=queries,
            probabilities=probabilities,
            # Of a page: the row of ldmatrix that a lane names, of 16 tokens, and two pieces, 16 columns or 32 columns.
            keys=(warp * 16 + lane % 16) * PITCH + lane // 16 * PIECE_COLUMNS,
            rope=(warp * 16 + lane % 16) * PITCH + lane // 16 * CHUNK + ROPE_AT,
            values=lane % 16 * PITCH + warp * 32 + lane // 16 * CHUNK,
        )
        T.initialize_wgmma_descriptor(queries, T.address_of(t.q_tile[0]), 1, 1, 64)  # 128-byte swizzle
        T.initialize_wgmma_descriptor(probabilities, T.address_of(t.own[group, 0]), 1, 1, 64)
        for request in T.serial(t.part.begin_request, t.part.end_request_inclusive + 1):
            bounds = begin_and_end(request, t)
            begin = T.alloc_var("int32", init=bounds.begin)
            end = T.alloc_var("int32", init=bounds.end)
            block = T.alloc_var("int32", init=begin + T.bitwise_and(group - base, NUM_WARPGROUPS - 1))
            take_q(request, at, t)
            for c in T.unroll(COLUMNS):
                running_max[c] = RUNNING_MAX_START
                row_sum[c] = 0
            for i in T.unroll(NUM_TILES * SCORES):
                acc[i] = 0
            T.sync_threads(MERGE_BARRIER, CONSUMERS)
            for c in T.unroll(COLUMNS):
                q_factors[c] = t.q_factors[at.column + c // 2 * 8 + c % 2]
            while block < end:
                item = T.alloc_var("int32", init=base + block - begin)
                stage = T.alloc_var("int32", init=stage_of(item))
                page = T.alloc_var("int32", init=pages + stage * PAGE_BYTES)
                T.barrier_wait(t.full[stage], phase_of(item))
                clear_unseen(request, block, page, at, t)
                for half in T.unroll(2):
                    T.call_extern(
                        "handle",
                        "tilemla::read_scales",
                        T.address_of(scales[half * NUM_PIECES]),
                        page + (at.token + half * 8) * PITCH + SCALES_AT,
                    )
                score(scores, operand, raw, page, at)
                read_values(raw, *_OUTPUT_BATCHES[0], page, at)
                add_pieces(scaled, scores, scales, q_factors, t)
                hide_scores(scaled, request, block, at, t)
                widen_values(operand, 0, raw)
                read_values(raw, *_OUTPUT_BATCHES[1], page, at)
                soften(acc, weights, scaled, running_max, row_sum, scales, p + slot * _P_BYTES, at, t)
                add_values(acc, operand, raw, page, stage, slot, at, t)
                slot = 1 - slot
                block += NUM_WARPGROUPS
            base += T.max(end - begin, 0)
            share(acc, running_max, row_sum, at, t)
            write(acc, running_max, row_sum, request, at, t)

    return consumer
