// A part of an expert that is held in int8: base + scale[row] * byte. Included once per instruction set.
#pragma once
#include <algorithm>

#include "../include/merge3/compact.h"
#include "storage.h"

#if !defined(MERGE3_BYTES_ENTRY)
#define MERGE3_BYTES_ENTRY add_bytes_generic  // in compact.cpp
#endif

namespace merge3 {

// Elements [begin, begin + n).
void MERGE3_BYTES_ENTRY(const merge3_compact& compact, int32_t dtype, const void* base, int64_t begin, int64_t n, char* to) {
  constexpr int kBlock = 512;
  alignas(64) float theta[kBlock];
  const int8_t* bytes = static_cast<const int8_t*>(compact.values) + begin;
  for (int64_t from = 0; from < n; from += kBlock) {
    const int m = int(std::min<int64_t>(n - from, kBlock));
    load_block(dtype, base, begin + from, m, theta);
    for (int j = 0; j < m;) {  // row by row
      const int64_t element = begin + from + j, row = element / compact.columns;
      const int until = j + int(std::min<int64_t>(m - j, (row + 1) * compact.columns - element));
      const float scale = compact.scales[row];
#if defined(__AVX2__)
      for (; j + 8 <= until; j += 8) {
        const __m128i own = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + from + j));
        const __m256 step = _mm256_mul_ps(_mm256_set1_ps(scale), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(own)));
        _mm256_storeu_ps(theta + j, _mm256_add_ps(_mm256_loadu_ps(theta + j), step));
      }
#endif
      for (; j < until; ++j) theta[j] += scale * float(bytes[from + j]);
    }
    store_block(dtype, to, from, m, theta, false);
  }
}

}  // namespace merge3
