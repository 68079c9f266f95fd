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

// 128 bytes that will be read soon, to L2.
__device__ __forceinline__ void prefetch_line(const void *from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(from)));
}

__device__ __forceinline__ void store_chunk(int to, uint4 from) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(from.x), "r"(from.y), "r"(from.z),
               "r"(from.w)
               : "memory");
}

// 16 columns of a row of Q, zeros where they are not wanted.
__device__ __forceinline__ void load_columns(unsigned *to, const void *from, bool wanted) {
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    const uint4 chunk = wanted ? static_cast<const uint4 *>(from)[i / 4] : make_uint4(0, 0, 0, 0);
    to[i] = chunk.x, to[i + 1] = chunk.y, to[i + 2] = chunk.z, to[i + 3] = chunk.w;
  }
}

// Those of the rope part, as they are, to two neighbouring chunks.
__device__ __forceinline__ void store_rope(int to, const unsigned *w) {
  store_chunk(to, make_uint4(w[0], w[1], w[2], w[3]));
  store_chunk(to ^ 16, make_uint4(w[4], w[5], w[6], w[7]));
}

// Two bfloat16 times a power of two as float16.
__device__ __forceinline__ unsigned float16_pair(unsigned from, float factor) {
  unsigned to;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;"
      : "=r"(to)
      : "f"(__uint_as_float(from & 0xffff0000u) * factor), "f"(__uint_as_float(from << 16) * factor));
  return to;
}

// The latent columns of a row of Q, 16 of each lane of a warp, as float16 by a power of two that takes the largest of
// them to 2**14: what that leaves inexact is less than 2**-38 of the largest. Returns what undoes it. Columns are in
// the order of the K dimension that an operand has which is made of four neighbouring bytes for each lane.
__device__ __forceinline__ float store_latent(int to, unsigned *w) {
  float most = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    most = fmaxf(most, fmaxf(fabsf(__uint_as_float(w[i] << 16)), fabsf(__uint_as_float(w[i] & 0xffff0000u))));
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
  }
  const int exponent = max(static_cast<int>(__float_as_uint(most) >> 23), 15);
  const float factor = __uint_as_float(static_cast<unsigned>(268 - exponent) << 23);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    w[i] = float16_pair(w[i], factor);
  }
  store_chunk(to, make_uint4(w[0], w[2], w[4], w[6]));
  store_chunk(to ^ 16, make_uint4(w[1], w[3], w[5], w[7]));
  return __uint_as_float(static_cast<unsigned>(exponent - 14) << 23);
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

__device__ __forceinline__ unsigned exact_float16(unsigned from) {
  unsigned to;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(to) : "h"(static_cast<unsigned short>(from)));
  return to;
}

__device__ __forceinline__ unsigned exact_bfloat16(unsigned from) {
  float low, high;
  asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }"
      : "=f"(low), "=f"(high)
      : "r"(exact_float16(from)));
  unsigned to;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(to) : "f"(high), "f"(low));
  return to;
}

// Four neighbouring e4m3 of a token as float16: the lower two, then, half a K step further, the upper two. NaN stays.
__device__ __forceinline__ void widen_keys(unsigned *to, unsigned from) {
  to[0] = exact_float16(from);
  to[2] = exact_float16(from >> 16);
}

// Two neighbouring columns of two tokens as bfloat16: the first column's values, then the second's.
__device__ __forceinline__ void widen_values(unsigned *to, unsigned from) {
  const unsigned columns = __byte_perm(from, 0, 0x3120);
  to[0] = exact_bfloat16(columns);
  to[1] = exact_bfloat16(columns >> 16);
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

__device__ __forceinline__ void store_four(void *to, float a, float b, float c, float d) {
  *static_cast<float4 *>(to) = make_float4(a, b, c, d);
}

__device__ __forceinline__ void store_halves(void *to, float first, float second) {
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  *static_cast<unsigned *>(to) = pair;
}

} // namespace tilemla
"""
