"""Tile programs that are small enough to build in a test."""

import tilelang.language as T

from tilemla.dsl.program import Program

NO_SPECIALIZATION = {"tl.disable_warp_specialized": True}


def make_tma_wgmma() -> Program:
    """One page per CTA: two TMA loads, one wgmma product of 64 queries with 64 keys."""
    b, num_blocks, columns, q_stride_b, q_stride_row = T.dynamic("b, num_blocks, columns, q_stride_b, q_stride_row")

    @T.prim_func
    def scores(
        q: T.StridedTensor((b, 64, 128), (q_stride_b, q_stride_row, 1), "bfloat16"),
        kcache: T.Tensor((num_blocks, 64, 128), "bfloat16"),
        block_table: T.Tensor((b, columns), "int32"),
        out: T.Tensor((b, 64, 64), "float32"),
        scale: T.float32,
    ):
        with T.Kernel(b, threads=128) as bx:
            q_shared = T.alloc_shared((64, 128), "bfloat16")
            k_shared = T.alloc_shared((64, 128), "bfloat16")
            acc = T.alloc_fragment((64, 64), "float32")
            full = T.alloc_barrier(1)
            tx = T.get_thread_binding()
            if tx < 32:
                T.tma_copy(q[bx, 0:64, 0:128], q_shared, barrier=full, leader_scope_threads=32)
                T.tma_copy(kcache[block_table[bx, 0], 0:64, 0:128], k_shared, barrier=full, leader_scope_threads=32)
                if tx == 0:
                    T.barrier_arrive(full)
            T.barrier_wait(full, 0)
            T.wgmma_gemm(q_shared, k_shared, acc, transpose_B=True, clear_accum=True)
            T.wait_wgmma(0)
            for i, j in T.Parallel(64, 64):
                out[bx, i, j] = acc[i, j] * scale

    return Program(scores, NO_SPECIALIZATION)


def make_spilling() -> Program:
    """1024 threads have 64 registers each, and this wants 96 values at once."""
    n = T.dynamic("n")

    @T.prim_func
    def spill(x: T.Tensor((n, 96, 1024), "float32"), y: T.Tensor((n, 96, 1024), "float32")):
        with T.Kernel(n, threads=1024) as bx:
            held = T.alloc_local((96,), "float32")
            tx = T.get_thread_binding()
            for i in T.unroll(96):
                held[i] = x[bx, i, tx]
            for _ in T.serial(n):
                for i in T.unroll(96):
                    held[i] = held[i] * held[(i + 7) % 96] + held[95 - i]
            for i in T.unroll(96):
                y[bx, i, tx] = held[i]

    return Program(spill, NO_SPECIALIZATION)


def make_two_kernels(waits: bool) -> Program:
    """A kernel and one that follows it, under programmatic dependent launch if it waits."""
    n = T.dynamic("n")

    @T.prim_func
    def two(x: T.Tensor((n, 128), "float32"), half: T.Tensor((n, 128), "float32"), y: T.Tensor((n, 128), "float32")):
        with T.Kernel(T.ceildiv(n, 4), threads=128) as bx:
            for i, j in T.Parallel(4, 128):
                if bx * 4 + i < n:
                    half[bx * 4 + i, j] = x[bx * 4 + i, j] * 0.5
            T.pdl_trigger()
        with T.Kernel(n, threads=128) as bx:
            if waits:
                T.pdl_sync()
            for j in T.Parallel(128):
                y[bx, j] = half[bx, j] + 1.0

    return Program(two, NO_SPECIALIZATION)


def make_row_sum(dtype: str = "float16") -> Program:
    """A CPU program: scaled sums of rows, bfloat16 storage declared uint16."""
    b, n, stride = T.dynamic("b, n, stride")
    storage = "uint16" if dtype == "bfloat16" else dtype

    def widen(value):
        return (
            T.reinterpret(T.cast(value, "uint32") << 16, "float32") if dtype == "bfloat16" else T.cast(value, "float32")
        )

    @T.prim_func
    def row_sum(
        x: T.StridedTensor((b, n), (stride, 1), storage),
        offsets: T.Tensor((b + 1,), "int32"),
        out: T.Tensor((b,), "float32"),
        scale: T.float32,
        negate: T.int32,
    ):
        with T.Kernel(b, threads=1) as bx:
            total = T.alloc_local((1,), "float32")
            total[0] = T.cast(offsets[bx + 1], "float32")
            for j in T.serial(n):
                total[0] = total[0] + widen(x[bx, j])
            out[bx] = T.if_then_else(negate > 0, -total[0], total[0]) * scale

    return Program(row_sum)
