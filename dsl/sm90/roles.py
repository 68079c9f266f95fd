"""Who does what in the kernels whose tokens a producer warpgroup gathers: four warpgroups of a thread block."""

from typing import Any

import tilelang.language as T

from tilemla.dsl.sm90.sparse_tile import (
    OUTPUT_REGISTERS,
    PRODUCER_REGISTERS,
    QUARTER,
    SCORE_REGISTERS,
)
from tilemla.dsl.sm90.tile import HALF, LEFT_BARRIER, RIGHT_BARRIER, ROWS, WARPGROUP


def make_roles(score_warpgroup: Any, output_warpgroup: Any, producer: Any) -> Any:
    """Make the macro ``play(t)``.

    Parameters
    ----------
    score_warpgroup, producer : macro
        ``(t)``.
    output_warpgroup : macro
        Of `sparse_output.make_output_warpgroup`.
    """
    accum = "float32"

    @T.macro
    def play(t):
        if t.tx < WARPGROUP:
            T.set_max_nreg(SCORE_REGISTERS, 0)
            score_warpgroup(t)
        elif t.tx < 2 * WARPGROUP:
            T.set_max_nreg(OUTPUT_REGISTERS, 1)
            left_first = T.alloc_fragment((ROWS, QUARTER), accum)
            left_second = T.alloc_fragment((ROWS, QUARTER), accum)
            output_warpgroup(left_first, left_second, 0, LEFT_BARRIER, t)
        elif t.tx < 3 * WARPGROUP:
            T.set_max_nreg(OUTPUT_REGISTERS, 1)
            right_first = T.alloc_fragment((ROWS, QUARTER), accum)
            right_second = T.alloc_fragment((ROWS, QUARTER), accum)
            output_warpgroup(right_first, right_second, HALF, RIGHT_BARRIER, t)
        else:
            T.set_max_nreg(PRODUCER_REGISTERS, 0)
            producer(t)

    return play


def make_turns(warpgroup: Any, producer: Any, registers: tuple[int, int, int]) -> Any:
    """Make the macro ``play(t)`` of three warpgroups: two that take turns, and a producer.

    Parameters
    ----------
    warpgroup : macro
        Of `alternate.make_alternating_warpgroup`.
    producer : macro
        ``(t)``.
    registers : (int, int, int)
        Of a thread of each.
    """

    @T.macro
    def play(t):
        if t.tx < WARPGROUP:
            T.set_max_nreg(registers[0], 1)
            warpgroup(0, t)
        elif t.tx < 2 * WARPGROUP:
            T.set_max_nreg(registers[1], 1)
            warpgroup(1, t)
        else:
            T.set_max_nreg(registers[2], 0)
            producer(t)

    return play
