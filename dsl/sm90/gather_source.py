"""Device code of the producer warpgroup that no tile operation stands for.

A stage is laid out in atoms of 64 rows and 128 bytes, 8192 bytes apart, in which the 16-byte chunks of a row are
permuted by exclusive or with the row modulo 8. Addresses of tokens are integers, and 0 is that of an invalid token: its
row is zeros.
"""

GATHER_SOURCE = r"""
namespace tilemla {

__device__ __forceinline__ long long address_of(const void *pointer) { return reinterpret_cast<long long>(pointer); }

__device__ __forceinline__ void prefetch(const void *pointer) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(pointer));
}

__device__ __forceinline__ unsigned shared_address(const void *pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ long long shuffle(long long value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

__device__ __forceinline__ int ballot(bool predicate) {
  return static_cast<int>(__ballot_sync(0xffffffffu, predicate));
}

// What `divide` needs of a divisor of at least 1: a factor and a shift.
__device__ __forceinline__ void invert(unsigned *reciprocal, int divisor) {
  const int shift = divisor > 1 ? 32 - __clz(divisor - 1) : 0;
  reciprocal[0] = static_cast<unsigned>(((1ull << shift) - divisor) * (1ull << 32) / divisor) + 1;
  reciprocal[1] = shift;
}

// number / divisor of a number from 0 on; of any other something.
__device__ __forceinline__ int divide(int number, unsigned factor, unsigned shift) {
  return static_cast<int>((__umulhi(number, factor) + number) >> shift);
}

// A row's 16-byte chunk of each of ATOMS atoms, asynchronously.
template <int ATOMS>
__device__ __forceinline__ void gather_atoms(unsigned to, long long from, int atom, int offset) {
  const unsigned first = to + atom * 8192;
  const int bytes = from != 0 ? 16 : 0;
#pragma unroll
  for (int i = 0; i < ATOMS; ++i) {
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(first + i * 8192),
                 "l"(from + offset + (atom + i) * 128), "r"(bytes)
                 : "memory");
  }
}

// 4, 8 or 16 bytes, asynchronously.
template <int BYTES> __device__ __forceinline__ void copy_bytes(unsigned to, long long from, int offset) {
  const int bytes = from != 0 ? BYTES : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from + offset), "n"(BYTES), "r"(bytes)
               : "memory");
}

// 16 of the e4m3 values of each of ATOMS atoms.
template <int ATOMS> __device__ __forceinline__ void load_atoms(unsigned *raw, long long from, int offset) {
  const long long first = from + offset;
#pragma unroll
  for (int i = 0; i < ATOMS; ++i) {
    uint4 v = make_uint4(0, 0, 0, 0);
    if (from != 0) {
      asm volatile("ld.global.nc.L1::evict_last.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                   : "l"(first + i * 64));
    }
    raw[i * 4] = v.x, raw[i * 4 + 1] = v.y, raw[i * 4 + 2] = v.z, raw[i * 4 + 3] = v.w;
  }
}

// The same of two atoms from shared memory.
__device__ __forceinline__ void read_bytes(unsigned *raw, unsigned first, unsigned second) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(raw[i * 4]), "=r"(raw[i * 4 + 1]), "=r"(raw[i * 4 + 2]), "=r"(raw[i * 4 + 3])
                 : "r"(i == 0 ? first : second)
                 : "memory");
  }
}

// The scale of a piece, a float32, or with BYTES two e8m0, one for each of its atoms. That of an invalid token is 0,
// whose values are 0, too: nothing here waits for what is loaded.
template <bool BYTES> __device__ __forceinline__ void load_scale(unsigned *scale, long long from, int offset) {
  *scale = 0;
  if (from != 0) {
    if constexpr (BYTES) {
      unsigned short v;
      asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(from + offset));
      *scale = v;
    } else {
      asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(*scale) : "l"(from + offset));
    }
  }
}

// The scale of an atom of a piece as a float32.
template <bool BYTES> __device__ __forceinline__ float scale_of(unsigned scale, int atom) {
  if constexpr (BYTES) {
    const unsigned exponent = scale >> atom * 8 & 0xffu;
    return __uint_as_float(exponent == 0xffu ? 0x7fc00000u : exponent == 0 ? 0x00400000u : exponent << 23);
  } else {
    return __uint_as_float(scale);
  }
}

// Until all but the last COUNT groups of copies are there.
template <int COUNT> __device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(COUNT) : "memory");
}

// bfloat16(e4m3 * scale) of bytes 0 and 1, or with HIGH 2 and 3: one rounding, whatever the scale, and NaN stays NaN.
template <bool HIGH> __device__ __forceinline__ unsigned dequantise(unsigned word, float scale) {
  const unsigned short pair = static_cast<unsigned short>(HIGH ? word >> 16 : word);
  unsigned halves, out;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(pair));
  float low, high;
  asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }"
      : "=f"(low), "=f"(high)
      : "r"(halves));
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high * scale), "f"(low * scale));
  return out;
}

// 16 values of each of ATOMS atoms from the FIRST on: two chunks of a row.
template <bool BYTES, int FIRST, int ATOMS>
__device__ __forceinline__ void store_atoms(unsigned to, const unsigned *raw, unsigned piece_scale) {
#pragma unroll
  for (int i = 0; i < ATOMS; ++i) {
    const float scale = scale_of<BYTES>(piece_scale, i);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned first = raw[i * 4 + half * 2], second = raw[i * 4 + half * 2 + 1];
      asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"((to ^ half * 16) + (FIRST + i) * 8192),
                   "r"(dequantise<false>(first, scale)), "r"(dequantise<true>(first, scale)),
                   "r"(dequantise<false>(second, scale)), "r"(dequantise<true>(second, scale))
                   : "memory");
    }
  }
}

// What was written to shared memory before is there for wgmma and TMA.
__device__ __forceinline__ void fence_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Where a thread of a warpgroup puts P with `store_p`: `first` is the address of the atom for it.
__device__ __forceinline__ int place_of_p(unsigned first) {
  const int lane = threadIdx.x % 32;
  const int row = threadIdx.x % 128 / 32 * 16 + lane % 16;
  return first + row * 128 + ((lane / 16) ^ (row % 8)) * 16;
}

// A warp's 16 rows of P from the registers in which wgmma takes them.
__device__ __forceinline__ void store_p(unsigned place, const void *registers) {
  const unsigned *p = static_cast<const unsigned *>(registers);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(place ^ k * 32),
                 "r"(p[k * 4]), "r"(p[k * 4 + 1]), "r"(p[k * 4 + 2]), "r"(p[k * 4 + 3])
                 : "memory");
  }
}

__device__ __forceinline__ int rank_in_cluster() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// How far from an address here that of the same place in the other thread block of a pair is.
__device__ __forceinline__ int distance_to_other(unsigned address) {
  unsigned there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank_in_cluster() ^ 1));
  return there - address;
}

// Whether this is the one thread of its warp that is chosen: what only it does takes uniform registers.
__device__ __forceinline__ bool elect() {
  unsigned chosen;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(chosen));
  return chosen != 0;
}

// An arrival here, where so many bytes are still to come from the other thread block.
__device__ __forceinline__ void expect(unsigned barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Bytes, a chunk or a word, to the same place in the other thread block, at whose barrier they count once they are
// there.
__device__ __forceinline__ void copy_to_other(unsigned from, int bytes, unsigned barrier, int distance) {
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   from + distance),
               "r"(from), "r"(bytes), "r"(barrier + distance)
               : "memory");
}

// 16 bytes, which are zeros of an invalid token.
__device__ __forceinline__ void load_chunk(unsigned *chunk, long long from, int offset) {
  chunk[0] = chunk[1] = chunk[2] = chunk[3] = 0;
  if (from != 0) {
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(chunk[0]), "=r"(chunk[1]), "=r"(chunk[2]), "=r"(chunk[3])
                 : "l"(from + offset));
  }
}

__device__ __forceinline__ void store_chunk(unsigned to, const unsigned *chunk, unsigned barrier, int distance) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(chunk[0]), "r"(chunk[1]), "r"(chunk[2]),
               "r"(chunk[3])
               : "memory");
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                   to + distance),
               "r"(chunk[0]), "r"(chunk[1]), "r"(chunk[2]), "r"(chunk[3]), "r"(barrier + distance)
               : "memory");
}

__device__ __forceinline__ void send_word(unsigned from, unsigned barrier, int distance) {
  unsigned v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(from) : "memory");
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(from + distance),
               "r"(v), "r"(barrier + distance)
               : "memory");
}

} // namespace tilemla
"""
