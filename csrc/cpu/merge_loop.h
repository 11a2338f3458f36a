// The CPU loop of the fused merge: out = theta + lambda * elect(sparsify(experts - theta)).
//
// Moves (K + 1) reads + 1 write per element. Included once per instruction set (merge.cpp,
// merge_avx2.cpp, merge_avx512.cpp); nothing here has external linkage, so no code of one set leaks
// into another.
//
// Tried: reading every dtype directly in every mode, with a scalar loop for tails: 360 kernels and four
// minutes of compilation. The last, partial block is padded instead. Prefetching: no faster.
#include "blocks.h"
#include "draws.h"

namespace merge3 {
namespace {

__attribute__((noinline)) void load_floats(int32_t dtype, const void* data, int64_t i, int n, float* to) {
  load_block(dtype, data, i, n, to);
}
__attribute__((noinline)) void store_floats(int32_t dtype, void* out, int64_t i, int n, const float* from,
                                            bool stream) {
  store_block(dtype, out, i, n, from, stream);
}

// The limits of |tau| that each expert's elements meet, in the order in which a loop reads them.
template <int K, int SPARSIFY>
struct Limits {
  alignas(64) float lo[SPARSIFY == MERGE3_KEEP_MAGNITUDE || SPARSIFY == MERGE3_KEEP_BAND ? K : 0][kTiePeriod];
  alignas(64) float hi[SPARSIFY == MERGE3_KEEP_BAND ? K : 0][kTiePeriod];

  // element(j): which element of a period is read j-th.
  template <class Element>
  Limits(const merge3_coefficient* c, int64_t begin, uint32_t tensor, const Element& element) {
    for (int k = 0; k < K; ++k) {
      const Bound low = make_bound(c[k].lo, c[k].lo_share, false), high = make_bound(c[k].hi, c[k].hi_share, true);
      for (int j = 0; j < kTiePeriod; ++j) {
        const int32_t hash = tie_hash(begin + element(j), tensor);
        if constexpr (sizeof lo > 0) lo[k][j] = limit(low, hash);
        if constexpr (sizeof hi > 0) hi[k][j] = limit(high, hash);
      }
    }
  }

  // The j-th and the W next, and W more.
  MERGE3_HD void read(int64_t j, Keep<Two<Float>, K>& keep) const {
    j %= kTiePeriod;
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) {
      if constexpr (sizeof lo > 0) keep.lo[k] = load<Two<Float>>(lo[k] + j);
      if constexpr (sizeof hi > 0) keep.hi[k] = load<Two<Float>>(hi[k] + j);
    }
  }
};
static_assert(kTieRun % kChunk == 0 && kBlock % kTiePeriod == 0);

// Any dtypes: what is not float32 is converted in L1, and results wait there for one streaming store.
template <int K, int SPARSIFY, int ELECT, bool NORMALIZE>
void merge_floats(const MergeCall& call, int64_t t, int64_t begin, int64_t end) {
  constexpr bool kRanked = SPARSIFY == MERGE3_KEEP_RANKED, kRandom = SPARSIFY == MERGE3_KEEP_RANDOM;
  const merge3_tensor& tensor = call.table[t];
  const merge3_coefficient* c = call.coefficients + t * K;
  const auto p = prepare<Float, K>(c, call.lambda[t], tensor.base != nullptr);
  const Limits<K, SPARSIFY> limits(c, tensor.offset + begin, tensor.id, [](int j) { return j; });
  alignas(64) float copy[K + 1][kBlock] = {};
  alignas(64) float out[kBlock];
  Planes drawn[kRandom ? K : 1];
  alignas(64) float least[kRanked ? K : 1][kBlock];
  const float* source[K + 1];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int n = int(end - at < kBlock ? end - at : kBlock);
    for (int v = 0; v <= K; ++v) {
      const void* data = v ? tensor.experts[v - 1] : tensor.base;
      source[v] = copy[v];  // zeros where there is no base
      if (data == nullptr) continue;
      if (tensor.dtype == MERGE3_FLOAT32 && n % (2 * W) == 0) source[v] = static_cast<const float*>(data) + at;
      else load_floats(tensor.dtype, data, at, n, copy[v]);
    }
    const int64_t whole = tensor.offset + at;  // the block's place in the whole tensor
    for (uint32_t k = 0; k < K; ++k) {
      if (kRandom) draw_kept(whole, n, tensor.id, k, call.modes->seed, kept_draws(c[k]), drawn[k]);
      if (kRanked)
        draw_limits(whole, n, tensor.id, k, call.modes->seed, tensor.columns, make_spread(c[k]), tensor.rank_tables[k], least[k]);
    }
    for (int j = 0; j < n; j += 2 * W) {
      Two<Float> expert[K];
      Keep<Two<Float>, K> keep;
      limits.read(j, keep);
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) {
        expert[k] = load<Two<Float>>(source[k + 1] + j);
        if constexpr (kRanked) keep.lo[k] = load<Two<Float>>(least[k] + j);
        if constexpr (kRandom) keep.drawn[k] = kept_in_order(drawn[k], j);
      }
      const auto theta = load<Two<Float>>(source[0] + j);
      store(out + j, merge_element<K, SPARSIFY, ELECT>(theta, expert, p, keep, NORMALIZE));
    }
    store_floats(tensor.out_dtype, tensor.out, at, n, out, call.stream);
  }
}

#if MERGE3_DIRECT
// bfloat16 to bfloat16; see Pairs. The formula is a chain of some sixty cycles, of which a processor sees about
// two links of two vectors ahead: it waits. So it is cut, where registers are few (AVX2), into two loops over a
// block that meet in L1, and the quotient is finished one round later than the sums that it divides.
// Tried, on a Zen 4 with AVX2 (K = 3, elected and normalized, in L2, one loop: 1.0): two chains side by side 1.16; two
// loops 1.34; the divisor as a permutation of a table of sums, instead of adding weights: no faster. With AVX-512, where
// instructions are what counts: two or three loops are no faster. Prefetching the next block: slower on both.
// Counted, not run: exact quotients from reciprocals of the few divisors and fused corrections (as many instructions
// as a division blocks), and a division only where an approximate quotient leaves the rounding to 16 bits open (theta
// and change may cancel, and to know that takes as long).
template <int K, int SPARSIFY, int ELECT, bool NORMALIZE>
void merge_bfloat16(const MergeCall& call, int64_t t, int64_t begin, int64_t end) {
  constexpr bool kRandom = SPARSIFY == MERGE3_KEEP_RANDOM;
  constexpr bool kCut = ELECT != MERGE3_ELECT_NONE && W == 8;
  const merge3_tensor& tensor = call.table[t];
  const merge3_coefficient* c = call.coefficients + t * K;
  const auto p = prepare<Float, K>(c, call.lambda[t], tensor.base != nullptr);
  const Limits<K, SPARSIFY> limits(c, tensor.offset + begin, tensor.id, [](int j) {
    return j / (2 * W) * (2 * W) + j % W * 2 + j / W % 2;  // W even elements, then W odd ones
  });
  Padding<K + 1> padding;
  Planes drawn[kRandom ? K : 1];
  alignas(64) float cut[kCut ? K + 1 : 1][kBlock + 16];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int n = int(end - at < kBlock ? end - at : kBlock);
    const Pairs<K + 1> block = padding.open([&](int v) { return v ? tensor.experts[v - 1] : tensor.base; }, tensor.out, at, n, call.stream);
    for (uint32_t k = 0; kRandom && k < K; ++k)
      draw_kept(tensor.offset + at, n, tensor.id, k, call.modes->seed, kept_draws(c[k]), drawn[k]);
    // The changes of the 2 W elements from j on, and their vote.
    const auto change = [&](int64_t j, Two<Float>(&changes)[K]) __attribute__((always_inline)) {
      const Two<Float> theta = block.read(0, j);
      Two<Float> vote;
      Keep<Two<Float>, K> keep;
      limits.read(j, keep);
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) {
        if constexpr (kRandom) keep.drawn[k] = kept_apart(drawn[k], j);
        changes[k] = change_of<K, SPARSIFY>(theta, block.read(k + 1, j), k, p, keep);
        vote = add_vote<ELECT>(k, vote, changes[k]);
        if constexpr (kCut) store(cut[k] + j, changes[k]);
      }
      return vote;
    };
    if constexpr (kCut)
      for (int64_t j = 0; j < n; j += 2 * W) {
        Two<Float> changes[K];
        store(cut[K] + j, change(j, changes));
      }
    Two<Float> sum, divisor;
    for (int64_t j = 0; j < n; j += 2 * W) {
      Two<Float> changes[K], vote;
      if constexpr (kCut) {
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) changes[k] = load<Two<Float>>(cut[k] + j);
        vote = load<Two<Float>>(cut[K] + j);
      } else {
        vote = change(j, changes);
      }
      if (!kCut && NORMALIZE && j > 0) block.write(j - 2 * W, add_change<K>(block.read(0, j - 2 * W), sum, divisor, p, true));
      sum = elect<K, ELECT, false>(changes, vote, p, NORMALIZE, divisor);
      if (kCut && NORMALIZE) store(cut[0] + j, sum), store(cut[K] + j, divisor);
      if (!NORMALIZE) block.write(j, add_change<K>(block.read(0, j), sum, divisor, p, false));
    }
    if constexpr (kCut && NORMALIZE)
    for (int64_t j = 0; j < n; j += 2 * W) {
      block.write(j, add_change<K>(block.read(0, j), load<Two<Float>>(cut[0] + j), load<Two<Float>>(cut[K] + j), p, true));
    }
    const int last = (n - 1) / (2 * W) * (2 * W);
    if (!kCut && NORMALIZE) block.write(last, add_change<K>(block.read(0, last), sum, divisor, p, true));
    padding.close(tensor.out, at, n);
  }
}
#endif

template <int K, int SPARSIFY, int ELECT, bool NORMALIZE>
void merge_span(const MergeCall& call, int64_t from, int64_t to) {
  call.chunks->each(call.table, from, to, [&](int64_t t, int64_t begin, int64_t end, int64_t) {
#if MERGE3_DIRECT
    const merge3_tensor& tensor = call.table[t];
    if constexpr (SPARSIFY != MERGE3_KEEP_RANKED)
      if (tensor.dtype == MERGE3_BFLOAT16 && tensor.out_dtype == MERGE3_BFLOAT16 && !(NORMALIZE && cancels<K>(call.coefficients + t * K)))
        return merge_bfloat16<K, SPARSIFY, ELECT, NORMALIZE>(call, t, begin, end);
#endif
    merge_floats<K, SPARSIFY, ELECT, NORMALIZE>(call, t, begin, end);
  });
}

}  // namespace

bool MERGE3_MERGE_ENTRY(const MergeCall& call, int64_t from, int64_t to) {
  bool known = false;
  dispatch_experts(call.modes->experts, [&](auto k) {
    dispatch_sparsify(call.modes->sparsify, [&](auto s) {
      known = dispatch_elect(call.modes->elect, [&](auto e) {
        constexpr int K = decltype(k)::value, S = decltype(s)::value, E = decltype(e)::value;
        if (call.modes->normalize) merge_span<K, S, E, true>(call, from, to);
        else merge_span<K, S, E, false>(call, from, to);
      });
    });
  });
  return known;
}

}  // namespace merge3
