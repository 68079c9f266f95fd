"""Device code of the way out that no tile operation stands for: a fragment is not indexed by what a thread holds."""

WAY_OUT_SOURCE = r"""
namespace tilemla {

// A thread's elements of an accumulator's columns, times their row's factor: two of eight columns and two of the next
// eight at once, of two rows that lie `below` elements apart.
template <int columns>
__device__ __forceinline__ void store_rows(void *to, const float *acc, const float *factors, int below, bool has_first,
                                           bool has_second) {
  const auto store = [](float *at, const float *from, float factor) {
    *reinterpret_cast<float4 *>(at) =
        make_float4(from[0] * factor, from[1] * factor, from[4] * factor, from[5] * factor);
  };
#pragma unroll
  for (int i = 0; i < columns / 2; i += 8) {
    float *at = static_cast<float *>(to) + i * 2;
    if (has_first) store(at, acc + i, factors[0]);
    if (has_second) store(at + below, acc + i + 2, factors[1]);
  }
}

} // namespace tilemla
"""
