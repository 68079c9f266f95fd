"""Device code of the decode kernel over e4m3 that no tile operation stands for.

Addresses are those of shared memory, 32 bits. A matrix of ldmatrix is 8 rows of 16 bytes; transposed, it gives a lane
two bytes of each of two rows.
"""

E4M3_SOURCE = r"""
namespace tilemla {

__device__ __forceinline__ int shared_address(const void *pointer) {
  return static_cast<int>(__cvta_generic_to_shared(pointer));
}

// A thread's number in its warpgroup, asked for anew: what is made of it holds no register before.
__device__ __forceinline__ int thread_of_warpgroup() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread & 127;
}

// Four matrices of 8 rows and 16 bytes, of which each lane names a row.
__device__ __forceinline__ void read_rows(unsigned *to, int from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

__device__ __forceinline__ void read_columns(unsigned *to, int from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

// Two neighbouring columns of two tokens: the first column's values as float16, then the second's. NaN stays NaN.
__device__ __forceinline__ void widen(unsigned *to, unsigned from) {
  const unsigned columns = __byte_perm(from, 0, 0x3120);
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.rn.f16x2.e4m3x2 %0, low; cvt.rn.f16x2.e4m3x2 %1, high; }"
      : "=r"(to[0]), "=r"(to[1])
      : "r"(columns));
}

__device__ __forceinline__ void store_pair(void *to, float first, float second) {
  *static_cast<float2 *>(to) = make_float2(first, second);
}

} // namespace tilemla
"""
