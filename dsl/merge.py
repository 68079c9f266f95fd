"""Merging two partial results of the same queries over different keys, as decode calls return them.

With ``lse`` in some base the merged log-sum-exp is ``max + log(1 + exp(min - max))`` and the outputs weigh
``1 / (1 + exp(min - max))`` and what is left. A log-sum-exp that is infinite says that nothing was attended: the other
result is then returned bit for bit, whatever the output beside it holds.
"""

from typing import Any

import tilelang.language as T

from tilemla.dsl.program import Program
from tilemla.dsl.tokens_cpu import narrow, widen

_THREADS = 128
_VECTOR_BYTES = 16


def is_empty(lse) -> Any:
    """Whether a row attended to nothing: +inf, or -inf as other libraries have it. NaN is not empty, and spreads."""
    return (lse == T.infinity("float32")) | (lse == -T.infinity("float32"))


def smaller_weight(lse_a, lse_b, lse_scale) -> Any:
    """The sum of exponentials of the smaller of two states over that of the larger, 0 to 1."""
    return T.exp2(T.min(lse_a - lse_b, lse_b - lse_a) / lse_scale)


def merged_lse(lse_a, lse_b, ratio, lse_scale) -> Any:
    """The log-sum-exp of both states; `lse_scale` is the log of 2 in their base."""
    return T.max(lse_a, lse_b) + T.log2(1.0 + ratio) * lse_scale


def weight_of(lse, other_lse, ratio) -> Any:
    """The normalised weight of a state's output."""
    return T.if_then_else(lse >= other_lse, 1.0, ratio) / (1.0 + ratio)


def make_merge_program_cpu(spec) -> Program:
    """Merge two states in C.

    Parameters
    ----------
    spec : KernelSpec
        Of which the dtype and head_dim_v count.

    Returns
    -------
    Program
        ``merge_states(out_a (b, s_q, h_q, head_dim_v), lse_a (b, h_q, s_q) strided, out_b, lse_b, out, lse,
        lse_scale)``, all of the first shape or the second. ``lse_scale`` is ln 2 for natural logarithms, 1 for base 2.
        Strided tensors may have any strides; bfloat16 tensors are declared uint16.
    """
    dtype, head_dim_v = spec.dtype, spec.head_dim_v
    storage = "uint16" if dtype == "bfloat16" else dtype
    b, s_q, h_q = T.dynamic("b, s_q, h_q")
    a_stride_b, a_stride_h, a_stride_s = T.dynamic("a_stride_b, a_stride_h, a_stride_s")
    b_stride_b, b_stride_h, b_stride_s = T.dynamic("b_stride_b, b_stride_h, b_stride_s")
    stride_b, stride_h, stride_s = T.dynamic("stride_b, stride_h, stride_s")

    @T.prim_func
    def merge_states(
        out_a: T.Tensor((b, s_q, h_q, head_dim_v), storage),
        lse_a: T.StridedTensor((b, h_q, s_q), (a_stride_b, a_stride_h, a_stride_s), "float32"),
        out_b: T.Tensor((b, s_q, h_q, head_dim_v), storage),
        lse_b: T.StridedTensor((b, h_q, s_q), (b_stride_b, b_stride_h, b_stride_s), "float32"),
        out: T.Tensor((b, s_q, h_q, head_dim_v), storage),
        lse: T.StridedTensor((b, h_q, s_q), (stride_b, stride_h, stride_s), "float32"),
        lse_scale: T.float32,
    ):
        with T.Kernel(h_q, s_q, b, threads=1) as (head, query, request):
            weights = T.alloc_local((2,), "float32")
            left = lse_a[request, head, query]
            right = lse_b[request, head, query]
            if is_empty(left) & is_empty(right):
                lse[request, head, query] = T.infinity("float32")
                for d in T.serial(head_dim_v):
                    out[request, query, head, d] = T.cast(0, storage)
            elif is_empty(right):
                lse[request, head, query] = left
                for d in T.serial(head_dim_v):
                    out[request, query, head, d] = out_a[request, query, head, d]
            elif is_empty(left):
                lse[request, head, query] = right
                for d in T.serial(head_dim_v):
                    out[request, query, head, d] = out_b[request, query, head, d]
            else:
                ratio = smaller_weight(left, right, lse_scale)
                weights[0] = weight_of(left, right, ratio)
                weights[1] = weight_of(right, left, ratio)
                lse[request, head, query] = merged_lse(left, right, ratio, lse_scale)
                for d in T.serial(head_dim_v):
                    out[request, query, head, d] = narrow(
                        weights[0] * widen(out_a[request, query, head, d], dtype)
                        + weights[1] * widen(out_b[request, query, head, d], dtype),
                        dtype,
                    )

    return Program(merge_states, {"tl.disable_safe_memory_legalize": True})


def make_merge_program_cuda(spec) -> Program:
    """Merge two states elementwise, each thread 16 bytes of a row.

    Parameters
    ----------
    spec : KernelSpec
        Of which the dtype and head_dim_v count.

    Returns
    -------
    Program
        As `make_merge_program_cpu`, but of the spec's dtype.
    """
    dtype, head_dim_v = spec.dtype, spec.head_dim_v
    vector = _VECTOR_BYTES // 2
    row_threads = head_dim_v // vector
    rows_per_cta = _THREADS // row_threads
    b, s_q, h_q = T.dynamic("b, s_q, h_q")
    a_stride_b, a_stride_h, a_stride_s = T.dynamic("a_stride_b, a_stride_h, a_stride_s")
    b_stride_b, b_stride_h, b_stride_s = T.dynamic("b_stride_b, b_stride_h, b_stride_s")
    stride_b, stride_h, stride_s = T.dynamic("stride_b, stride_h, stride_s")

    @T.prim_func
    def merge_states(
        out_a: T.Tensor((b, s_q, h_q, head_dim_v), dtype),
        lse_a: T.StridedTensor((b, h_q, s_q), (a_stride_b, a_stride_h, a_stride_s), "float32"),
        out_b: T.Tensor((b, s_q, h_q, head_dim_v), dtype),
        lse_b: T.StridedTensor((b, h_q, s_q), (b_stride_b, b_stride_h, b_stride_s), "float32"),
        out: T.Tensor((b, s_q, h_q, head_dim_v), dtype),
        lse: T.StridedTensor((b, h_q, s_q), (stride_b, stride_h, stride_s), "float32"),
        lse_scale: T.float32,
    ):
        with T.Kernel(T.ceildiv(b * s_q * h_q, rows_per_cta), threads=_THREADS) as block:
            values_a = T.alloc_local((vector,), dtype)
            values_b = T.alloc_local((vector,), dtype)
            tx = T.get_thread_binding()
            row = block * rows_per_cta + tx // row_threads
            column = tx % row_threads * vector
            if row < b * s_q * h_q:
                request = T.truncdiv(row, s_q * h_q)
                query = T.truncmod(T.truncdiv(row, h_q), s_q)
                head = T.truncmod(row, h_q)
                left = T.alloc_var("float32", init=lse_a[request, head, query])
                right = T.alloc_var("float32", init=lse_b[request, head, query])
                merged = T.alloc_var("float32", init=T.infinity("float32"))
                for v in T.vectorized(vector):
                    values_a[v] = out_a[request, query, head, column + v]
                for v in T.vectorized(vector):
                    values_b[v] = out_b[request, query, head, column + v]
                if is_empty(left) & is_empty(right):
                    for v in T.vectorized(vector):
                        values_a[v] = T.cast(0, dtype)
                elif is_empty(right):
                    merged = left
                elif is_empty(left):
                    merged = right
                    for v in T.vectorized(vector):
                        values_a[v] = values_b[v]
                else:
                    ratio = T.alloc_var("float32", init=smaller_weight(left, right, lse_scale))
                    weight_a = T.alloc_var("float32", init=weight_of(left, right, ratio))
                    weight_b = T.alloc_var("float32", init=weight_of(right, left, ratio))
                    merged = merged_lse(left, right, ratio, lse_scale)
                    for v in T.unroll(vector):
                        values_a[v] = T.cast(
                            weight_a * T.cast(values_a[v], "float32") + weight_b * T.cast(values_b[v], "float32"), dtype
                        )
                for v in T.vectorized(vector):
                    out[request, query, head, column + v] = values_a[v]
                if column == 0:
                    lse[request, head, query] = merged

    return Program(
        merge_states,
        {
            "tl.disable_thread_storage_sync": True,
            "tl.disable_warp_specialized": True,
            "tl.disable_safe_memory_legalize": True,
        },
    )
