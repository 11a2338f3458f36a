// Draws for two turns at once. A block of the generator serves sixteen consecutive elements, which two neighbouring
// threads merge, eight each: one of them makes the block of this turn, the other that of the next, and each hands over
// the half that is not its own.
#pragma once
#include <cuda_runtime.h>

#include "../merge_math.h"
#include "../philox.h"

namespace merge3 {

// Of a thread: what `make(element)` gives for its eight elements at `element` (a multiple of eight), and for those `step`
// further on. make: of a block, {first half, second half}. Every thread of a warp must come here.
template <class Half>
struct Halves {
  Half first, second;
};
template <class Half>
struct Turns {
  Half now, next;
};
template <int WORDS>
struct Words {
  uint32_t word[WORDS];
};
template <int WORDS, class Make>
__device__ __forceinline__ Turns<Words<WORDS>> two_turns(int64_t element, int64_t step, const Make& make) {
  const bool second = element & 8;
  const Halves<Words<WORDS>> made = make(second ? element + step : element);
  Turns<Words<WORDS>> turns;
#pragma unroll
  for (int w = 0; w < WORDS; ++w) {
    const uint32_t own = second ? made.second.word[w] : made.first.word[w];
    const uint32_t given = __shfl_xor_sync(0xffffffffu, second ? made.first.word[w] : made.second.word[w], 1);
    turns.now.word[w] = second ? given : own;
    turns.next.word[w] = second ? own : given;
  }
  return turns;
}

// Bit 7 of every byte: whether it is below, or equal to, the byte of t.
__device__ __forceinline__ uint32_t bytes_below(uint32_t x, uint32_t t) {
  const uint32_t low = (x | 0x80808080u) - (t & 0x7f7f7f7fu);
  return ((~x & t) | (~(x ^ t) & ~low)) & 0x80808080u;
}
__device__ __forceinline__ uint32_t bytes_equal(uint32_t x, uint32_t t) {
  const uint32_t other = x ^ t;
  return ~(((other & 0x7f7f7f7fu) + 0x7f7f7f7fu) | other) & 0x80808080u;
}

// Which elements of a block a random keep keeps. Of a half: bits 6 of the bytes for even elements, 7 for odd ones.
__device__ __forceinline__ Halves<Words<1>> kept_halves(int64_t element, uint32_t tensor, uint32_t expert, uint64_t seed, int32_t threshold) {
  const uint32_t upper = (uint32_t(threshold) >> 8 & 0xffu) * 0x01010101u, lower = (uint32_t(threshold) & 0xffu) * 0x01010101u;
  uint32_t words[4], below[4];
  philox_block(uint64_t(element) / 16, kUpperBytes, tensor, expert, seed, words);
#pragma unroll
  for (int w = 0; w < 4; ++w) below[w] = threshold > 0xffff ? 0x80808080u : bytes_below(words[w], upper);
  if (lower) {
    uint32_t more[4];
    philox_block(uint64_t(element) / 16, kLowerBytes, tensor, expert, seed, more);
#pragma unroll
    for (int w = 0; w < 4; ++w) below[w] |= bytes_equal(words[w], upper) & bytes_below(more[w], lower);
  }
  return {{{below[0] >> 1 | below[2]}}, {{below[1] >> 1 | below[3]}}};
}
// x where element j of a half is kept, else zero.
template <int WORDS>
__device__ __forceinline__ float kept_where(const Words<WORDS>& kept, int j, float x) {
  const uint32_t word = j & 1 ? kept.word[0] : kept.word[0] << 1;
#if defined(__CUDA_ARCH__)
  uint32_t mask;  // bit 7 of byte j / 2, everywhere
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(mask) : "r"(word), "r"(0x8888 + 0x1111 * (j / 2)));
#else
  const uint32_t mask = word >> (j / 2 * 8 + 7) & 1 ? 0xffffffffu : 0;
#endif
  return as_float(as_uint(x) & mask);
}

// The numbers drawn for a block: of a half the upper bytes of even and of odd elements, then the lower ones.
__device__ __forceinline__ Halves<Words<4>> drawn_halves(int64_t element, uint32_t tensor, uint32_t expert, uint64_t seed) {
  uint32_t upper[4], lower[4];
  philox_block(uint64_t(element) / 16, kUpperBytes, tensor, expert, seed, upper);
  philox_block(uint64_t(element) / 16, kLowerBytes, tensor, expert, seed, lower);
  return {{{upper[0], upper[2], lower[0], lower[2]}}, {{upper[1], upper[3], lower[1], lower[3]}}};
}
template <int WORDS>
__device__ __forceinline__ int32_t drawn_of(const Words<WORDS>& half, int j) {
  static_assert(WORDS == 4 || WORDS == 1);
  if constexpr (WORDS == 1) return 0;  // of what keeps no numbers
  else return draw_of(Draws8{{half.word[0], half.word[1]}, {half.word[2], half.word[3]}}, j);
}

// drawn_limit of a row whose quantiles the lanes of the warp hold, one each: a look-up in registers, where the loads of
// 32 lanes from 32 places take the time of as many. Every thread of the warp must come here.
__device__ __forceinline__ float drawn_limit_of_lanes(const Spread& s, int32_t draw, float quantile) {
#if defined(__CUDA_ARCH__)
  // Numbers below 2^23 are the last bits of those beyond: no conversion, which a GPU does an eighth as often as additions.
  const float bin = (as_float(0x4b000000u | uint32_t(draw)) - 8388608.0f) * s.step + s.start;
  const int lane = int(as_uint(__fadd_rz(fmaxf(bin, 0.0f), 8388608.0f)));
#else
  const float bin = float(draw) * s.step + s.start;
  const int lane = bin > 0.0f && bin < float(MERGE3_RANK_BINS) ? int(bin) : 0;
#endif
  const float limit = __shfl_sync(0xffffffffu, quantile, lane);  // of lane % 32
  return bin < float(MERGE3_RANK_BINS) ? limit : as_float(0x7fc00000u);
}

}  // namespace merge3
