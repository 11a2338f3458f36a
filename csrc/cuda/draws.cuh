// Draws for two turns at once, of eight elements each. A block of the generator serves sixteen consecutive elements:
// either those of two neighbouring threads, which hand each other halves of what they draw (random keeps), or those of
// one thread, which then exchanges what it is about to store, so that two threads store 32 consecutive bytes (ranks,
// which come from twice as many words). The second way has fewer instructions, but of 16-bit floats the loads of the
// second turn find in a cache what those of the first brought, so fewer bytes are in flight: what is bound by memory loses
// a tenth by it.
#pragma once
#include <cuda_runtime.h>

#include "../merge_math.h"
#include "../philox.h"
#include "storage.cuh"

namespace merge3 {

// What sixteen elements come from: of either half the words of even and of odd elements, WORDS together.
template <int WORDS>
struct Words {
  uint32_t word[WORDS];
};
template <int WORDS>
struct Halves {
  Words<WORDS> first, second;
};

// Four bytes of eight, those of a then those of b: one for each digit of `places`; 8 and more, its highest bit eightfold.
__device__ __forceinline__ uint32_t permuted(uint32_t a, uint32_t b, uint32_t places) {
#if defined(__CUDA_ARCH__)
  uint32_t x;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(x) : "r"(a), "r"(b), "r"(places));
  return x;
#else
  const uint64_t both = uint64_t(b) << 32 | a;
  uint32_t x = 0;
  for (int to = 0; to < 4; ++to) {
    const uint32_t place = places >> (4 * to) & 0xf, byte = uint32_t(both >> (place % 8 * 8)) & 0xff;
    x |= (place < 8 ? byte : byte & 0x80 ? 0xff : 0) << (8 * to);
  }
  return x;
#endif
}

// Bit 7 of every byte: whether it is below, or equal to, the byte of t. The other bits are of no meaning.
__device__ __forceinline__ uint32_t bytes_below(uint32_t x, uint32_t t) {
  const uint32_t rest = (x | 0x80808080u) - (t & 0x7f7f7f7fu);
#if defined(__CUDA_ARCH__)
  uint32_t below;  // one instruction, where a compiler that knows which bits count makes more
  asm("lop3.b32 %0, %1, %2, %3, 0x4d;" : "=r"(below) : "r"(x), "r"(t), "r"(rest));
  return below;
#else
  return (~x & t) | (~(x ^ t) & ~rest);
#endif
}
__device__ __forceinline__ uint32_t bytes_equal(uint32_t x, uint32_t t) {
  const uint32_t other = x ^ t;
  return ~(((other & 0x7f7f7f7fu) + 0x7f7f7f7fu) | other);
}

// Whether a random keep's upper bytes do not say it all: of densities that are no n / 256, or one. threshold: 0 to 65536.
__device__ __forceinline__ bool needs_more(int32_t threshold) { return (threshold & 0x100ff) != 0; }
// Which elements of a block are kept: bit 7 of the bytes of even elements, and of odd ones. More: a Constant, whether any
// threshold needs more.
template <class More>
__device__ __forceinline__ Halves<2> kept_halves(int64_t element, uint32_t tensor, uint32_t expert, uint64_t seed, int32_t threshold, More) {
  const uint32_t upper = permuted(uint32_t(threshold), 0, 0x1111);
  uint32_t words[4], below[4];
  philox_block(uint64_t(element) / 16, kUpperBytes, tensor, expert, seed, words);
#pragma unroll
  for (int w = 0; w < 4; ++w) below[w] = bytes_below(words[w], upper);
  if (More::value && needs_more(threshold)) {
    const uint32_t lower = permuted(uint32_t(threshold), 0, 0x0000);
    uint32_t more[4] = {};
    if (threshold <= 0xffff) philox_block(uint64_t(element) / 16, kLowerBytes, tensor, expert, seed, more);
#pragma unroll
    for (int w = 0; w < 4; ++w)
      below[w] = threshold > 0xffff ? 0xffffffffu : below[w] | (bytes_equal(words[w], upper) & bytes_below(more[w], lower));
  }
  return {{{below[0], below[2]}}, {{below[1], below[3]}}};
}
// Of a thread's eight elements in this turn, and of those in the next, `step` further on. One of two neighbouring threads
// makes the block of this turn, the other that of the next, and each hands over the half that is not its own.
// make(element): of a block. All threads of the warp must come here.
template <class Make>
__device__ __forceinline__ auto shared_draws(int64_t element, int64_t step, const Make& make) {
  const bool odd = threadIdx.x & 1;
  auto turns = make(odd ? element + step : element);
#pragma unroll
  for (int w = 0; w < int(sizeof(turns.first.word) / 4); ++w) {
    uint32_t &now = turns.first.word[w], &next = turns.second.word[w];
    const uint32_t given = __shfl_xor_sync(0xffffffffu, odd ? now : next, 1);
    if (odd) now = given;
    else next = given;
  }
  return turns;
}

// x where element j of a half is kept, else zero.
template <int WORDS>
__device__ __forceinline__ float kept_where(const Words<WORDS>& kept, int j, float x) {
  static_assert(WORDS >= 2);
  return as_float(as_uint(x) & permuted(kept.word[j % 2], 0, 0x8888u + 0x1111u * uint32_t(j / 2)));
}

// The numbers drawn for a block: of a half the upper bytes of even and of odd elements, then the lower ones.
__device__ __forceinline__ Halves<4> drawn_halves(int64_t element, uint32_t tensor, uint32_t expert, uint64_t seed) {
  uint32_t upper[4], lower[4];
  philox_block(uint64_t(element) / 16, kUpperBytes, tensor, expert, seed, upper);
  philox_block(uint64_t(element) / 16, kLowerBytes, tensor, expert, seed, lower);
  return {{{upper[0], upper[2], lower[0], lower[2]}}, {{upper[1], upper[3], lower[1], lower[3]}}};
}
// Element j's, as the last bits of a float beyond 2^23: no conversion, which a GPU does an eighth as often as additions.
template <int WORDS>
__device__ __forceinline__ float drawn_of(const Words<WORDS>& half, int j) {
  if constexpr (WORDS < 4) {
    return 0.0f;  // of what keeps no numbers
  } else {
    const uint32_t two = permuted(half.word[2 + j % 2], half.word[j % 2], j / 4 ? 0x7362u : 0x5140u);
    return as_float(permuted(two, 0x4b000000u, j / 2 % 2 ? 0x7432u : 0x7410u));
  }
}
__device__ __forceinline__ int32_t draw_from(float drawn) { return int32_t(as_uint(drawn) & 0xffffu); }

// Whether a row's quantiles let a change through.
__device__ __forceinline__ bool reaches_limit(const Spread& s, float drawn, const float* row, float tau) {
  return magnitude(tau) >= drawn_limit(s, draw_from(drawn), row);
}
// The same of a row whose quantiles the lanes of a warp hold, one each: a look-up in registers, where the loads of 32 lanes
// from 32 places take the time of as many. All threads of the warp must come here. It counts in whole tables in the place
// of bins, which is exact, so that an addition that saturates does the comparisons.
struct TableSpread {
  float step, start;
};
__device__ __forceinline__ TableSpread in_tables(const Spread& s) {
  if (!(s.start == s.start)) return {0.0f, 1.0f};  // NaN, which saturates to zero: above all, as in drawn_limit
  return {s.step / float(MERGE3_RANK_BINS), s.start / float(MERGE3_RANK_BINS)};
}
__device__ __forceinline__ bool reaches_limit_of_lanes(const TableSpread& s, float drawn, float quantile, float tau) {
  static_assert(MERGE3_RANK_BINS == 32);
#if defined(__CUDA_ARCH__)
  const float at = __saturatef(__fmaf_rn(drawn, s.step, -8388608.0f * s.step) + s.start);  // rounds as the product alone
  const int lane = int(as_uint(__fmaf_rz(at, 32.0f, 8388608.0f)));
#else
  const float sum = float(draw_from(drawn)) * s.step + s.start, at = sum > 0.0f ? sum < 1.0f ? sum : 1.0f : 0.0f;
  const int lane = int(at * 32.0f);
#endif
  const float limit = __shfl_sync(0xffffffffu, quantile, lane);  // of lane % 32
  return (at < 1.0f) & (magnitude(tau) >= limit);
}

// Stores what a thread merged in two turns, eight elements each, whose neighbour's follow or precede it. All threads of
// the warp must come here. to: where elements of the tensor go; i: of this thread's first; those from `size` on are none.
template <class T>
__device__ __forceinline__ void store_two_turns(char* to, int32_t i, int32_t size, const Raw8<T>& first, const Raw8<T>& second) {
  static_assert(T::kBytes == 16);
  const bool odd = threadIdx.x & 1;
  Raw8<T> front, back;
  uint32_t held[4] = {first.part[0].x, first.part[0].y, first.part[0].z, first.part[0].w};
  uint32_t last[4] = {second.part[0].x, second.part[0].y, second.part[0].z, second.part[0].w};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const uint32_t given = __shfl_xor_sync(0xffffffffu, odd ? held[w] : last[w], 1);
    if (odd) held[w] = given;
    else last[w] = given;
  }
  front.part[0] = make_uint4(held[0], held[1], held[2], held[3]);
  back.part[0] = make_uint4(last[0], last[1], last[2], last[3]);
  // The even thread stores both first turns, the odd one both second turns.
  const int32_t at = odd ? i - 8 : i;
  if (at < size) store_raw8<T>(to + at / 8 * T::kBytes, front);
  if (at + 16 < size) store_raw8<T>(to + (at / 8 + 2) * T::kBytes, back);
}

}  // namespace merge3
