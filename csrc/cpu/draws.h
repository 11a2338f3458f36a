// Random draws of a block of elements, for the CPU loops. Included by merge_loop.h, once per instruction set.
//
// Bytes lie in two planes, of the even elements and of the odd ones, as the generator makes them.
//
// Four (AVX2) or eight (AVX-512) counters in 64-bit lanes: a product leaves its upper half where one shift finds it, and
// its lower half where the next product reads it; whatever stands in the upper half of a lane is never read.
// Tried: eight counters in 32-bit lanes: as many products, and four blends and shifts more a round.
#pragma once
#include <string.h>

#include "../philox.h"
#include "blocks.h"

namespace merge3 {
namespace {

typedef uint64_t Wide __attribute__((vector_size(sizeof(Float))));
typedef uint8_t Bytes __attribute__((vector_size(sizeof(Float))));
constexpr int kLanes = sizeof(Wide) / 8;  // counters at a time; as many times sixteen elements

MERGE3_HD Wide multiply_lower(Wide x, uint32_t by) {
#if defined(__AVX512F__)
  return (Wide)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(int64_t(by)));
#elif defined(__AVX2__)
  return (Wide)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(int64_t(by)));
#else
  return (x & 0xffffffffu) * by;
#endif
}
MERGE3_HD Two<Wide> multiply_lower(const Two<Wide>& x, uint32_t by) { return {multiply_lower(x.a, by), multiply_lower(x.b, by)}; }

MERGE3_HD Wide exclusive_or(Wide x, Wide y, Wide z) {
#if defined(__AVX512F__)
  return (Wide)_mm512_ternarylogic_epi64((__m512i)x, (__m512i)y, (__m512i)z, 0x96);
#else
  return x ^ y ^ z;
#endif
}
MERGE3_HD Two<Wide> exclusive_or(const Two<Wide>& x, const Two<Wide>& y, Wide z) {
  return {exclusive_or(x.a, y.a, z), exclusive_or(x.b, y.b, z)};
}

// philox_block for a vector of counters whose second word is `upper`, tensor's and expert's being the same: all but one
// word of the counter are scalars, which spares the first round a product and the second one another.
// even: words 0 and 1 of each block, odd: words 2 and 3.
template <class V>
MERGE3_HD void philox_lanes(const V& counter, uint32_t upper, uint32_t tensor, uint32_t expert, uint64_t seed, V& even, V& odd) {
  const auto wide = [](uint32_t x) { return Wide{} + uint64_t(x); };
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  const uint64_t by_tensor = uint64_t(tensor) * kPhilox1;
  const uint32_t c0 = uint32_t(by_tensor >> 32) ^ upper ^ k0, c1 = uint32_t(by_tensor);
  V p0 = multiply_lower(counter, kPhilox0);
  V x2 = (p0 >> 32) ^ wide(expert ^ k1);
  const V x3 = p0;
  k0 += kPhiloxKey0, k1 += kPhiloxKey1;
  const uint64_t by_c0 = uint64_t(c0) * kPhilox0;
  V p1 = multiply_lower(x2, kPhilox1);
  V x0 = (p1 >> 32) ^ wide(c1 ^ k0), x1 = p1;
  x2 = x3 ^ wide(uint32_t(by_c0 >> 32) ^ k1);
  k0 += kPhiloxKey0, k1 += kPhiloxKey1;
  p0 = multiply_lower(x0, kPhilox0), p1 = multiply_lower(x2, kPhilox1);
  x0 = exclusive_or(p1 >> 32, x1, wide(k0)), x1 = p1;
  x2 = (p0 >> 32) ^ wide(uint32_t(by_c0) ^ k1);
#pragma GCC unroll 8
  for (int round = 3; round < kPhiloxRounds; ++round) {
    const V before = p0;
    k0 += kPhiloxKey0, k1 += kPhiloxKey1;
    p0 = multiply_lower(x0, kPhilox0), p1 = multiply_lower(x2, kPhilox1);
    x0 = exclusive_or(p1 >> 32, x1, wide(k0)), x1 = p1;
    x2 = exclusive_or(p0 >> 32, before, wide(k1));
  }
  const Wide lower = wide(0xffffffffu);
  even = (x0 & lower) | (x1 << 32), odd = (x2 & lower) | (p0 << 32);
}

// Calls use(place, even, odd) with the bytes of n elements from `begin` (a multiple of kBlock) on: vectors of bytes,
// `place` being where in a plane each begins.
template <class Use>
MERGE3_HD void each_bytes(int64_t begin, int n, uint32_t which, uint32_t tensor, uint32_t expert, uint64_t seed, const Use& use) {
  Wide lane;
  for (int l = 0; l < kLanes; ++l) lane[l] = uint64_t(l);
  for (int i = 0; i < n; i += 32 * kLanes) {
    const uint64_t block = uint64_t(begin + i) / 16;  // the lower words of a vector's counters never carry
    const Wide first = lane + (block & 0xffffffffu);
    Two<Wide> even, odd;
    philox_lanes(Two<Wide>{first, first + uint64_t(kLanes)}, uint32_t(block >> 32) | which, tensor, expert, seed, even, odd);
    use(i / 2, (Bytes)even.a, (Bytes)odd.a);
    use(i / 2 + 8 * kLanes, (Bytes)even.b, (Bytes)odd.b);
  }
}

// One bit per byte that is not zero, of a vector of bytes that are 0 or 255.
MERGE3_HD uint64_t bits_of(Bytes x) {
#if defined(__AVX512F__)
  return _mm512_movepi8_mask((__m512i)x);
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_epi8((__m256i)x));
#else
  uint64_t bits = 0;
  for (int j = 0; j < int(sizeof x); ++j) bits |= uint64_t(x[j] & 1) << j;
  return bits;
#endif
}

#if defined(__AVX2__)
// A row's quantiles in registers, for drawn_limit of sixteen draws at a time.
struct Quantiles {
#if defined(__AVX512F__)
  explicit Quantiles(const float* row) : lower(_mm512_loadu_ps(row)), upper(_mm512_loadu_ps(row + 16)) {}
  void look_up(__m128i first, __m128i second, const Spread& spread, float* to) const {
    const __m512 draw = _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(_mm256_set_m128i(second, first)));
    const __m512 bin = _mm512_add_ps(_mm512_mul_ps(draw, _mm512_set1_ps(spread.step)), _mm512_set1_ps(spread.start));
    const __m512i index = _mm512_cvttps_epi32(_mm512_max_ps(bin, _mm512_setzero_ps()));
    const __mmask16 none = _mm512_cmp_ps_mask(bin, _mm512_set1_ps(MERGE3_RANK_BINS), _CMP_NLT_UQ);
    _mm512_storeu_ps(to, _mm512_mask_mov_ps(_mm512_permutex2var_ps(lower, index, upper), none, _mm512_set1_ps(__builtin_nanf(""))));
  }
  __m512 lower, upper;
#else
  explicit Quantiles(const float* row) {
    for (int q = 0; q < 4; ++q) quarter[q] = _mm256_loadu_ps(row + 8 * q);
  }
  void look_up(__m128i first, __m128i second, const Spread& spread, float* to) const {
    eight(first, spread, to);
    eight(second, spread, to + 8);
  }
  MERGE3_HD void eight(__m128i draws, const Spread& spread, float* to) const {
    const __m256 draw = _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(draws));
    const __m256 bin = _mm256_add_ps(_mm256_mul_ps(draw, _mm256_set1_ps(spread.step)), _mm256_set1_ps(spread.start));
    const __m256i index = _mm256_cvttps_epi32(_mm256_max_ps(bin, _mm256_setzero_ps()));
    const auto pick = [&](int q) { return _mm256_permutevar8x32_ps(quarter[q], index); };
    const __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)), bit4 = _mm256_castsi256_ps(_mm256_slli_epi32(index, 27));
    const __m256 found = _mm256_blendv_ps(_mm256_blendv_ps(pick(0), pick(1), bit3), _mm256_blendv_ps(pick(2), pick(3), bit3), bit4);
    const __m256 none = _mm256_cmp_ps(bin, _mm256_set1_ps(MERGE3_RANK_BINS), _CMP_NLT_UQ);  // all bits: a NaN
    _mm256_storeu_ps(to, _mm256_or_ps(found, none));
  }
  __m256 quarter[4];
#endif
};
#endif

struct Planes {
  alignas(64) uint8_t even[kBlock / 2], odd[kBlock / 2];
};

// 255 where a draw of n elements from `begin` on is below `threshold` (of 65536), 0 elsewhere.
__attribute__((noinline)) void draw_kept(int64_t begin, int n, uint32_t tensor, uint32_t expert, uint64_t seed,
                                         int32_t threshold, Planes& to) {
  if (threshold <= 0 || threshold >= 65536) {
    memset(to.even, threshold <= 0 ? 0 : 255, sizeof to.even);
    memset(to.odd, threshold <= 0 ? 0 : 255, sizeof to.odd);
    return;
  }
  const Bytes upper = Bytes{} + uint8_t(threshold >> 8);
  each_bytes(begin, n, kUpperBytes, tensor, expert, seed, [&](int at, Bytes even, Bytes odd) {
    const auto decide = [&](Bytes bytes, uint8_t* plane, int parity) {
      const Bytes below = (Bytes)(bytes < upper);
      memcpy(plane + at, &below, sizeof below);
      if (!(threshold & 0xff)) return;
      for (uint64_t equal = bits_of((Bytes)(bytes == upper)); equal; equal &= equal - 1) {
        const int place = at + __builtin_ctzll(equal);
        const int64_t element = begin + 2 * place + parity;
        const Bytes8 lower = draw_bytes(element, kLowerBytes, tensor, expert, seed);
        plane[place] = byte_of(lower, element) < (threshold & 0xff) ? 255 : 0;
      }
    };
    decide(even, to.even, 0);
    decide(odd, to.odd, 1);
  });
}

// Of 2 W elements from element j of a block on, the even ones and the odd ones.
using Kept = Lanes<Float>::Kept;
MERGE3_HD Two<Kept> kept_apart(const Planes& planes, int64_t j) {
#if defined(__AVX512F__)
  const auto read = [j](const uint8_t* plane) { return _mm_movepi8_mask(_mm_loadu_si128(reinterpret_cast<const __m128i*>(plane + j / 2))); };
#elif defined(__AVX2__)
  const auto read = [j](const uint8_t* plane) { return (Kept)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(plane + j / 2))); };
#else
  const auto read = [j](const uint8_t* plane) {
    Kept kept;
    for (int l = 0; l < W; ++l) kept[l] = -int32_t(plane[j / 2 + l] & 1);
    return kept;
  };
#endif
  return {read(planes.even), read(planes.odd)};
}

// The first W and the second W of them.
MERGE3_HD Two<Kept> kept_in_order(const Planes& planes, int j) {
#if defined(__AVX512F__)
  const __m128i even = load<__m128i>(planes.even + j / 2), odd = load<__m128i>(planes.odd + j / 2);
  return {_mm_movepi8_mask(_mm_unpacklo_epi8(even, odd)), _mm_movepi8_mask(_mm_unpackhi_epi8(even, odd))};
#elif defined(__AVX2__)
  const __m128i bytes = _mm_unpacklo_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(planes.even + j / 2)),
                                          _mm_loadl_epi64(reinterpret_cast<const __m128i*>(planes.odd + j / 2)));
  return {(Kept)_mm256_cvtepi8_epi32(bytes), (Kept)_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))};
#else
  Two<Kept> kept;
  for (int l = 0; l < W; ++l) {
    const uint8_t* plane = l & 1 ? planes.odd : planes.even;
    kept.a[l] = -int32_t(plane[(j + l) / 2] & 1), kept.b[l] = -int32_t(plane[(j + W + l) / 2] & 1);
  }
  return kept;
#endif
}

// What |tau| of n elements from `begin` on has to reach for a ranked keep; see drawn_limit.
__attribute__((noinline)) void draw_limits(int64_t begin, int n, uint32_t tensor, uint32_t expert, uint64_t seed,
                                           int64_t columns, const Spread& spread, const float* table, float* to) {
  Planes upper, lower;
  const auto keep = [](Planes& planes) {
    return [&planes](int at, Bytes even, Bytes odd) {
      memcpy(planes.even + at, &even, sizeof even);
      memcpy(planes.odd + at, &odd, sizeof odd);
    };
  };
  each_bytes(begin, n, kUpperBytes, tensor, expert, seed, keep(upper));
  each_bytes(begin, n, kLowerBytes, tensor, expert, seed, keep(lower));
  const auto draw = [&](int j) {
    return j & 1 ? upper.odd[j / 2] << 8 | lower.odd[j / 2] : upper.even[j / 2] << 8 | lower.even[j / 2];
  };
  const float* row = nullptr;
  for (int j = 0, end = 0; j < n; j = end) {
    row = table + (begin + j) / columns * MERGE3_RANK_STRIDE;
    end = int(std::min<int64_t>(n, j + columns - (begin + j) % columns));
#if defined(__AVX2__)
    const Quantiles quantiles(row);
    for (; j % 16 && j < end; ++j) to[j] = drawn_limit(spread, draw(j), row);
    for (; j + 16 <= end; j += 16) {
      const auto words = [j](const uint8_t* low, const uint8_t* high) {
        return _mm_unpacklo_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(low + j / 2)),
                                 _mm_loadl_epi64(reinterpret_cast<const __m128i*>(high + j / 2)));
      };
      const __m128i even = words(lower.even, upper.even), odd = words(lower.odd, upper.odd);
      quantiles.look_up(_mm_unpacklo_epi16(even, odd), _mm_unpackhi_epi16(even, odd), spread, to + j);
    }
#endif
    for (; j < end; ++j) to[j] = drawn_limit(spread, draw(j), row);
  }
}

}  // namespace
}  // namespace merge3
