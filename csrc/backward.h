// One element of the backward pass of a merge; what decides whether it is kept where modes are only known at run time.
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

// The draws of the eight elements to which element `whole` of a tensor belongs, as far as they decide anything.
MERGE3_HD Draws8 draws_of(const merge3_tensor& tensor, int64_t whole, int k, const merge3_modes& modes, const merge3_coefficient& c) {
  return draw8(whole, tensor.id, uint32_t(k), modes.seed, modes.sparsify == MERGE3_KEEP_RANDOM ? kept_draws(c) : -1);
}

// What decides whether expert k's change is kept: hash of the element, and its draw if any.
template <int K>
MERGE3_HD void decide(const merge3_tensor& tensor, int32_t sparsify, const merge3_coefficient& c, const Bounds<K>& bounds, int k,
                      int64_t whole, int32_t hash, int32_t draw, Keep<float, K>& keep) {
  keep.lo[k] = limit(bounds.lo[k], hash);
  keep.hi[k] = limit(bounds.hi[k], hash);
  keep.drawn[k] = draw < kept_draws(c);
  if (sparsify == MERGE3_KEEP_RANKED)
    keep.lo[k] = drawn_limit(make_spread(c), draw, tensor.rank_tables[k] + whole / tensor.columns * MERGE3_RANK_STRIDE);
}

// whole: the element's place in its whole tensor; g: the gradient of what it became; draw: see draws_of.
template <int K>
MERGE3_HD void backward_element(const merge3_tensor& tensor, const merge3_modes& modes, const merge3_coefficient* c,
                                const Prepared<float, K>& p, const Bounds<K>& bounds, int64_t whole, float g, float theta,
                                const float (&expert)[K], const int32_t (&draw)[K], double (&sums)[2 * K + 1]) {
  const int32_t hash = tie_hash(whole, tensor.id);
  Keep<float, K> keep;
  bool kept[K];
  MERGE3_UNROLL
  for (int k = 0; k < K; ++k) {
    decide(tensor, modes.sparsify, c[k], bounds, k, whole, hash, draw[k], keep);
    kept[k] = keeps(expert[k] - theta, k, keep, modes.sparsify);
  }
  merge_gradient<K>(g, theta, expert, c, p, kept, modes.elect, modes.normalize != 0, tensor.base != nullptr, sums);
}

}  // namespace merge3
