// Philox4x32-7 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): a counter
// based generator, so element i of tensor t draws the same bits on every device, in any order and
// for any number of threads. Seven rounds are the fewest that pass BigCrush (their Table 2).
//
// A draw has sixteen bits, and its two bytes come from two blocks (of 128 bits), each of which serves sixteen
// consecutive elements: the upper byte decides nearly all of them, so that the block of the lower bytes is made only
// where an upper byte equals that of the threshold, one time in 256 (on a GPU: for all blocks, as some thread of a warp
// needs it), and never for densities of n / 256.
// Of elements 16 b .. 16 b + 15 the even ones have the bytes of words 0 and 1 in turn, the odd ones of words 2 and
// 3: vector loops of 16-bit floats work on even and odd elements apart.
#pragma once
#include "lanes.h"

namespace merge3 {

constexpr int kPhiloxRounds = 7;
constexpr uint32_t kPhilox0 = 0xD2511F53u, kPhilox1 = 0xCD9E8D57u;     // multipliers
constexpr uint32_t kPhiloxKey0 = 0x9E3779B9u, kPhiloxKey1 = 0xBB67AE85u;  // what a round adds to the key
constexpr uint32_t kUpperBytes = 0, kLowerBytes = 0x80000000u;          // which block, in the counter's second word

MERGE3_HD void multiply_wide(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
#if defined(__CUDA_ARCH__)
  // One instruction: of a product of 64-bit numbers the compiler adds up the halves that are zero, too.
  asm("{.reg .u64 product;\nmul.wide.u32 product, %2, %3;\nmov.b64 {%1, %0}, product;}" : "=r"(high), "=r"(low) : "r"(a), "r"(b));
#else
  const uint64_t product = uint64_t(a) * b;
  high = uint32_t(product >> 32), low = uint32_t(product);
#endif
}

MERGE3_HD uint32_t xor_of(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDA_ARCH__)
  uint32_t x;
  asm("lop3.b32 %0, %1, %2, %3, 0x96;" : "=r"(x) : "r"(a), "r"(b), "r"(c));
  return x;
#else
  return a ^ b ^ c;
#endif
}

MERGE3_HD void philox_block(uint64_t block, uint32_t which, uint32_t tensor, uint32_t expert, uint64_t seed,
                            uint32_t (&words)[4]) {
  uint32_t c0 = uint32_t(block), c1 = uint32_t(block >> 32) | which, c2 = tensor, c3 = expert;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  MERGE3_UNROLL
  for (int round = 0; round < kPhiloxRounds; ++round) {
    uint32_t high0, low0, high1, low1;
    multiply_wide(c0, kPhilox0, high0, low0);
    multiply_wide(c2, kPhilox1, high1, low1);
    c0 = xor_of(high1, c1, k0), c1 = low1;
    c2 = xor_of(high0, c3, k1), c3 = low0;
    k0 += kPhiloxKey0, k1 += kPhiloxKey1;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

// The bytes of eight elements, of which `element` is one: half a block.
struct Bytes8 {
  uint32_t even, odd;
};
MERGE3_HD Bytes8 draw_bytes(int64_t element, uint32_t which, uint32_t tensor, uint32_t expert, uint64_t seed) {
  uint32_t words[4];
  philox_block(uint64_t(element) / 16, which, tensor, expert, seed, words);
  const bool second = element & 8;
  return {second ? words[1] : words[0], second ? words[3] : words[2]};
}
MERGE3_HD int32_t byte_of(const Bytes8& bytes, int64_t element) {
  return int32_t(((element & 1 ? bytes.odd : bytes.even) >> (element % 8 / 2 * 8)) & 0xffu);
}

// Both bytes. Where the upper one decides, `lower` may be left as it is.
struct Draws8 {
  Bytes8 upper, lower;
};
// needed: the draws are compared with this alone (a random keep's threshold), or with anything (-1).
MERGE3_HD Draws8 draw8(int64_t element, uint32_t tensor, uint32_t expert, uint64_t seed, int32_t needed = -1) {
  Draws8 draws{draw_bytes(element, kUpperBytes, tensor, expert, seed), {0, 0}};
  if (needed < 0 || (needed & 0xff)) draws.lower = draw_bytes(element, kLowerBytes, tensor, expert, seed);
  return draws;
}
MERGE3_HD int32_t draw_of(const Draws8& draws, int64_t element) {
  return byte_of(draws.upper, element) << 8 | byte_of(draws.lower, element);
}

}  // namespace merge3
