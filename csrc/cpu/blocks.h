// What the CPU loops share: vectors of the instruction set at hand, and the inputs of a block of elements.
// Included once per instruction set; nothing here has external linkage.
#pragma once
#include "../dispatch.h"
#include "merge_cpu.h"
#include "storage.h"

namespace merge3 {
namespace {

constexpr int kBlock = 512;  // elements that are worked on in L1

using Float = MERGE3_LANES;
using UInt = Lanes<Float>::U;
using Int = Lanes<Float>::I;
constexpr int W = sizeof(Float) / sizeof(float);

// Two vectors go one by one: copied as one object they would take a way round, through the stack.
template <class V>
MERGE3_HD V load(const void* from) {
  if constexpr (kTwo<V>) {
    using Half = decltype(V::a);
    return {load<Half>(from), load<Half>(static_cast<const char*>(from) + sizeof(Half))};
  } else {
    V x;
    memcpy(&x, from, sizeof x);
    return x;
  }
}
template <class V>
MERGE3_HD void store(void* to, const V& x) {
  if constexpr (kTwo<V>) {
    store(to, x.a);
    store(static_cast<char*>(to) + sizeof x.a, x.b);
  } else {
    memcpy(to, &x, sizeof x);
  }
}

#if MERGE3_DIRECT
// A block of bfloat16 to bfloat16, without leaving the registers: a 32-bit lane holds two neighbours, so the even
// elements are one shift away from float32 and the odd ones one mask, and back. At two bytes an element every
// instruction shows against the bandwidth. A last, partial block is padded in a copy.
template <int V>
struct Pairs {
  const uint16_t* source[V];
  uint16_t* out;
  bool streaming;

  MERGE3_HD Two<Float> read(int v, int64_t j) const {
    const UInt pair = load<UInt>(source[v] + j);
    return {as_float(pair << 16), as_float(pair & same<UInt>(0xffff0000u))};
  }
  // Inputs have nothing in the lower half, so neither has the payload of a NaN they cause.
  MERGE3_HD void write(int64_t j, const Two<Float>& x) const {
    const UInt packed = pair_bfloat16(as_uint(x.a), as_uint(x.b));
    if (streaming) stream_store(out + j, packed);
    else store(out + j, packed);
  }
};

// The copy of a partial block, and its result.
template <int V>
struct Padding {
  alignas(64) uint16_t copy[V][kBlock] = {}, partial[kBlock];

  // The n elements from `at` on. data(v): the tensor that is v-th source, or NULL, which reads as zeros.
  template <class Data>
  MERGE3_HD Pairs<V> open(const Data& data, void* to, int64_t at, int n, bool stream) {
    const bool whole = n % (2 * W) == 0;
    Pairs<V> pairs;
#pragma GCC unroll 9
    for (int v = 0; v < V; ++v) {
      const auto* from = static_cast<const uint16_t*>(data(v));
      pairs.source[v] = from && whole ? from + at : copy[v];
      if (from && !whole) memcpy(copy[v], from + at, sizeof(uint16_t) * size_t(n));
    }
    pairs.out = whole ? static_cast<uint16_t*>(to) + at : partial;
    pairs.streaming = stream && whole && reinterpret_cast<uintptr_t>(pairs.out) % sizeof(UInt) == 0;
    return pairs;
  }
  MERGE3_HD void close(void* to, int64_t at, int n) const {
    if (n % (2 * W)) memcpy(static_cast<uint16_t*>(to) + at, partial, sizeof(uint16_t) * size_t(n));
  }
};
#endif

}  // namespace
}  // namespace merge3
