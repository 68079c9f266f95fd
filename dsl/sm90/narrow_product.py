"""The products of the decode kernel for few rows: batches of operands of 64 rows from registers."""

import tilelang.language as T

from tilemla.dsl.sm90.narrow_tile import A_REGISTERS, SCORES

PRODUCTS = 4  # of a batch, that leave together; of four accumulators, so that none waits for another
BATCH = PRODUCTS * A_REGISTERS  # registers of their operands; those of two batches are in use at once


@T.macro
def multiply(dtype, acc, first, count, operand, place, matrix, offset_of, accumulator_of, adds) -> None:
    """Multiply a batch, each with an offset of ``matrix`` and to one of the accumulators from ``first`` on."""
    T.warpgroup_fence_operand(operand, place * BATCH, BATCH)
    T.warpgroup_fence_operand(acc, first * SCORES, count * SCORES)
    T.warpgroup_arrive()
    for i in T.unroll(PRODUCTS):
        T.ptx_wgmma_rs(
            "float32",
            "m64n16k16",
            True,
            dtype,
            dtype,
            "fp32",
            operand.data,
            place * BATCH + i * A_REGISTERS,
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
    T.warpgroup_fence_operand(operand, place * BATCH, BATCH)
