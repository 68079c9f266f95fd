"""Device code of the decode kernel for few rows that no tile operation stands for; it follows `e4m3_source`."""

NARROW_SOURCE = r"""
namespace tilemla {

// One arrival, where so many bytes are still to come.
__device__ __forceinline__ void expect_bytes(int barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Bytes that follow each other, at whose barrier they count once they are there.
__device__ __forceinline__ void copy_bytes(int to, const void *from, int bytes, int barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier)
               : "memory");
}

// 16 columns of a row of Q to two neighbouring chunks, zeros where it is past the last row. PERMUTED, they are in the
// order of the K dimension that an operand has which is made of four neighbouring bytes for each lane.
template <bool PERMUTED> __device__ __forceinline__ void copy_columns(int to, const void *from, bool is_row) {
  uint4 first = make_uint4(0, 0, 0, 0), second = first;
  if (is_row) {
    first = static_cast<const uint4 *>(from)[0];
    second = static_cast<const uint4 *>(from)[1];
  }
  if (PERMUTED) {
    const uint4 a = first, b = second;
    first = make_uint4(a.x, a.z, b.x, b.z);
    second = make_uint4(a.y, a.w, b.y, b.w);
  }
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(first.x), "r"(first.y), "r"(first.z),
               "r"(first.w)
               : "memory");
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to ^ 16), "r"(second.x), "r"(second.y),
               "r"(second.z), "r"(second.w)
               : "memory");
}

__device__ __forceinline__ void clear_chunk(int to) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(to), "r"(0) : "memory");
}

// The four scales of a token.
__device__ __forceinline__ void read_scales(float *to, int from) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3])
               : "r"(from)
               : "memory");
}

__device__ __forceinline__ unsigned exact_bfloat16(unsigned short from) {
  unsigned halves, to;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(from));
  float low, high;
  asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }"
      : "=f"(low), "=f"(high)
      : "r"(halves));
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(to) : "f"(high), "f"(low));
  return to;
}

// Four neighbouring e4m3 of a token as bfloat16, which holds them all: the lower two, then, half a K step further, the
// upper two. NaN stays NaN.
__device__ __forceinline__ void widen_keys(unsigned *to, unsigned from) {
  to[0] = exact_bfloat16(static_cast<unsigned short>(from));
  to[2] = exact_bfloat16(static_cast<unsigned short>(from >> 16));
}

// Two neighbouring columns of two tokens: the first column's values, then the second's.
__device__ __forceinline__ void widen_values(unsigned *to, unsigned from) {
  const unsigned columns = __byte_perm(from, 0, 0x3120);
  to[0] = exact_bfloat16(static_cast<unsigned short>(columns));
  to[1] = exact_bfloat16(static_cast<unsigned short>(columns >> 16));
}

// What of two probabilities is multiplied with values that are still to be scaled.
__device__ __forceinline__ unsigned scaled_pair(float low, float high, float scale) {
  unsigned to;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(to) : "f"(high * scale), "f"(low * scale));
  return to;
}

// Four matrices of 8 rows and 16 bytes, of which each lane names a row, out of transposed ones.
__device__ __forceinline__ void store_columns(int to, const unsigned *from) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(from[0]),
               "r"(from[1]), "r"(from[2]), "r"(from[3])
               : "memory");
}

// A barrier of a warpgroup that tells whether any of its threads says so.
__device__ __forceinline__ int any_of_warpgroup(int barrier, bool says) {
  int any;
  asm volatile("{ .reg .pred p, q; setp.ne.b32 p, %2, 0; barrier.cta.red.or.aligned.pred q, %1, 128, p;"
               " selp.b32 %0, 1, 0, q; }"
               : "=r"(any)
               : "r"(barrier), "r"(static_cast<int>(says))
               : "memory");
  return any;
}

// a * x + b * y, the same bit for bit as b * y + a * x.
__device__ __forceinline__ float sum_of_products(float a, float x, float b, float y) {
  return __fadd_rn(__fmul_rn(a, x), __fmul_rn(b, y));
}

__device__ __forceinline__ void store_halves(void *to, float first, float second) {
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  *static_cast<unsigned *>(to) = pair;
}

} // namespace tilemla
"""
