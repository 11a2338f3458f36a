// The CPU loop of the fused merge: out = theta + lambda * elect(sparsify(experts - theta)).
//
// Moves (K + 1) reads + 1 write per element. Included once per instruction set (merge.cpp,
// merge_avx2.cpp); everything is inlined into run_chunk, so no code of one set leaks into the other.
//
// Tried: reading every dtype directly in every mode, with a scalar loop for tails: 360 kernels that
// took four minutes to compile for no gain in speed. The last, partial block is padded instead.
#include "../dispatch.h"
#include "merge_cpu.h"
#include "storage.h"

namespace merge3 {
namespace {

constexpr int kBlock = 512;  // elements whose results wait in L1 for one streaming store

// Sixteen random bits for each of n elements from `begin` (a multiple of 64) on.
__attribute__((noinline)) void random_block(int64_t begin, int n, uint32_t tensor, uint32_t expert,
                                            uint64_t seed, uint16_t* to) {
  const u32x8 lane = {0, 1, 2, 3, 4, 5, 6, 7};
  for (int i = 0; i < n; i += 64) {
    const uint64_t block = uint64_t(begin + i) / 8;  // 8 blocks; never carries: block % 8 == 0
    u32x8 w[4];
    philox_block(same<u32x8>(uint32_t(block)) + lane, same<u32x8>(uint32_t(block >> 32)), tensor,
                 expert, seed, w);
    // Lane b holds block b word by word; memory wants block after block.
    const i32x8 low = {0, 8, 1, 9, 4, 12, 5, 13}, high = {2, 10, 3, 11, 6, 14, 7, 15};
    const u32x8 a = __builtin_shuffle(w[0], w[1], low), b = __builtin_shuffle(w[2], w[3], low);
    const u32x8 c = __builtin_shuffle(w[0], w[1], high), d = __builtin_shuffle(w[2], w[3], high);
    const i32x8 first = {0, 1, 8, 9, 2, 3, 10, 11}, second = {4, 5, 12, 13, 6, 7, 14, 15};
    const u32x8 r[4] = {__builtin_shuffle(a, b, first), __builtin_shuffle(c, d, first),
                        __builtin_shuffle(a, b, second), __builtin_shuffle(c, d, second)};
    memcpy(to + i, r, sizeof r);
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

const i32x8 kLane = {0, 1, 2, 3, 4, 5, 6, 7};

// Any dtypes: what is not float32 is converted in L1, and results wait there for one streaming store.
template <int K, int SPARSIFY, int ELECT>
void merge_floats(const merge3_tensor& tensor, const Prepared<f32x8, K>& shared, uint64_t seed, int64_t begin,
                  int64_t end, bool stream) {
  const Prepared<f32x8, K> p = shared;  // a local copy cannot alias the output
  constexpr bool kRanked = SPARSIFY == MERGE3_KEEP_RANKED;
  constexpr bool kRandom = kRanked || SPARSIFY == MERGE3_KEEP_RANDOM;
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
      if (tensor.dtype == MERGE3_FLOAT32 && n % 8 == 0) source[v] = static_cast<const float*>(data) + at;
      else load_floats(tensor.dtype, data, at, n, copy[v]);
    }
    for (int k = 0; kRandom && k < K; ++k) random_block(at, n, tensor.id, uint32_t(k), seed, bits[k]);
    for (int k = 0; kRanked && k < K; ++k)
      rank_block(source[0], source[k + 1], n, at, tensor.columns, tensor.rank_tables[k], ranks[k]);
    u32x8 hash = (u32x8)kLane * kWeylStep + tie_hash(at, tensor.id);
    for (int j = 0; j < n; j += 8) {
      f32x8 expert[K], rank[K];
      i32x8 random[K];
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) {
        expert[k] = load8<Float32>(source[k + 1], j);
        rank[k] = f32x8{};
        random[k] = kLane;
        if (kRanked) rank[k] = load8<Float32>(ranks[k], j);
        if (kRandom) {
          u16x8 r;
          memcpy(&r, bits[k] + j, sizeof r);
          random[k] = __builtin_convertvector(r, i32x8);
        }
      }
      const f32x8 theta = load8<Float32>(source[0], j);
      const f32x8 merged = merge_element<K, SPARSIFY, ELECT>(theta, expert, p, hash, random, rank);
      memcpy(out + j, &merged, sizeof merged);
      hash += 8 * kWeylStep;
    }
    store_floats(tensor.out_dtype, tensor.out, at, n, out, stream);
  }
}

#if MERGE3_DIRECT
// bfloat16 to bfloat16 without leaving the registers: a 32-bit lane holds two neighbours, so the even
// elements are one shift away from float32 and the odd ones one mask, and back. At two bytes an
// element every instruction shows against the bandwidth.
template <int K, int SPARSIFY, int ELECT>
void merge_bfloat16(const merge3_tensor& tensor, const Prepared<f32x8, K>& shared, int64_t begin, int64_t end, bool stream) {
  const Prepared<f32x8, K> p = shared;  // a local copy cannot alias the output
  const uint16_t* source[K + 1];
  alignas(64) uint16_t copy[K + 1][kBlock] = {}, partial[kBlock];
  const i32x8 unused[K] = {};
  const f32x8 no_rank[K] = {};
  const u32x8 upper = u32x8{} + 0xffff0000u;
  for (int64_t at = begin; at < end; at += kBlock) {
    const int n = int(end - at < kBlock ? end - at : kBlock);
    const bool whole = n % 16 == 0;
    for (int v = 0; v <= K; ++v) {
      const auto* data = static_cast<const uint16_t*>(v ? tensor.experts[v - 1] : tensor.base);
      source[v] = copy[v];
      if (data == nullptr) continue;
      if (whole) source[v] = data + at;
      else memcpy(copy[v], data + at, sizeof(uint16_t) * size_t(n));
    }
    uint16_t* out = whole ? static_cast<uint16_t*>(tensor.out) + at : partial;
    const bool streaming = stream && (reinterpret_cast<uintptr_t>(out) & 31) == 0;
    u32x8 hash = (u32x8)kLane * (2 * kWeylStep) + tie_hash(at, tensor.id);
    for (int j = 0; j < n; j += 16) {
      f32x8 even[K + 1], odd[K + 1];
#pragma GCC unroll 9
      for (int v = 0; v <= K; ++v) {
        u32x8 pair;
        memcpy(&pair, source[v] + j, sizeof pair);
        even[v] = as_float(pair << 16);
        odd[v] = as_float(pair & upper);
      }
      const auto& e = reinterpret_cast<const f32x8(&)[K]>(even[1]);
      const auto& o = reinterpret_cast<const f32x8(&)[K]>(odd[1]);
      // Inputs have nothing in the lower half, so neither has the payload of a NaN they cause.
      const u32x8 a = round_bfloat16(as_uint(merge_element<K, SPARSIFY, ELECT>(even[0], e, p, hash, unused, no_rank)));
      const u32x8 b = round_bfloat16(as_uint(merge_element<K, SPARSIFY, ELECT>(odd[0], o, p, hash + kWeylStep, unused, no_rank)));
      const __m256i packed = (__m256i)((a >> 16) | (b & upper));
      if (streaming) _mm256_stream_si256(reinterpret_cast<__m256i*>(out + j), packed);
      else _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + j), packed);
      hash += 16 * kWeylStep;
    }
    if (!whole) memcpy(static_cast<uint16_t*>(tensor.out) + at, partial, sizeof(uint16_t) * size_t(n));
  }
}
#endif

template <int K, int SPARSIFY, int ELECT>
void merge_span(const MergeCall& call, int64_t from, int64_t to) {
  call.chunks->each(call.table, from, to, [&](int64_t t, int64_t begin, int64_t end, int64_t) {
    const merge3_tensor& tensor = call.table[t];
    const auto p = prepare<f32x8, K>(call.coefficients + t * K, call.lambda[t], call.modes->normalize != 0,
                                     tensor.base != nullptr);
#if MERGE3_DIRECT
    if constexpr (SPARSIFY != MERGE3_KEEP_RANDOM && SPARSIFY != MERGE3_KEEP_RANKED)
      if (tensor.dtype == MERGE3_BFLOAT16 && tensor.out_dtype == MERGE3_BFLOAT16)
        return merge_bfloat16<K, SPARSIFY, ELECT>(tensor, p, begin, end, call.stream);
#endif
    merge_floats<K, SPARSIFY, ELECT>(tensor, p, call.modes->seed, begin, end, call.stream);
  });
}

}  // namespace

bool MERGE3_MERGE_ENTRY(const MergeCall& call, int64_t from, int64_t to) {
  bool known = false;
  dispatch_experts(call.modes->experts, [&](auto k) {
    dispatch_sparsify(call.modes->sparsify, [&](auto s) {
      known = dispatch_elect(call.modes->elect, [&](auto e) {
        merge_span<decltype(k)::value, decltype(s)::value, decltype(e)::value>(call, from, to);
      });
    });
  });
  return known;
}

}  // namespace merge3
