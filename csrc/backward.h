// One element of the backward pass of a merge, the same for a CPU loop and a CUDA thread.
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
  MERGE3_UNROLL
  for (int k = 0; k < K; ++k) {
    b.lo[k] = make_bound(c[k].lo, c[k].lo_share, false);
    b.hi[k] = make_bound(c[k].hi, c[k].hi_share, true);
  }
  return b;
}

MERGE3_HD bool draws(const merge3_modes& modes) {
  return modes.sparsify == MERGE3_KEEP_RANKED || modes.sparsify == MERGE3_KEEP_RANDOM;
}

// The random words of the eight elements to which element `whole` of a tensor belongs.
MERGE3_HD void random_words(const merge3_tensor& tensor, int64_t whole, int k, uint64_t seed, uint32_t (&words)[4]) {
  const uint64_t block = uint64_t(whole) / 8;
  philox_block(uint32_t(block), uint32_t(block >> 32), tensor.id, uint32_t(k), seed, words);
}
MERGE3_HD int32_t random_of(const uint32_t (&words)[4], int64_t whole) {
  const int j = int(whole % 8);
  const uint32_t word = j < 4 ? (j < 2 ? words[0] : words[1]) : (j < 6 ? words[2] : words[3]);
  return int32_t((word >> (16 * (j & 1))) & 0xffffu);
}

// whole: the element's place in its whole tensor; g: the gradient of what it became; random: see random_of.
template <int K>
MERGE3_HD void backward_element(const merge3_tensor& tensor, const merge3_modes& modes, const merge3_coefficient* c,
                                const Prepared<float, K>& p, const Bounds<K>& bounds, int64_t whole, float g, float theta,
                                const float (&expert)[K], const int32_t (&random)[K], double (&sums)[2 * K + 1]) {
  const int32_t hash = tie_hash(whole, tensor.id);
  Keep<float, K> keep;
  MERGE3_UNROLL
  for (int k = 0; k < K; ++k) {
    keep.lo[k] = limit(bounds.lo[k], hash);
    keep.hi[k] = limit(bounds.hi[k], hash);
    keep.random[k] = random[k];
    keep.rank[k] = 0.0f;
    if (modes.sparsify == MERGE3_KEEP_RANKED)
      keep.rank[k] = rank_in_row(magnitude(expert[k] - theta),
                                 tensor.rank_tables[k] + whole / tensor.columns * MERGE3_RANK_STRIDE);
  }
  merge_gradient<K>(g, theta, expert, c, p, keep, modes, tensor.base != nullptr, sums);
}

}  // namespace merge3
