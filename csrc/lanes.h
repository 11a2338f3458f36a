// What lets one formula serve a CUDA thread, a scalar loop tail and a CPU vector register: the
// operations that C++ spells differently for `float` and for a GCC vector of floats.
//
// F is float or f32x8; U and I are the unsigned and signed integers of the same width and count.
// A comparison of F gives a Mask<F>: bool, or a vector of 0 / -1.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__) && !defined(__CUDACC__)
#include <immintrin.h>
#endif

#if defined(__CUDACC__)
#define MERGE3_HD __host__ __device__ __forceinline__
#define MERGE3_UNROLL _Pragma("unroll")
#else
#define MERGE3_HD inline __attribute__((always_inline))
#define MERGE3_UNROLL _Pragma("GCC unroll 8")
#endif

namespace merge3 {

template <class F>
struct Lanes;

template <>
struct Lanes<float> {
  using U = uint32_t;
  using I = int32_t;
};

template <class T>
MERGE3_HD T same(float x);
template <class T>
MERGE3_HD T same(uint32_t x);
template <class T>
MERGE3_HD T same(int32_t x);
template <>
MERGE3_HD float same<float>(float x) { return x; }
template <>
MERGE3_HD uint32_t same<uint32_t>(uint32_t x) { return x; }
template <>
MERGE3_HD int32_t same<int32_t>(int32_t x) { return x; }

MERGE3_HD uint32_t as_uint(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
MERGE3_HD float as_float(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}
MERGE3_HD float positive_part(float x) { return x > 0.0f ? x : 0.0f; }  // NaN: 0
MERGE3_HD float add_where(bool mask, float sum, float x) { return sum + (mask ? x : 0.0f); }
MERGE3_HD float to_float(int32_t i) { return float(i); }

template <class T>
MERGE3_HD T select(bool mask, T a, T b) { return mask ? a : b; }

MERGE3_HD void multiply_wide(uint32_t a, uint32_t b, uint32_t& hi, uint32_t& lo) {
  const uint64_t product = uint64_t(a) * b;
  hi = uint32_t(product >> 32), lo = uint32_t(product);
}

#if !defined(__CUDACC__)
// Eight lanes fill an AVX register and sixteen an AVX-512 one; other targets split them, at no cost.
#define MERGE3_VECTOR_LANES(N)                                                                       \
  typedef float f32x##N __attribute__((vector_size(4 * N)));                                         \
  typedef uint32_t u32x##N __attribute__((vector_size(4 * N)));                                      \
  typedef int32_t i32x##N __attribute__((vector_size(4 * N)));                                       \
  typedef uint16_t u16x##N __attribute__((vector_size(2 * N)));                                      \
  template <>                                                                                        \
  struct Lanes<f32x##N> {                                                                            \
    using U = u32x##N;                                                                               \
    using I = i32x##N;                                                                               \
    using H = u16x##N;                                                                               \
  };                                                                                                 \
  template <>                                                                                        \
  MERGE3_HD f32x##N same<f32x##N>(float x) { return x - f32x##N{}; }                                 \
  template <>                                                                                        \
  MERGE3_HD u32x##N same<u32x##N>(uint32_t x) { return x - u32x##N{}; }                              \
  template <>                                                                                        \
  MERGE3_HD i32x##N same<i32x##N>(int32_t x) { return x - i32x##N{}; }                               \
  MERGE3_HD u32x##N as_uint(f32x##N x) { return (u32x##N)x; }                                        \
  MERGE3_HD f32x##N as_float(u32x##N u) { return (f32x##N)u; }                                       \
  MERGE3_HD f32x##N to_float(i32x##N i) { return __builtin_convertvector(i, f32x##N); }              \
  MERGE3_HD f32x##N select(i32x##N mask, f32x##N a, f32x##N b) { return mask ? a : b; }              \
  MERGE3_HD u32x##N select(i32x##N mask, u32x##N a, u32x##N b) { return mask ? a : b; }              \
  MERGE3_HD i32x##N select(i32x##N mask, i32x##N a, i32x##N b) { return mask ? a : b; }
MERGE3_VECTOR_LANES(8)
MERGE3_VECTOR_LANES(16)
#undef MERGE3_VECTOR_LANES

MERGE3_HD f32x8 add_where(i32x8 mask, f32x8 sum, f32x8 x) { return sum + (mask ? x : f32x8{}); }
MERGE3_HD f32x16 add_where(i32x16 mask, f32x16 sum, f32x16 x) { return mask ? sum + x : sum; }  // one masked add

MERGE3_HD f32x8 positive_part(f32x8 x) {
#if defined(__AVX2__)
  return (f32x8)_mm256_max_ps((__m256)x, _mm256_setzero_ps());
#else
  return select(x > f32x8{}, x, f32x8{});
#endif
}
#if defined(__AVX512F__)
MERGE3_HD f32x16 positive_part(f32x16 x) { return (f32x16)_mm512_max_ps((__m512)x, _mm512_setzero_ps()); }
#endif

MERGE3_HD void multiply_wide(u32x8 a, uint32_t b, u32x8& hi, u32x8& lo) {
#if defined(__AVX2__)
  const __m256i x = (__m256i)a, y = _mm256_set1_epi32(int(b));
  const __m256i even = _mm256_mul_epu32(x, y), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), y);
  lo = (u32x8)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  hi = (u32x8)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
#else
  for (int j = 0; j < 8; ++j) {
    const uint64_t product = uint64_t(a[j]) * b;
    hi[j] = uint32_t(product >> 32), lo[j] = uint32_t(product);
  }
#endif
}
#if defined(__AVX512F__)
MERGE3_HD void multiply_wide(u32x16 a, uint32_t b, u32x16& hi, u32x16& lo) {
  const __m512i x = (__m512i)a, y = _mm512_set1_epi32(int(b));
  const __m512i even = _mm512_mul_epu32(x, y), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), y);
  lo = (u32x16)_mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
  hi = (u32x16)_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
}
#endif
#endif

}  // namespace merge3
