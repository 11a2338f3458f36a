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
MERGE3_HD float to_float(int32_t i) { return float(i); }

template <class T>
MERGE3_HD T select(bool mask, T a, T b) { return mask ? a : b; }

MERGE3_HD void multiply_wide(uint32_t a, uint32_t b, uint32_t& hi, uint32_t& lo) {
  const uint64_t product = uint64_t(a) * b;
  hi = uint32_t(product >> 32), lo = uint32_t(product);
}

#if !defined(__CUDACC__)
// Eight lanes: one AVX register; other targets split it, which costs nothing here.
typedef float f32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));

template <>
struct Lanes<f32x8> {
  using U = u32x8;
  using I = i32x8;
};
template <>
MERGE3_HD f32x8 same<f32x8>(float x) { return f32x8{x, x, x, x, x, x, x, x}; }
template <>
MERGE3_HD u32x8 same<u32x8>(uint32_t x) { return u32x8{x, x, x, x, x, x, x, x}; }
template <>
MERGE3_HD i32x8 same<i32x8>(int32_t x) { return i32x8{x, x, x, x, x, x, x, x}; }
MERGE3_HD u32x8 as_uint(f32x8 x) { return (u32x8)x; }
MERGE3_HD f32x8 as_float(u32x8 u) { return (f32x8)u; }
MERGE3_HD f32x8 to_float(i32x8 i) { return __builtin_convertvector(i, f32x8); }
MERGE3_HD f32x8 select(i32x8 mask, f32x8 a, f32x8 b) { return mask ? a : b; }
MERGE3_HD u32x8 select(i32x8 mask, u32x8 a, u32x8 b) { return mask ? a : b; }
MERGE3_HD i32x8 select(i32x8 mask, i32x8 a, i32x8 b) { return mask ? a : b; }

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
#endif

}  // namespace merge3
