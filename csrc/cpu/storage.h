// Between a tensor's storage dtype and float32 lanes, and results out of a block buffer.
#pragma once
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../floats16.h"
#include "../merge_math.h"

namespace merge3 {

struct Float32 {};
struct Float16 {};
struct BFloat16 {};

template <class T>
MERGE3_HD f32x8 load8(const void* data, int64_t i);
template <>
MERGE3_HD f32x8 load8<Float32>(const void* data, int64_t i) {
  f32x8 x;
  memcpy(&x, static_cast<const float*>(data) + i, sizeof x);
  return x;
}
template <>
MERGE3_HD f32x8 load8<BFloat16>(const void* data, int64_t i) {
  u16x8 x;
  memcpy(&x, static_cast<const uint16_t*>(data) + i, sizeof x);
  return as_float(__builtin_convertvector(x, u32x8) << 16);
}
template <>
MERGE3_HD f32x8 load8<Float16>(const void* data, int64_t i) {
#if defined(__F16C__)
  __m128i x;
  memcpy(&x, static_cast<const uint16_t*>(data) + i, sizeof x);
  return (f32x8)_mm256_cvtph_ps(x);
#else
  f32x8 x;
  for (int j = 0; j < 8; ++j) x[j] = float16_to_float(static_cast<const uint16_t*>(data)[i + j]);
  return x;
#endif
}

template <class T>
MERGE3_HD float load1(const void* data, int64_t i);
template <>
MERGE3_HD float load1<Float32>(const void* data, int64_t i) { return static_cast<const float*>(data)[i]; }
template <>
MERGE3_HD float load1<BFloat16>(const void* data, int64_t i) {
  return bfloat16_to_float(static_cast<const uint16_t*>(data)[i]);
}
template <>
MERGE3_HD float load1<Float16>(const void* data, int64_t i) {
  return float16_to_float(static_cast<const uint16_t*>(data)[i]);
}

// The next n floats of a tensor, any dtype, for the operations that are not bandwidth bound.
template <class T>
MERGE3_HD void load_run(const void* data, int64_t i, int n, float* to) {
  int j = 0;
  for (; j + 8 <= n; j += 8) {
    const f32x8 x = load8<T>(data, i + j);
    memcpy(to + j, &x, sizeof x);
  }
  for (; j < n; ++j) to[j] = load1<T>(data, i + j);
}
MERGE3_HD void load_block(int32_t dtype, const void* data, int64_t i, int n, float* to) {
  if (data == nullptr) memset(to, 0, sizeof(float) * size_t(n));
  else if (dtype == MERGE3_FLOAT32) load_run<Float32>(data, i, n, to);
  else if (dtype == MERGE3_BFLOAT16) load_run<BFloat16>(data, i, n, to);
  else load_run<Float16>(data, i, n, to);
}

// A store past the caches, to an address aligned to the vector.
#if defined(__AVX2__)
MERGE3_HD void stream_store(void* to, u32x8 x) { _mm256_stream_si256(static_cast<__m256i*>(to), (__m256i)x); }
#endif
#if defined(__AVX512F__)
MERGE3_HD void stream_store(void* to, u32x16 x) { _mm512_stream_si512(static_cast<__m512i*>(to), (__m512i)x); }
#endif

#if defined(__AVX2__)
// Rounds two float32 vectors to bfloat16, to nearest even, and lays them side by side: the lower half of each lane from
// `even`. Where the cut-off half, plus one if the result would be odd, is over a half of its range, one is added.
MERGE3_HD u32x8 pair_bfloat16(u32x8 even, u32x8 odd) {
  const __m256i e = (__m256i)even, o = (__m256i)odd;
  const __m256i upper = _mm256_blend_epi16(_mm256_srli_epi32(e, 16), o, 0xAA);
  const __m256i lower = _mm256_blend_epi16(e, _mm256_slli_epi32(o, 16), 0xAA);
  const __m256i sum = _mm256_adds_epu16(lower, _mm256_and_si256(upper, _mm256_set1_epi16(1)));
  const __m256i over = _mm256_cmpgt_epi16(_mm256_xor_si256(sum, _mm256_set1_epi16(-0x8000)), _mm256_setzero_si256());
  return (u32x8)_mm256_sub_epi16(upper, over);
}
#endif
#if defined(__AVX512F__)
MERGE3_HD u32x16 pair_bfloat16(u32x16 even, u32x16 odd) {
  const __m512i e = (__m512i)even, o = (__m512i)odd;
  const __m512i upper = _mm512_mask_blend_epi16(0xAAAAAAAAu, _mm512_srli_epi32(e, 16), o);
  const __m512i lower = _mm512_mask_blend_epi16(0xAAAAAAAAu, e, _mm512_slli_epi32(o, 16));
  const __m512i sum = _mm512_adds_epu16(lower, _mm512_and_si512(upper, _mm512_set1_epi16(1)));
  return (u32x16)_mm512_mask_sub_epi16(upper, _mm512_cmpgt_epu16_mask(sum, _mm512_set1_epi16(-0x8000)), upper, _mm512_set1_epi16(-1));
}
#endif

// Writes n floats to out[i..]. `stream` bypasses the caches: a model larger than them is not read
// back soon, and an ordinary store would first fetch the line it is about to overwrite.
MERGE3_HD void store_block(int32_t dtype, void* out, int64_t i, int n, const float* from, bool stream) {
  (void)stream;
  int j = 0;
  if (dtype == MERGE3_FLOAT32) {
    float* to = static_cast<float*>(out) + i;
#if defined(__AVX2__)
    if (stream && (reinterpret_cast<uintptr_t>(to) & 31) == 0)
      for (; j + 8 <= n; j += 8) _mm256_stream_ps(to + j, _mm256_loadu_ps(from + j));
#endif
    memcpy(to + j, from + j, sizeof(float) * size_t(n - j));
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(out) + i;
#if defined(__AVX2__)
  const bool aligned = (reinterpret_cast<uintptr_t>(to) & 31) == 0;
  for (; j + 16 <= n; j += 16) {
    f32x8 a, b;
    memcpy(&a, from + j, sizeof a);
    memcpy(&b, from + j + 8, sizeof b);
    __m256i packed;
    if (dtype == MERGE3_BFLOAT16) {
      packed = _mm256_packus_epi32((__m256i)float_to_bfloat16(as_uint(a)),
                                   (__m256i)float_to_bfloat16(as_uint(b)));
      packed = _mm256_permute4x64_epi64(packed, 0xD8);
    } else {
#if defined(__F16C__)
      packed = _mm256_set_m128i(_mm256_cvtps_ph((__m256)b, 0), _mm256_cvtps_ph((__m256)a, 0));
#else
      break;
#endif
    }
    if (stream && aligned) _mm256_stream_si256(reinterpret_cast<__m256i*>(to + j), packed);
    else _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + j), packed);
  }
#endif
  for (; j < n; ++j)
    to[j] = dtype == MERGE3_BFLOAT16 ? uint16_t(float_to_bfloat16(as_uint(from[j]))) : float_to_float16(from[j]);
}

}  // namespace merge3
