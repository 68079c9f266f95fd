"""A consumer warpgroup of the decode kernel for few rows: whole pages, with products transposed.

Tokens are the rows of S^T = K Q^T, output columns those of O^T += V^T P^T, and the rows of the tile are the columns of
both. What ldmatrix gives a thread of a page is widened in registers, exactly, and is wgmma's first operand there. The
scales are applied where numbers are few: to the scores of each piece of 128 columns, which have an accumulator of their
own, and to P, of which there is one for each piece. Keys become float16, which takes an instruction for two; the latent
part of Q does, too, by a power of two for each row. P and its scales may be of any size: there values are bfloat16.

How scores are made is in `narrow_score`, how a request ends in `narrow_out`; ``at`` is where in a page and in the tile
a thread's share is.

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
    first_visible_key,
    probability_of_scaled,
    rescale_factor,
)
from tilemla.dsl.schedule import BLOCK_N
from tilemla.dsl.sm90.e4m3_tile import arrive_elected
from tilemla.dsl.sm90.narrow_out import make_way_out
from tilemla.dsl.sm90.narrow_product import BATCH, PRODUCTS, multiply
from tilemla.dsl.sm90.narrow_score import make_scores
from tilemla.dsl.sm90.narrow_tile import (
    A_REGISTERS,
    ATOM_BYTES,
    CHUNK,
    COLUMNS,
    K_STEP,
    NUM_PIECES,
    NUM_TILES,
    NUM_WARPGROUPS,
    OWN_FLOATS,
    PAGE_BYTES,
    PIECE_COLUMNS,
    PITCH,
    ROPE_AT,
    ROW_BYTES,
    SCALES_AT,
    SCORES,
    phase_of,
    stage_of,
)
from tilemla.dsl.sm90.tile import WARPGROUP, begin_and_end, request_of

_P_BYTES = NUM_PIECES * ATOM_BYTES
# Batches of O^T: a K step of 16 tokens, and the first of two pieces, so of four tiles of 64 columns.
_OUTPUT_BATCHES = [(k, piece) for k in range(BLOCK_N // K_STEP) for piece in (0, 2)]


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
    scoring, way_out = make_scores(head_dim_qk, head_dim_v), make_way_out(head_dim_v)

    def address(buffer):
        return T.call_extern("int32", "tilemla::shared_address", T.address_of(buffer))

    @T.macro
    def clear_bytes(begin, end, at, t):
        chunk = T.alloc_var("int32", init=begin + t.tx % WARPGROUP * CHUNK)
        while chunk < end:
            T.call_extern("handle", "tilemla::clear_chunk", chunk)
            chunk += WARPGROUP * CHUNK

    @T.macro
    def clear_unseen(block, page, at, t):
        # P is 0 where no query sees a token, but what lies there may be NaN.
        seqlen = T.alloc_var("int32", init=at.seqlen - block * BLOCK_N)
        first = T.alloc_var("int32", init=first_visible_key(at.seqlen, t.seq_len_q, t.window_left) - block * BLOCK_N)
        if (seqlen < BLOCK_N) | (first > 0):
            clear_bytes(page, page + T.min(first, BLOCK_N) * PITCH, at, t)
            clear_bytes(page + T.max(seqlen, 0) * PITCH, page + PAGE_BYTES, at, t)
            T.fence_proxy_async()  # the page is loaded over next
            T.sync_threads(at.barrier, WARPGROUP)

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
            T.call_extern("handle", "tilemla::widen_values", T.address_of(operand[place * BATCH + i * 2]), raw[i])

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
                PRODUCTS,
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
    def consumer(t):
        acc = T.alloc_local((NUM_TILES * SCORES,), accum)
        scores = T.alloc_local(((1 + NUM_PIECES) * SCORES,), accum)
        operand = T.alloc_local((2 * BATCH,), "uint32")
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
            + lane % 8 * ROW_BYTES
            + T.bitwise_xor(warp * 2 + lane // 8 % 2, lane % 8) * CHUNK,
        )
        slot = T.alloc_var("int32", init=0)
        q_phase = T.alloc_var("int32", init=0)
        seqlen = T.alloc_var("int32", init=0)  # of the request; read once, not for each page
        base = T.alloc_var("int32", init=0)  # items of the requests before
        at = SimpleNamespace(
            group=group,
            lane=lane,
            warp=warp,
            seqlen=seqlen,
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
        for place in T.serial(t.part.begin_place, t.part.end_place_inclusive + 1):
            request = T.alloc_var("int32", init=request_of(place, t))
            bounds = begin_and_end(place, request, t)
            begin = T.alloc_var("int32", init=bounds.begin)
            end = T.alloc_var("int32", init=bounds.end)
            block = T.alloc_var("int32", init=begin + T.bitwise_and(group - base, NUM_WARPGROUPS - 1))
            scoring.take_q(request, at, t)
            for c in T.unroll(COLUMNS):
                running_max[c] = RUNNING_MAX_START
                row_sum[c] = 0
            for i in T.unroll(NUM_TILES * SCORES):
                acc[i] = 0
            seqlen = t.cache_seqlens[request]
            T.sync_warp()
            arrive_elected(t.q_full, 0)
            T.barrier_wait(t.q_full[0], q_phase)
            q_phase = q_phase ^ 1
            for c in T.unroll(COLUMNS):
                q_factors[c] = t.q_factors[at.column + c // 2 * 8 + c % 2]
            while block < end:
                item = T.alloc_var("int32", init=base + block - begin)
                stage = T.alloc_var("int32", init=stage_of(item))
                page = T.alloc_var("int32", init=pages + stage * PAGE_BYTES)
                T.barrier_wait(t.full[stage], phase_of(item))
                clear_unseen(block, page, at, t)
                for half in T.unroll(2):
                    T.call_extern(
                        "handle",
                        "tilemla::read_scales",
                        T.address_of(scales[half * NUM_PIECES]),
                        page + (at.token + half * 8) * PITCH + SCALES_AT,
                    )
                scoring.score(scores, operand, raw, page, at)
                read_values(raw, *_OUTPUT_BATCHES[0], page, at)
                scoring.add_pieces(scaled, scores, scales, q_factors, t)
                scoring.hide_scores(scaled, block, at, t)
                widen_values(operand, 0, raw)
                read_values(raw, *_OUTPUT_BATCHES[1], page, at)
                soften(acc, weights, scaled, running_max, row_sum, scales, p + slot * _P_BYTES, at, t)
                add_values(acc, operand, raw, page, stage, slot, at, t)
                slot = 1 - slot
                block += NUM_WARPGROUPS
            base += T.max(end - begin, 0)
            way_out.share(acc, running_max, row_sum, at, t)
            way_out.write(acc, running_max, row_sum, place, at, t)

    return consumer
