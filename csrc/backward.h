// The gradient of one element of a merge; what decides whether it is kept where modes are only known at run time.
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

// Adds one element's part to the gradients of a loss whose gradient with respect to `out` is g:
// sums[2 k] for weight k, sums[2 k + 1] for rescale k, sums[2 K] for lambda. What is kept and which sign is
// elected do not move under a small change of the coefficients, so they count as constants. For
// out = theta + lambda S, S = D / N:  dS/dw_k = m_k (rescale_k keep_k tau_k - S) / N,  without - S where N is 1.
// kept: which changes are. Sum: double, or float for the sums of a few elements.
template <int K, class Sum>
MERGE3_HD void merge_gradient(float g, float theta, const float (&expert)[K], const merge3_coefficient* coefficient,
                              const Prepared<float, K>& p, const bool (&kept)[K], int32_t elect, bool normalize,
                              bool has_base, Sum (&sums)[2 * K + 1]) {
  float sparse[K], c[K], vote = 0.0f;  // sparse: the sparsified task vector
  MERGE3_UNROLL
  for (int k = 0; k < K; ++k) {
    sparse[k] = kept[k] ? expert[k] - theta : 0.0f;
    c[k] = sparse[k] * p.scale[k];
    vote = k == 0 ? (elect == MERGE3_ELECT_COUNT ? sign(c[k]) : c[k])
                  : vote + (elect == MERGE3_ELECT_COUNT ? sign(c[k]) : c[k]);
  }
  const bool negative = (as_uint(vote) & 0x80000000u) != 0;
  float sum = 0.0f, total = 0.0f;
  bool agrees[K];
  MERGE3_UNROLL
  for (int k = 0; k < K; ++k) {
    agrees[k] = elect == MERGE3_ELECT_NONE || (negative ? c[k] < 0.0f : c[k] > 0.0f);
    if (agrees[k]) sum += c[k], total += p.weight[k];
  }
  float divisor = 1.0f, merged = sum;
  bool divides = false;  // the divisor is a sum of weights, not the 1 that replaces a zero
  if (normalize) {
    const bool guarded = elect == MERGE3_ELECT_NONE ? has_base && magnitude(total) < 1e-8f : total == 0.0f;
    divides = !guarded;
    if (divides) divisor = total;
    merged = sum / divisor;
  }
  const float change = g * p.lambda / divisor;
  MERGE3_UNROLL
  for (int k = 0; k < K; ++k)
    if (agrees[k]) {
      sums[2 * k] += Sum(change) * Sum(sparse[k] * coefficient[k].rescale - (divides ? merged : 0.0f));
      sums[2 * k + 1] += Sum(change) * Sum(sparse[k] * coefficient[k].weight);
    }
  sums[2 * K] += Sum(g) * Sum(merged);
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
