"""The output warpgroups of the decode kernel over e4m3: O^T (+)= V^T P^T, each for half of the columns, O's way out.

Transposed, the values are the operand that wgmma takes from registers: what ldmatrix gives a thread of a page is
widened there, and never written to shared memory. A thread then has columns of O by row: of each product of 64 columns,
eight groups of two neighbouring rows of the tile, at each of these rows two neighbouring columns.

Registers are short: what is wanted only now and then is made anew of `thread_of_warpgroup`, and products in flight are
few, so that those of the score warpgroup are not kept waiting.
"""

from typing import Any

import tilelang.language as T

from tilemla.config import KernelConfig
from tilemla.dsl.attention import first_visible_key
from tilemla.dsl.schedule import BLOCK_N, is_split, split_slot
from tilemla.dsl.sm90.e4m3_load import make_loader
from tilemla.dsl.sm90.e4m3_tile import (
    A_REGISTERS,
    ATOM_BYTES,
    ATOM_COLUMNS,
    CHUNK,
    NUM_STAGES,
    arrive_elected,
    phase_of,
    slot_of,
    slot_phase_of,
    stage_of,
)
from tilemla.dsl.sm90.load import PLACE
from tilemla.dsl.sm90.tile import (
    HALF,
    NOT_UNROLLED,
    ROWS,
    SCORES,
    WARPGROUP,
    begin_and_end,
    half_of,
    is_loading,
    request_of,
    sync_half,
)

_PRODUCTS = 4  # of 64 columns each
_FIRST_OF_ROUND = (0, 2)  # products that leave together
_K_STEP = 16  # the K of wgmma on float16: tokens
# What is read at once: 16 tokens of an atom's columns, for a K step of two products.
_PIECES = tuple((k, atom) for k in range(BLOCK_N // _K_STEP) for atom in range(HALF // ATOM_COLUMNS))
_OPERAND = 2 * A_REGISTERS  # registers of a piece's values; those of two are in use at once
_RAW = _OPERAND // 2


def make_output_warpgroups(head_dim_v: int, config: KernelConfig) -> Any:
    """Make the macro ``output_warpgroups(cursor, t)``, of the instructions of both.

    ``cursor`` is the load cursor, used in one warp of the right one.

    Parameters
    ----------
    head_dim_v : int
        Latent columns of a page.
    config : KernelConfig
        See `make_loader`.
    """
    accum = "float32"
    seek, load = make_loader(head_dim_v, config)

    @T.macro
    def clear_tokens(begin, end, stage, t):
        thread = T.alloc_var("int32", init=T.call_extern("int32", "tilemla::thread_of_warpgroup"))
        for i in T.unroll(begin, end, annotations=NOT_UNROLLED):
            for v in T.vectorized(2):
                t.kv[stage, i, half_of(t.tx) * HALF + thread * 2 + v] = 0

    @T.macro
    def clear_unseen(place, left, item, t):
        # P is 0 where no query sees a token, but what lies there may be NaN.
        request = T.alloc_var("int32", init=request_of(place, t))
        end = begin_and_end(place, request, t).end
        shift = T.alloc_var("int32", init=(end - left) * BLOCK_N)
        seqlen = T.alloc_var("int32", init=t.cache_seqlens[request])
        first = T.alloc_var("int32", init=first_visible_key(seqlen, t.seq_len_q, t.window_left) - shift)
        if (shift + BLOCK_N > seqlen) | (first > 0):
            T.barrier_wait(t.p_full[slot_of(item)], slot_phase_of(item))  # the scores are made of what was there
            clear_tokens(0, T.min(first, BLOCK_N), stage_of(item), t)
            clear_tokens(T.max(seqlen - shift, 0), BLOCK_N, stage_of(item), t)
            T.fence_proxy_async()  # TMA writes there next
            sync_half(t.tx)

    @T.macro
    def read(raw, values, k_step, atom):
        # Four matrices of eight tokens: two of the warp's 16 columns in the first product, two of those in the second.
        T.call_extern(
            "handle",
            "tilemla::read_columns",
            T.address_of(raw[0]),
            values + (atom * ATOM_BYTES + k_step * _K_STEP * ATOM_COLUMNS),
        )

    @T.macro
    def widen(operand, raw, place):
        for i in T.unroll(_RAW):
            T.call_extern("handle", "tilemla::widen", T.address_of(operand[place * _OPERAND + i * 2]), raw[i])

    @T.macro
    def multiply(acc, operand, place, k_step, atom, probabilities, slot):
        T.warpgroup_fence_operand(operand, place * _OPERAND, _OPERAND)
        T.warpgroup_fence_operand(acc, atom * 2 * SCORES, 2 * SCORES)
        T.warpgroup_arrive()
        for i in T.unroll(2):
            T.ptx_wgmma_rs(
                accum,
                "m64n64k16",
                True,
                "fp16",
                "fp16",
                "fp32",
                operand.data,
                place * _OPERAND + i * A_REGISTERS,
                probabilities.data,
                slot * (ROWS * BLOCK_N * 2 >> 4) + k_step * (_K_STEP * 2 >> 4),
                acc.data,
                (atom * 2 + i) * SCORES,
                1,
                1,
                1,
            )
        T.warpgroup_commit_batch()
        T.warpgroup_fence_operand(acc, atom * 2 * SCORES, 2 * SCORES)
        T.warpgroup_fence_operand(operand, place * _OPERAND, _OPERAND)

    @T.macro
    def scale_rows(acc, factors, slot, factor):
        lane = T.alloc_var("int32", init=T.call_extern("int32", "tilemla::thread_of_warpgroup") % 32)
        for j in T.unroll(ROWS // 8):
            pair = T.alloc_local((2,), accum)
            for v in T.vectorized(2):
                pair[v] = factors[slot, j * 8 + lane % 4 * 2 + v]
            for v in T.unroll(2):
                pair[v] = pair[v] * factor
            for product in T.unroll(_PRODUCTS):
                for e in T.unroll(4):
                    acc[product * SCORES + j * 4 + e] = acc[product * SCORES + j * 4 + e] * pair[e % 2]

    @T.macro
    def write_partial(acc, place, request, t):
        # Two columns of a row at a time.
        thread = T.alloc_var("int32", init=T.call_extern("int32", "tilemla::thread_of_warpgroup"))
        lane, warp = thread % 32, thread // 32
        row0 = T.alloc_var("int32", init=t.tile[0] + lane % 4 * 2)
        head = T.alloc_var("int32", init=t.tile[1])
        slot = T.alloc_var("int32", init=split_slot(t.part, place, request, t.num_splits))
        first = T.alloc_var("int32", init=half_of(t.tx) * HALF + warp * CHUNK + lane // 4 * 2)
        for j in T.unroll(ROWS // 8):
            for e in T.unroll(2):
                if row0 + (j * 8 + e) < t.rows:
                    for product in T.unroll(_PRODUCTS):
                        T.call_extern(
                            "handle",
                            "tilemla::store_pair",
                            T.address_of(
                                t.out_accum[slot, head, row0 + (j * 8 + e), first + product * (ATOM_COLUMNS // 2)]
                            ),
                            acc[product * SCORES + j * 4 + e],
                            acc[product * SCORES + j * 4 + e + 2],
                        )

    @T.macro
    def await_store():
        # What the tile was stored from may be written again.
        if T.call_extern("int32", "tilemla::thread_of_warpgroup") < 32:
            T.tma_store_wait(0)

    @T.macro
    def write_out(acc, request, t):
        # There is room for half of a warpgroup's columns.
        thread = T.alloc_var("int32", init=T.call_extern("int32", "tilemla::thread_of_warpgroup"))
        lane, warp = thread % 32, thread // 32
        pair = T.alloc_local((2,), accum)
        for first in _FIRST_OF_ROUND:
            await_store()
            sync_half(t.tx)
            for j in T.unroll(ROWS // 8):
                for e in T.unroll(2):
                    for product in T.unroll(2):
                        for v in T.unroll(2):
                            pair[v] = acc[(first + product) * SCORES + j * 4 + e + v * 2]
                        for v in T.vectorized(2):
                            t.out_tile[
                                j * 8 + lane % 4 * 2 + e,
                                half_of(t.tx) * ATOM_COLUMNS
                                + product * (ATOM_COLUMNS // 2)
                                + warp * CHUNK
                                + lane // 4 * 2
                                + v,
                            ] = pair[v]
            T.fence_proxy_async()
            sync_half(t.tx)
            if thread < 32:
                half = half_of(t.tx)
                to = half * HALF + first * (ATOM_COLUMNS // 2)
                T.tma_copy(
                    t.out_tile[:, half * ATOM_COLUMNS : half * ATOM_COLUMNS + ATOM_COLUMNS],
                    t.out[request, t.tile[1], t.tile[0] : t.tile[0] + ROWS, to : to + ATOM_COLUMNS],
                    leader_scope_threads=32,
                )

    @T.macro
    def clear_rows(to, index, t):
        thread = T.alloc_var("int32", init=T.call_extern("int32", "tilemla::thread_of_warpgroup"))
        head = T.alloc_var("int32", init=t.tile[1])
        for row in T.unroll(t.tile[0], T.min(t.tile[0] + ROWS, t.rows), annotations=NOT_UNROLLED):
            for v in T.vectorized(2):
                to[index, head, row, half_of(t.tx) * HALF + thread * 2 + v] = 0

    @T.macro
    def write_empty(place, t):
        request = T.alloc_var("int32", init=request_of(place, t))
        if is_split(t.part, place):
            slot = T.alloc_var("int32", init=split_slot(t.part, place, request, t.num_splits))
            clear_rows(t.out_accum, slot, t)
        else:
            clear_rows(t.out, request, t)

    @T.macro
    def write_tile(acc, place, t):
        request = T.alloc_var("int32", init=request_of(place, t))
        if is_split(t.part, place):
            write_partial(acc, place, request, t)
        else:
            write_out(acc, request, t)

    @T.macro
    def refill(item, cursor, t):
        # The stage of the item before: the other warps have left it by now.
        if is_loading(t.tx):
            load(stage_of(item - 1), phase_of(item - 1), cursor, t)

    @T.macro
    def output_warpgroups(cursor, t):
        acc = T.alloc_local((_PRODUCTS * SCORES,), accum)
        operand = T.alloc_local((2 * _OPERAND,), "uint32")
        raw = T.alloc_local((_RAW,), "uint32")
        item = T.alloc_var("int32", init=0)
        lane = t.tx % 32
        warp = t.tx % WARPGROUP // 32
        probabilities = T.alloc_wgmma_desc()
        T.initialize_wgmma_descriptor(probabilities, T.address_of(t.p[0, 0, 0]), 1, 1, 64)  # 128-byte swizzle
        first_values = T.alloc_var(
            "int32",
            init=T.call_extern("int32", "tilemla::shared_address", T.address_of(t.kv[0, 0, 0]))
            + half_of(t.tx) * (HALF // ATOM_COLUMNS * ATOM_BYTES)
            + lane % 16 * ATOM_COLUMNS
            + T.bitwise_xor(warp + lane // 16 * 4, lane % 8) * CHUNK,
        )
        if is_loading(t.tx):
            cursor[PLACE] = t.part.begin_place
            seek(cursor, t)
            for stage in T.serial(NUM_STAGES - 1):
                load(stage, 1, cursor, t)
        for place in T.serial(t.part.begin_place, t.part.end_place_inclusive + 1):
            bounds = begin_and_end(place, request_of(place, t), t)
            left = T.alloc_var("int32", init=bounds.end - bounds.begin)  # blocks; no register for more than that
            if left <= 0:
                write_empty(place, t)
            else:
                # The Q tile: the score warpgroup has it.
                T.barrier_wait(t.p_full[slot_of(item)], slot_phase_of(item))
                T.sync_warp()
                arrive_elected(t.empty, stage_of(item))
                arrive_elected(t.p_empty, slot_of(item))
                refill(item, cursor, t)
                item += 1
                for i in T.unroll(_PRODUCTS * SCORES):
                    acc[i] = 0
                while left > 0:
                    values = T.alloc_var("int32", init=first_values + stage_of(item) * (ROWS * head_dim_v))
                    T.barrier_wait(t.full[stage_of(item)], phase_of(item))
                    if (left == 1) | (t.window_left >= 0):
                        clear_unseen(place, left, item, t)
                    read(raw, values, 0, 0)
                    widen(operand, raw, 0)
                    T.barrier_wait(t.p_full[slot_of(item)], slot_phase_of(item))
                    row = T.alloc_var("int32", init=T.call_extern("int32", "tilemla::thread_of_warpgroup") % 32)
                    moved = (t.alpha[slot_of(item), row] != 1.0) | (t.alpha[slot_of(item), row + 32] != 1.0)
                    if T.any_sync(moved) != 0:
                        scale_rows(acc, t.alpha, slot_of(item), 1.0)
                    for i, piece in enumerate(_PIECES):
                        multiply(acc, operand, i % 2, *piece, probabilities, slot_of(item))
                        if i + 1 < len(_PIECES):
                            read(raw, values, *_PIECES[i + 1])
                            T.wait_wgmma(1)  # the registers of the piece before are free
                            widen(operand, raw, (i + 1) % 2)
                    arrive_elected(t.empty, stage_of(item))
                    refill(item, cursor, t)
                    T.wait_wgmma(0)
                    T.warpgroup_fence_operand(acc, 0, _PRODUCTS * SCORES)
                    left -= 1
                    if left > 0:
                        T.sync_warp()
                        arrive_elected(t.p_empty, slot_of(item))
                        item += 1
                scale_rows(acc, t.inverse_sum, slot_of(item), t.value_scale[0])
                T.sync_warp()
                arrive_elected(t.p_empty, slot_of(item))
                item += 1
                write_tile(acc, place, t)
        await_store()

    return output_warpgroups
