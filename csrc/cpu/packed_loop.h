// The CPU loop of merges whose keeps, or whole task vectors, are one bit per element.
//
// mask: (K + 1) reads, K / 32 words and 1 write per element; signs: 1 read, K / 32 words, 1 write. Included once per
// instruction set, as merge_loop.h is. A word's bits become lanes by a broadcast and a test against each lane's place.
#include "../dispatch.h"
#include "merge_cpu.h"
#include "storage.h"

namespace merge3 {
namespace {

constexpr int kBlock = 512;  // elements whose results wait in L1 for one streaming store

using Float = MERGE3_LANES;
using UInt = Lanes<Float>::U;
using Int = Lanes<Float>::I;
constexpr int W = sizeof(Float) / sizeof(float);

template <class V>
MERGE3_HD V load(const void* from) {
  V x;
  memcpy(&x, from, sizeof x);
  return x;
}

// Where each lane's bit is: `first` for lane 0, and so many further on for each lane after it.
MERGE3_HD UInt places(uint32_t first, uint32_t apart) {
  UInt at;
  for (uint32_t l = 0; l < W; ++l) at[l] = 1u << (first + l * apart);
  return at;
}
MERGE3_HD Int lanes_of(uint32_t bits, UInt at) { return (same<UInt>(bits) & at) != 0; }
MERGE3_HD uint32_t bits_at(const uint32_t* mask, int64_t element) { return mask[element / 32] >> (element % 32); }

// PLAIN: no signs are elected and nothing is normalized, known when the loop is compiled.
template <int K, bool SIGNS, bool PLAIN>
MERGE3_HD Float element(Float theta, const Float (&expert)[K], const Int (&bit)[K], const Prepared<Float, K>& p,
                        const merge3_modes& modes) {
  Float c[K];
  MERGE3_UNROLL
  for (int k = 0; k < K; ++k) c[k] = packed_change<SIGNS>(theta, expert[k], bit[k], p.scale[k]);
  if constexpr (PLAIN) return elect_and_add<K, MERGE3_ELECT_NONE>(theta, c, p, false);
  else return elect_any<K>(theta, c, p, modes.elect, modes.normalize != 0);
}

// Any dtypes, converted in L1.
template <int K, bool SIGNS, bool PLAIN>
void packed_floats(const MergeCall& call, int64_t t, int64_t begin, int64_t end) {
  const merge3_tensor& tensor = call.table[t];
  const auto p = prepare<Float, K>(call.coefficients + t * K, call.lambda[t], tensor.base != nullptr);
  const UInt at_bit = places(0, 1);
  alignas(64) float theta[kBlock] = {}, expert[SIGNS ? 1 : K][kBlock] = {}, out[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int n = int(end - at < kBlock ? end - at : kBlock);
    load_block(tensor.dtype, tensor.base, at, n, theta);
    for (int k = 0; !SIGNS && k < K; ++k) load_block(tensor.dtype, tensor.experts[k], at, n, expert[k]);
    for (int j = 0; j < n; j += W) {
      Float e[K];
      Int bit[K];
      MERGE3_UNROLL
      for (int k = 0; k < K; ++k) {
        e[k] = load<Float>(expert[SIGNS ? 0 : k] + j);
        bit[k] = lanes_of(bits_at(tensor.masks[k], tensor.offset + at + j), at_bit);
      }
      const Float merged = element<K, SIGNS, PLAIN>(load<Float>(theta + j), e, bit, p, *call.modes);
      memcpy(out + j, &merged, sizeof merged);
    }
    store_block(tensor.out_dtype, tensor.out, at, n, out, call.stream);
  }
}

#if MERGE3_DIRECT
// bfloat16 to bfloat16 in registers; see merge_bfloat16 in merge_loop.h. Of 2 W neighbours the even ones have every
// second bit, from the first on, and the odd ones those between.
template <int K, bool SIGNS>
void packed_bfloat16(const MergeCall& call, int64_t t, int64_t begin, int64_t end) {
  const merge3_tensor& tensor = call.table[t];
  const auto p = prepare<Float, K>(call.coefficients + t * K, call.lambda[t], tensor.base != nullptr);
  const UInt upper = UInt{} + 0xffff0000u, at_bit[2] = {places(0, 2), places(1, 2)};
  const uint16_t* source[K + 1];
  alignas(64) uint16_t copy[K + 1][kBlock] = {}, partial[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int n = int(end - at < kBlock ? end - at : kBlock);
    const bool whole = n % (2 * W) == 0;
    for (int v = 0; v <= (SIGNS ? 0 : K); ++v) {
      const auto* data = static_cast<const uint16_t*>(v ? tensor.experts[v - 1] : tensor.base);
      source[v] = copy[v];
      if (data == nullptr) continue;
      if (whole) source[v] = data + at;
      else memcpy(copy[v], data + at, sizeof(uint16_t) * size_t(n));
    }
    uint16_t* out = whole ? static_cast<uint16_t*>(tensor.out) + at : partial;
    const bool streaming = call.stream && reinterpret_cast<uintptr_t>(out) % sizeof(UInt) == 0;
    for (int j = 0; j < n; j += 2 * W) {
      uint32_t bits[K];
      for (int k = 0; k < K; ++k) bits[k] = bits_at(tensor.masks[k], tensor.offset + at + j);
      UInt half[2];
#pragma GCC unroll 2
      for (int odd = 0; odd < 2; ++odd) {
        Float x[K + 1];
        Int bit[K];
        MERGE3_UNROLL
        for (int v = 0; v <= (SIGNS ? 0 : K); ++v) {
          const UInt pair = load<UInt>(source[v] + j);
          x[v] = as_float(odd ? pair & upper : pair << 16);
        }
        MERGE3_UNROLL
        for (int k = 0; k < K; ++k) bit[k] = lanes_of(bits[k], at_bit[odd]);
        const auto& expert = reinterpret_cast<const Float(&)[K]>(x[1]);
        half[odd] = round_bfloat16(as_uint(element<K, SIGNS, true>(x[0], expert, bit, p, *call.modes)));
      }
      const UInt packed = (half[0] >> 16) | (half[1] & upper);
      if (streaming) stream_store(out + j, packed);
      else memcpy(out + j, &packed, sizeof packed);
    }
    if (!whole) memcpy(static_cast<uint16_t*>(tensor.out) + at, partial, sizeof(uint16_t) * size_t(n));
  }
}
#endif

template <int K, bool SIGNS>
void packed_span(const MergeCall& call, int64_t from, int64_t to) {
  const bool plain = call.modes->elect == MERGE3_ELECT_NONE && !call.modes->normalize;
  call.chunks->each(call.table, from, to, [&](int64_t t, int64_t begin, int64_t end, int64_t) {
#if MERGE3_DIRECT
    const merge3_tensor& tensor = call.table[t];
    if (plain && tensor.dtype == MERGE3_BFLOAT16 && tensor.out_dtype == MERGE3_BFLOAT16)
      return packed_bfloat16<K, SIGNS>(call, t, begin, end);
#endif
    if (plain) packed_floats<K, SIGNS, true>(call, t, begin, end);
    else packed_floats<K, SIGNS, false>(call, t, begin, end);
  });
}

}  // namespace

void MERGE3_PACKED_ENTRY(const MergeCall& call, int64_t from, int64_t to) {
  dispatch_experts(call.modes->experts, [&](auto k) {
    constexpr int K = decltype(k)::value;
    if (call.modes->sparsify == MERGE3_SIGNS) packed_span<K, true>(call, from, to);
    else packed_span<K, false>(call, from, to);
  });
}

}  // namespace merge3
