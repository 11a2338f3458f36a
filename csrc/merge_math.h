// Every per-element formula of merge3, once (its gradient: backward.h; 16-bit floats: floats16.h). CPU loops (f32x8 and
// scalar) and CUDA kernels call these same functions, without fused multiply-add on either side, so both give the same
// bits. The Python oracle is merge3/reference.py.
#pragma once
#include "include/merge3/merge.h"
#include "lanes.h"
#include "philox.h"

namespace merge3 {

template <class F>
MERGE3_HD F magnitude(F x) {
#if defined(__CUDA_ARCH__)
  return fabsf(x);  // part of the instruction that needs it
#else
  using U = typename Lanes<F>::U;
  return as_float(as_uint(x) & same<U>(0x7fffffffu));
#endif
}

template <class F>
MERGE3_HD F sign(F x) {
#if defined(__CUDA_ARCH__)
  const F large = x * 1.2676506e30f * 1.2676506e30f;  // 2^100 each: beyond 1, were it the smallest number
  return __saturatef(large) - __saturatef(-large);  // multiplications, of which a GPU does twice as many as comparisons
#else
  const F zero = same<F>(0.0f);
  return select(x > zero, same<F>(1.0f), select(x < zero, same<F>(-1.0f), zero));
#endif
}

// Many numbers that take the sign of one: towards(x, side_of(by)) is flip_sign(x, by). A GPU multiplies twice as fast as
// it combines bits.
template <class F>
MERGE3_HD F side_of(F by) {
#if defined(__CUDA_ARCH__)
  return as_float((as_uint(by) & 0x80000000u) | 0x3f800000u);
#else
  return by;
#endif
}
template <class F>
MERGE3_HD F towards(F x, F side) {
#if defined(__CUDA_ARCH__)
  return x * side;
#else
  return flip_sign(x, side);
#endif
}

// ---------------------------------------------------------------- keeping a share of equal values

// On bf16 checkpoints magnitudes tie massively (about 940 distinct values per tensor), so keeping
// all or none of the elements at a threshold misses the asked density by a per cent. A Weyl
// sequence over the element index (equidistributed, one multiply) picks the asked share of them. It
// repeats every kTiePeriod elements, so that a CPU loop may read thresholds from a small table, from
// another start in every kTieRun elements, so that the asked share comes out right over a tensor. All
// experts share it, since each one's density is what has to come out right.
constexpr int64_t kTiePeriod = 128, kTieRun = 1 << 16;
MERGE3_HD int32_t tie_hash(int64_t element, uint32_t tensor) {
  return int32_t(uint32_t(element % kTiePeriod) * 0x9E3779B1u + uint32_t(element / kTieRun) * 0xC2B2AE35u +
                 tensor * 0x85EBCA6Bu);
}

// A threshold that admits `share` of the elements lying exactly on it.
struct Bound {
  float at;       // threshold for elements whose hash is below share
  float past;     // threshold for the others: the next float, which excludes `at` itself
  int32_t share;  // of [0, 1), as a position among the signed 32-bit hashes
};

MERGE3_HD Bound make_bound(float value, float share, bool upper) {
  float past = value;
  int32_t position = INT32_MAX;
  if (share < 1.0f) {
    const uint32_t bits = as_uint(value);
    if (upper) past = bits == 0 ? -1.0f : as_float(bits - 1);
    else past = as_float(bits + 1);
    position = share <= 0.0f ? INT32_MIN : int32_t(double(share) * 4294967296.0 - 2147483648.0);
  }
  return {value, past, position};
}
MERGE3_HD float limit(const Bound& b, int32_t hash) { return hash < b.share ? b.at : b.past; }

// ------------------------------------------------------------------------------ the fused merge

// One tensor's coefficients as the inner loop wants them: in lanes, because the compiler must assume
// that a store to `out` changes anything in memory and would broadcast them anew for every element.
template <class F, int K>
struct Prepared {
  F scale[K];   // weight * rescale
  F weight[K];
  F lambda;
  F total;  // sum of weights, the divisor without election
  F nobody;  // the divisor where no expert agrees; zero where it has to be looked for, see `cancels`
};

// Whether weights of experts that agree can add up to zero, or to what is lost beside `nobody`.
template <int K>
MERGE3_HD bool cancels(const merge3_coefficient* c) {
  bool found = false;
  for (int k = 0; k < K; ++k) found = found || !(c[k].weight == 0.0f || c[k].weight >= 1e-20f);
  return found;
}

template <class F, int K>
MERGE3_HD Prepared<F, K> prepare(const merge3_coefficient* c, float lambda, bool has_base) {
  Prepared<F, K> p;
  float total = 0.0f;
  for (int k = 0; k < K; ++k) {
    p.scale[k] = same<F>(c[k].weight * c[k].rescale);
    p.weight[k] = same<F>(c[k].weight);
    total += c[k].weight;
  }
  // The guard follows generalised task arithmetic; a plain weighted mean has no base to fall to.
  if (has_base && magnitude(total) < 1e-8f) total = 1.0f;
  p.total = same<F>(total);
  p.lambda = same<F>(lambda);
  // Where nobody agrees the sum is zero, and so is its quotient with anything but zero. The smallest normal number
  // vanishes in a sum with any weight that is not as small itself, so that a divisor can start there.
  p.nobody = same<F>(cancels<K>(c) ? 0.0f : 1.17549435e-38f);
  return p;
}

// What decides, element by element, whether expert k's change is kept. Each mode reads its own part.
template <class F, int K>
struct Keep {
  F lo[K], hi[K];                     // limits of |tau|; hi: band only
  typename Lanes<F>::Kept drawn[K];  // random
};

// The draws, of 65536, that a random keep keeps: those below this. Densities beyond 1 are 1, below 0 and NaN: 0.
MERGE3_HD int32_t kept_draws(const merge3_coefficient& c) {
  const float kept = c.density * 65536.0f + 0.5f;
  return kept >= 65536.0f ? 65536 : kept > 0.0f ? int32_t(kept) : 0;
}

// DELLA (Deep et al. 2024) keeps an element with probability density - epsilon + 2 epsilon rank, rank being that of its
// magnitude within its row, 0 to 1. Turned round: a draw says how high the rank has to be, and a table of the row's
// quantiles which magnitude that is. bin = draw * step + start: 0 or less keeps all, MERGE3_RANK_BINS or more nothing,
// and in between what reaches quantile int(bin). A rank counts as the middle of its bin, which is at most half a
// bin off: a keep probability errs by < epsilon / 32.
struct Spread {
  float step, start;
};
MERGE3_HD Spread make_spread(const merge3_coefficient& c) {
  const float low = (c.density - c.epsilon) * 65536.0f, span = 2.0f * c.epsilon * 65536.0f;
  Spread s;
  s.step = float(MERGE3_RANK_BINS) / (span > 1.0f ? span : 1.0f);
  s.start = 0.5f - low * s.step;
  return s;
}
// What |tau| has to reach: NaN, which nothing does, where the draw is above all. quantiles: of the row.
MERGE3_HD float drawn_limit(const Spread& s, int32_t draw, const float* quantiles) {
  const float bin = float(draw) * s.step + s.start;
  if (!(bin < float(MERGE3_RANK_BINS))) return as_float(0x7fc00000u);
  return quantiles[bin > 0.0f ? int32_t(bin) : 0];
}

// What an element has to reach for a bin that begins at position `at` of a sorted row, where `value` stands, as it does
// at `equal` positions from `first` on: they all belong to the bin of the middle one, so that ties share a rank.
MERGE3_HD float bin_limit(float value, int64_t at, int64_t first, int64_t equal) {
  return at <= first + (equal - 1) / 2 ? value : as_float(as_uint(value) + 1);
}

// Whether expert k's change is kept: one Mask<F>.
template <int SPARSIFY, int K, class F>
MERGE3_HD auto is_kept(F tau, int k, const Keep<F, K>& keep) {
  if constexpr (SPARSIFY == MERGE3_KEEP_MAGNITUDE || SPARSIFY == MERGE3_KEEP_RANKED) {
    return magnitude(tau) >= keep.lo[k];
  } else if constexpr (SPARSIFY == MERGE3_KEEP_BAND) {
    const F a = magnitude(tau);
    return (a >= keep.lo[k]) & (a <= keep.hi[k]);
  } else {
    return keep.drawn[k];
  }
}

// Expert k's weighted, sparsified change of one element, or of one per lane.
template <int K, int SPARSIFY, class F>
MERGE3_HD F change_of(F theta, F expert, int k, const Prepared<One<F>, K>& p, const Keep<F, K>& keep) {
  const F tau = expert - theta;
  if constexpr (SPARSIFY == MERGE3_KEEP_ALL) return tau * p.scale[k];
  else return keep_where(is_kept<SPARSIFY>(tau, k, keep), tau * p.scale[k]);
}

// Whose sign is elected: the sum (TIES, Yadav et al. 2023, Algorithm 1), or the head count; zero elects +. votes: of the
// experts before k. Without election the vote is the merged change itself.
template <int ELECT, class F>
MERGE3_HD F add_vote(int k, F votes, F change) {
  const F vote = ELECT == MERGE3_ELECT_COUNT ? sign(change) : change;
  return k == 0 ? vote : votes + vote;
}

// The sum of the changes that agree with the vote, on its side of zero, and of their weights where `normalize`. A zero
// element never agrees, so it drops out of both sums. GUARDED: weights may cancel.
template <int K, bool GUARDED, class F>
MERGE3_HD F elect_aligned(const F (&c)[K], F side, const Prepared<One<F>, K>& p, bool normalize, F& divisor) {
  // Where - is elected, both the elements and their sum change sign: the same values come out, and
  // what disagrees is what a maximum with zero removes.
  const F zero = same<F>(0.0f);
  F sum = zero;
  MERGE3_UNROLL
  for (int k = 0; k < K; ++k) {
    const F aligned = towards(c[k], side);
    if (normalize) {
      const auto agrees = aligned > zero;
      sum = k == 0 ? keep_where(agrees, aligned) : add_where(agrees, sum, aligned);
      divisor = k == 0 ? select(agrees, p.weight[0], p.nobody) : add_where(agrees, divisor, p.weight[k]);
    } else {
      sum = k == 0 ? positive_part(aligned) : sum + positive_part(aligned);
    }
  }
  if (GUARDED && normalize) divisor = select(divisor == zero, same<F>(1.0f), divisor);
  return sum;
}
template <int K, int ELECT, bool GUARDED, class F>
MERGE3_HD F elect(const F (&c)[K], F vote, const Prepared<One<F>, K>& p, bool normalize, F& divisor) {
  divisor = same<F>(0.0f) + p.total;
  if (ELECT == MERGE3_ELECT_NONE) return vote;
  const F side = side_of(vote);
  return towards(elect_aligned<K, GUARDED>(c, side, p, normalize, divisor), side);
}

template <int K, class F>
MERGE3_HD F add_change(F theta, F sum, F divisor, const Prepared<One<F>, K>& p, bool normalize) {
  if (normalize) sum = sum / divisor;
  return theta + p.lambda * sum;
}

template <int K, int ELECT, class F>
MERGE3_HD F vote_of(const F (&c)[K]) {
  F vote = c[0];
  MERGE3_UNROLL
  for (int k = 0; k < K; ++k) vote = add_vote<ELECT>(k, vote, c[k]);
  return vote;
}

// theta + lambda * the elected sum of the weighted, sparsified changes c.
template <int K, int ELECT, class F>
MERGE3_HD F elect_and_add(F theta, const F (&c)[K], const Prepared<One<F>, K>& p, bool normalize) {
  F divisor;
  const F sum = elect<K, ELECT, true>(c, vote_of<K, ELECT>(c), p, normalize, divisor);
  return add_change<K>(theta, sum, divisor, p, normalize);
}

// The same where the modes are only known at run time: for what is not bound by arithmetic.
template <int K, class F>
MERGE3_HD F elect_any(F theta, const F (&c)[K], const Prepared<One<F>, K>& p, int32_t elect, bool normalize) {
  switch (elect) {
    case MERGE3_ELECT_SUM: return elect_and_add<K, MERGE3_ELECT_SUM>(theta, c, p, normalize);
    case MERGE3_ELECT_COUNT: return elect_and_add<K, MERGE3_ELECT_COUNT>(theta, c, p, normalize);
    default: return elect_and_add<K, MERGE3_ELECT_NONE>(theta, c, p, normalize);
  }
}
template <int K>
MERGE3_HD bool keeps(float tau, int k, const Keep<float, K>& keep, int32_t sparsify) {
  switch (sparsify) {
    case MERGE3_KEEP_MAGNITUDE: return is_kept<MERGE3_KEEP_MAGNITUDE>(tau, k, keep);
    case MERGE3_KEEP_BAND: return is_kept<MERGE3_KEEP_BAND>(tau, k, keep);
    case MERGE3_KEEP_RANDOM: return is_kept<MERGE3_KEEP_RANDOM>(tau, k, keep);
    case MERGE3_KEEP_RANKED: return is_kept<MERGE3_KEEP_RANKED>(tau, k, keep);
    default: return true;
  }
}

// out for one element, or one per lane.
template <int K, int SPARSIFY, int ELECT, class F>
MERGE3_HD F merge_element(F theta, const F (&expert)[K], const Prepared<One<F>, K>& p, const Keep<F, K>& keep, bool normalize) {
  F c[K];
  MERGE3_UNROLL
  for (int k = 0; k < K; ++k) c[k] = change_of<K, SPARSIFY>(theta, expert[k], k, p, keep);
  return elect_and_add<K, ELECT>(theta, c, p, normalize);
}

// Where one bit per element and expert says what is kept (EMR-Merging, Huang et al. 2024), or is the whole task vector
// but for its scale (BitDelta, Liu et al. 2024): what an expert changes.
template <bool SIGNS, class F, class Mask>
MERGE3_HD F packed_change(F theta, F expert, Mask bit, One<F> scale) {
  if constexpr (SIGNS) return select(bit, scale, same<One<F>>(0.0f) - scale);
  else return keep_where(bit, (expert - theta) * scale);
}
template <int K, class F, class Mask>
MERGE3_HD F packed_element(F theta, const F (&expert)[K], const Mask (&bit)[K], const Prepared<One<F>, K>& p, const merge3_modes& modes) {
  F c[K];
  MERGE3_UNROLL
  for (int k = 0; k < K; ++k)
    c[k] = modes.sparsify == MERGE3_SIGNS ? packed_change<true>(theta, expert[k], bit[k], p.scale[k])
                                          : packed_change<false>(theta, expert[k], bit[k], p.scale[k]);
  return elect_any<K>(theta, c, p, modes.elect, modes.normalize != 0);
}

// The bit that stands for an element, and what it adds to the two sums of merge3_pack.
MERGE3_HD bool packed_bit(int32_t packing, float theta, float expert, float unified, double& all, double& set) {
  const float tau = expert - theta, other = unified - theta;
  all += double(magnitude(tau));
  const bool bit = packing == MERGE3_PACK_SIGNS ? tau >= 0.0f : (tau > 0.0f && other > 0.0f) || (tau < 0.0f && other < 0.0f);
  if (bit) set += packing == MERGE3_PACK_SIGNS ? 1.0 : double(magnitude(other));
  return bit;
}

// ----------------------------------------------------------------------- rules of their own

// NearSwap: move towards the other model by at most t, so near values are swapped whole.
MERGE3_HD float nearswap(float a, float b, float t) {
  float distance = magnitude(a - b);
  if (distance < 1e-6f) distance = 1e-6f;
  float w = t / distance;
  w = w < 0.0f ? 0.0f : (w > 1.0f ? 1.0f : w);
  return w * b + (1.0f - w) * a;
}

// Arcee Fusion: take the expert's value where |tau| times its row's KL divergence is an outlier.
MERGE3_HD float arcee_fusion(float theta, float expert, float row_divergence, float threshold) {
  const float tau = expert - theta;
  return magnitude(tau) * row_divergence >= threshold ? theta + tau : theta;
}

// Reinforced Agent Merging: average what several experts changed, keep (times a factor) what one did.
MERGE3_HD float ram(float theta, const float* expert, int experts, float epsilon,
                    const float* factor) {
  float shared = 0.0f, unique = 0.0f;
  int active = 0;
  for (int k = 0; k < experts; ++k) {
    const float tau = expert[k] - theta;
    if (magnitude(tau) > epsilon) {
      ++active;
      shared += tau;
      unique += tau * factor[k];
    }
  }
  if (active == 0) return theta;
  return theta + (active == 1 ? unique : shared / float(active));
}

// Population variance of the task vectors at one element (the Select of SCE).
MERGE3_HD float variance(float theta, const float* expert, int experts) {
  float mean = 0.0f, sum = 0.0f;
  for (int k = 0; k < experts; ++k) mean += expert[k] - theta;
  mean /= float(experts);
  for (int k = 0; k < experts; ++k) {
    const float d = (expert[k] - theta) - mean;
    sum += d * d;
  }
  return sum / float(experts);
}

// Unified task vector (Elect of EMR-Merging, Huang et al. 2024): the sign of the sum, and the largest change that has it.
// A sum of zero elects -, as in the authors' code.
MERGE3_HD float unify(float theta, const float* expert, int experts) {
  float vote = 0.0f, largest = 0.0f;
  for (int k = 0; k < experts; ++k) vote += expert[k] - theta;
  if (vote != vote) return vote;  // a NaN stays one
  for (int k = 0; k < experts; ++k) {
    const float tau = vote > 0.0f ? expert[k] - theta : theta - expert[k];
    if (tau > largest) largest = tau;
  }
  return theta + (vote > 0.0f ? largest : -largest);
}

// SCE (Wan et al. 2024): select by variance, calculate weights (given), erase minority signs.
MERGE3_HD float sce(float theta, const float* expert, int experts, float threshold,
                    const float* weight) {
  if (variance(theta, expert, experts) < threshold) return theta;
  float vote = 0.0f, sum = 0.0f, divisor = 0.0f;
  for (int k = 0; k < experts; ++k) vote += expert[k] - theta;
  for (int k = 0; k < experts; ++k) {
    const float tau = expert[k] - theta;
    if (vote >= 0.0f ? tau > 0.0f : tau < 0.0f) {
      sum += tau * weight[k];
      divisor += weight[k];
    }
  }
  return theta + sum / (divisor < 1e-6f ? 1e-6f : divisor);
}

}  // namespace merge3
