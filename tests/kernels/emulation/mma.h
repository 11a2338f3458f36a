// Warp matrix operations, emulated: every lane holds the whole fragment and does the whole product, which gives
// each what the warp would share.
#pragma once
#include <stdint.h>
#include <string.h>

#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace nvcuda::wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };

template <class Use, int M, int N, int K, class T, class Layout = row_major>
struct fragment {
  float x[16][16];
};

template <class Use, class T>
void fill_fragment(fragment<Use, 16, 16, 16, T>& to, float value) {
  for (auto& row : to.x)
    for (float& x : row) x = value;
}
template <class Use, class T, class Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& to, const T* from, unsigned stride) {
  const bool turned = __is_same(Layout, col_major);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) to.x[i][j] = float(turned ? from[j * stride + i] : from[i * stride + j]);
}
template <class T, class LayoutA, class LayoutB>
void mma_sync(fragment<accumulator, 16, 16, 16, float>& to, const fragment<matrix_a, 16, 16, 16, T, LayoutA>& a,
              const fragment<matrix_b, 16, 16, 16, T, LayoutB>& b, const fragment<accumulator, 16, 16, 16, float>& c) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) {
      float sum = c.x[i][j];
      for (int k = 0; k < 16; ++k) sum += a.x[i][k] * b.x[k][j];
      to.x[i][j] = sum;
    }
}
inline void store_matrix_sync(float* to, const fragment<accumulator, 16, 16, 16, float>& from, unsigned stride, layout_t) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) to[i * stride + j] = from.x[i][j];
}

}  // namespace nvcuda::wmma
