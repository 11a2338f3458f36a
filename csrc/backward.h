// Eight elements of the backward pass of a merge, the same for a CPU loop and a CUDA thread.
#pragma once
#include "merge_math.h"

namespace merge3 {

template <int K>
struct Bounds {
  Bound lo[K], hi[K];
};

template <int K>
MERGE3_HD Bounds<K> make_bounds(const merge3_coefficient* c) {
  Bounds<K> b;
  for (int k = 0; k < K; ++k) {
    b.lo[k] = make_bound(c[k].lo, c[k].lo_share, false);
    b.hi[k] = make_bound(c[k].hi, c[k].hi_share, true);
  }
  return b;
}

// n <= 8 elements from i (a multiple of 8) on; g: the gradient of the merged elements.
template <int K>
MERGE3_HD void backward8(const merge3_tensor& tensor, const merge3_modes& modes, const merge3_coefficient* c,
                         const Prepared<float, K>& p, const Bounds<K>& bounds, int64_t i, int n, const float (&g)[8],
                         const float (&theta)[8], const float (&expert)[K][8], double (&sums)[2 * K + 1]) {
  const int64_t whole = tensor.offset + i;
  const bool ranked = modes.sparsify == MERGE3_KEEP_RANKED;
  uint32_t words[K][4] = {};
  if (ranked || modes.sparsify == MERGE3_KEEP_RANDOM) {
    const uint64_t block = uint64_t(whole) / 8;
    for (int k = 0; k < K; ++k)
      philox_block(uint32_t(block), uint32_t(block >> 32), tensor.id, uint32_t(k), modes.seed, words[k]);
  }
  for (int j = 0; j < n; ++j) {
    const int32_t hash = tie_hash(whole + j, tensor.id);
    float e[K];
    Keep<float, K> keep;
    for (int k = 0; k < K; ++k) {
      e[k] = expert[k][j];
      keep.lo[k] = limit(bounds.lo[k], hash);
      keep.hi[k] = limit(bounds.hi[k], hash);
      keep.random[k] = int32_t((words[k][j / 2] >> (16 * (j & 1))) & 0xffffu);
      keep.rank[k] = ranked ? rank_in_row(magnitude(e[k] - theta[j]),
                                          tensor.rank_tables[k] + (whole + j) / tensor.columns * MERGE3_RANK_STRIDE)
                            : 0.0f;
    }
    merge_gradient<K>(g[j], theta[j], e, c, p, keep, modes, tensor.base != nullptr, sums);
  }
}

}  // namespace merge3
