// The CPU loop of the fused merge: out = theta + lambda * elect(sparsify(experts - theta)).
//
// Moves (K + 1) reads + 1 write per element. Included once per instruction set (merge.cpp,
// merge_avx2.cpp, merge_avx512.cpp); nothing here has external linkage, so no code of one set leaks
// into another.
//
// Tried: reading every dtype directly in every mode, with a scalar loop for tails: 360 kernels and four
// minutes of compilation. The last, partial block is padded instead. Prefetching: no faster.
#include "../dispatch.h"
#include "merge_cpu.h"
#include "storage.h"

namespace merge3 {
namespace {

constexpr int kBlock = 512;  // elements whose results wait in L1 for one streaming store

using Float = MERGE3_LANES;
using UInt = Lanes<Float>::U;
constexpr int W = sizeof(Float) / sizeof(float);

template <class V>
MERGE3_HD V load(const void* from) {
  V x;
  memcpy(&x, from, sizeof x);
  return x;
}

// Sixteen random bits for each of n elements from `begin` (a multiple of kBlock) on.
__attribute__((noinline)) void random_block(int64_t begin, int n, uint32_t tensor, uint32_t expert,
                                            uint64_t seed, uint16_t* to) {
  UInt lane, from[4];  // from[q]: which lane of a pair of words goes where in the q-th quarter
  for (uint32_t l = 0; l < W; ++l) {
    lane[l] = l;
    for (uint32_t q = 0; q < 4; ++q) from[q][l] = q * W / 4 + l / 4 + l % 2 * W;
  }
  const auto second = (lane & 2) != 0;
  for (int i = 0; i < n; i += 8 * W) {
    const uint64_t block = uint64_t(begin + i) / 8;  // W blocks; their lower halves never carry
    UInt w[4];
    philox_block(same<UInt>(uint32_t(block)) + lane, same<UInt>(uint32_t(block >> 32)), tensor, expert, seed, w);
    // Lane b holds block b word by word; memory wants block after block.
    for (int q = 0; q < 4; ++q) {
      const UInt r = select(second, __builtin_shuffle(w[2], w[3], from[q]), __builtin_shuffle(w[0], w[1], from[q]));
      memcpy(to + i + q * 2 * W, &r, sizeof r);
    }
  }
}

// Ranks of n task-vector elements from `begin` on, each within its own row.
__attribute__((noinline)) void rank_block(const float* theta, const float* expert, int n, int64_t begin,
                                          int64_t columns, const float* table, float* to) {
  for (int j = 0; j < n; ++j)
    to[j] = rank_in_row(magnitude(expert[j] - theta[j]), table + (begin + j) / columns * MERGE3_RANK_STRIDE);
}

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

  void read(int j, Keep<Float, K>& keep) const {
    if constexpr (sizeof lo > 0)
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) keep.lo[k] = load<Float>(lo[k] + j % kTiePeriod);
    if constexpr (sizeof hi > 0)
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) keep.hi[k] = load<Float>(hi[k] + j % kTiePeriod);
  }
};
static_assert(kTieRun % kChunk == 0 && kBlock % kTiePeriod == 0);

// Any dtypes: what is not float32 is converted in L1, and results wait there for one streaming store.
template <int K, int SPARSIFY, int ELECT, bool NORMALIZE>
void merge_floats(const MergeCall& call, int64_t t, int64_t begin, int64_t end) {
  constexpr bool kRanked = SPARSIFY == MERGE3_KEEP_RANKED;
  constexpr bool kRandom = kRanked || SPARSIFY == MERGE3_KEEP_RANDOM;
  const merge3_tensor& tensor = call.table[t];
  const auto p = prepare<Float, K>(call.coefficients + t * K, call.lambda[t], tensor.base != nullptr);
  const Limits<K, SPARSIFY> limits(call.coefficients + t * K, tensor.offset + begin, tensor.id, [](int j) { return j; });
  alignas(64) float copy[K + 1][kBlock] = {};
  alignas(64) float out[kBlock];
  alignas(64) uint16_t bits[kRandom ? K : 1][kBlock];
  alignas(64) float ranks[kRanked ? K : 1][kBlock];
  const float* source[K + 1];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int n = int(end - at < kBlock ? end - at : kBlock);
    for (int v = 0; v <= K; ++v) {
      const void* data = v ? tensor.experts[v - 1] : tensor.base;
      source[v] = copy[v];  // zeros where there is no base
      if (data == nullptr) continue;
      if (tensor.dtype == MERGE3_FLOAT32 && n % W == 0) source[v] = static_cast<const float*>(data) + at;
      else load_floats(tensor.dtype, data, at, n, copy[v]);
    }
    const int64_t whole = tensor.offset + at;  // the block's place in the whole tensor
    for (int k = 0; kRandom && k < K; ++k) random_block(whole, n, tensor.id, uint32_t(k), call.modes->seed, bits[k]);
    for (int k = 0; kRanked && k < K; ++k)
      rank_block(source[0], source[k + 1], n, whole, tensor.columns, tensor.rank_tables[k], ranks[k]);
    for (int j = 0; j < n; j += W) {
      Float expert[K];
      Keep<Float, K> keep;
      limits.read(j, keep);
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) {
        expert[k] = load<Float>(source[k + 1] + j);
        if (kRanked) keep.rank[k] = load<Float>(ranks[k] + j);
        if (kRandom) keep.random[k] = __builtin_convertvector(load<Lanes<Float>::H>(bits[k] + j), Lanes<Float>::I);
      }
      const Float theta = load<Float>(source[0] + j);
      const Float merged = merge_element<K, SPARSIFY, ELECT>(theta, expert, p, keep, NORMALIZE);
      memcpy(out + j, &merged, sizeof merged);
    }
    store_floats(tensor.out_dtype, tensor.out, at, n, out, call.stream);
  }
}

#if MERGE3_DIRECT
// bfloat16 to bfloat16 without leaving the registers: a 32-bit lane holds two neighbours, so the even
// elements are one shift away from float32 and the odd ones one mask, and back. At two bytes an
// element every instruction shows against the bandwidth.
template <int K, int SPARSIFY, int ELECT, bool NORMALIZE>
void merge_bfloat16(const MergeCall& call, int64_t t, int64_t begin, int64_t end) {
  const merge3_tensor& tensor = call.table[t];
  const auto p = prepare<Float, K>(call.coefficients + t * K, call.lambda[t], tensor.base != nullptr);
  const Limits<K, SPARSIFY> limits(call.coefficients + t * K, tensor.offset + begin, tensor.id, [](int j) {
    return j / (2 * W) * (2 * W) + j % W * 2 + j / W % 2;  // W even elements, then W odd ones
  });
  const uint16_t* source[K + 1];
  alignas(64) uint16_t copy[K + 1][kBlock] = {}, partial[kBlock];
  const UInt upper = UInt{} + 0xffff0000u;
  for (int64_t at = begin; at < end; at += kBlock) {
    const int n = int(end - at < kBlock ? end - at : kBlock);
    const bool whole = n % (2 * W) == 0;
    for (int v = 0; v <= K; ++v) {
      const auto* data = static_cast<const uint16_t*>(v ? tensor.experts[v - 1] : tensor.base);
      source[v] = copy[v];
      if (data == nullptr) continue;
      if (whole) source[v] = data + at;
      else memcpy(copy[v], data + at, sizeof(uint16_t) * size_t(n));
    }
    uint16_t* out = whole ? static_cast<uint16_t*>(tensor.out) + at : partial;
    const bool streaming = call.stream && reinterpret_cast<uintptr_t>(out) % sizeof(UInt) == 0;
    for (int j = 0; j < n; j += 2 * W) {
      UInt half[2];
#pragma GCC unroll 2
      for (int odd = 0; odd < 2; ++odd) {
        Float x[K + 1];
        Keep<Float, K> keep;
        limits.read(j + odd * W, keep);
#pragma GCC unroll 9
        for (int v = 0; v <= K; ++v) {
          const UInt pair = load<UInt>(source[v] + j);
          x[v] = as_float(odd ? pair & upper : pair << 16);
        }
        const auto& expert = reinterpret_cast<const Float(&)[K]>(x[1]);
        // Inputs have nothing in the lower half, so neither has the payload of a NaN they cause.
        half[odd] = round_bfloat16(as_uint(merge_element<K, SPARSIFY, ELECT>(x[0], expert, p, keep, NORMALIZE)));
      }
      const UInt packed = (half[0] >> 16) | (half[1] & upper);
      if (streaming) stream_store(out + j, packed);
      else memcpy(out + j, &packed, sizeof packed);
    }
    if (!whole) memcpy(static_cast<uint16_t*>(tensor.out) + at, partial, sizeof(uint16_t) * size_t(n));
  }
}
#endif

template <int K, int SPARSIFY, int ELECT, bool NORMALIZE>
void merge_span(const MergeCall& call, int64_t from, int64_t to) {
  call.chunks->each(call.table, from, to, [&](int64_t t, int64_t begin, int64_t end, int64_t) {
#if MERGE3_DIRECT
    const merge3_tensor& tensor = call.table[t];
    if constexpr (SPARSIFY != MERGE3_KEEP_RANDOM && SPARSIFY != MERGE3_KEEP_RANKED)
      if (tensor.dtype == MERGE3_BFLOAT16 && tensor.out_dtype == MERGE3_BFLOAT16)
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
