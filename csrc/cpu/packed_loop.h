// The CPU loop of merges whose keeps, or whole task vectors, are one bit per element.
//
// mask: (K + 1) reads, K / 32 words and 1 write per element; signs: 1 read, K / 32 words, 1 write. Included once per
// instruction set, as merge_loop.h is. A word's bits become lanes by a broadcast and a test against each lane's place.
#include "blocks.h"

namespace merge3 {
namespace {

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
// bfloat16 to bfloat16 in registers; see Pairs. Of 2 W neighbours the even ones have every second bit, from the
// first on, and the odd ones those between.
template <int K, bool SIGNS>
void packed_bfloat16(const MergeCall& call, int64_t t, int64_t begin, int64_t end) {
  const merge3_tensor& tensor = call.table[t];
  const auto p = prepare<Float, K>(call.coefficients + t * K, call.lambda[t], tensor.base != nullptr);
  const Two<UInt> at_bit = {places(0, 2), places(1, 2)};
  constexpr int kRead = SIGNS ? 1 : K + 1;
  Padding<kRead> padding;
  for (int64_t at = begin; at < end; at += kBlock) {
    const int n = int(end - at < kBlock ? end - at : kBlock);
    const Pairs<kRead> block = padding.open([&](int v) { return v ? tensor.experts[v - 1] : tensor.base; }, tensor.out, at, n, call.stream);
    for (int j = 0; j < n; j += 2 * W) {
      Two<Float> c[K];
      const Two<Float> theta = block.read(0, j);
      MERGE3_UNROLL
      for (int k = 0; k < K; ++k) {
        const uint32_t bits = bits_at(tensor.masks[k], tensor.offset + at + j);
        const Two<Int> bit = {lanes_of(bits, at_bit.a), lanes_of(bits, at_bit.b)};
        c[k] = packed_change<SIGNS>(theta, SIGNS ? theta : block.read(k + 1, j), bit, p.scale[k]);
      }
      block.write(j, elect_and_add<K, MERGE3_ELECT_NONE>(theta, c, p, false));
    }
    padding.close(tensor.out, at, n);
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
