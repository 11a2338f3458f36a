// y = x W^T where W is a merge that is never written: a tile of it is merged into shared memory, fed to the
// tensor cores, and forgotten.
//
// A block makes 128 x 64 of y. Weights are merged anew for every 128 rows of x, so this pays where x has few rows
// (scoring one batch of a candidate): then it reads (K + 1) times the weights and writes nothing but y, where a
// swap followed by a product also writes and reads the merged weights. WMMA, not CUTLASS: at so few rows the
// product is bound by those reads, and this source has no dependency and runs on the CPU in the tests.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <mma.h>

#include "../backward.h"
#include "../dispatch.h"
#include "launch.cuh"

namespace merge3 {
namespace {

namespace wmma = nvcuda::wmma;

constexpr int kRows = 128, kColumns = 64, kDepth = 32, kPad = 8;  // of y, of y, of the sum; padding against bank conflicts
constexpr int kStride = kDepth + kPad;

struct Args {
  merge3_tensor tensor;
  merge3_coefficient c[MERGE3_MAX_EXPERTS];
  merge3_modes modes;
  float lambda;
  const void *x, *bias;
  void* y;
  int64_t rows, columns, depth;  // x: [rows, depth]; W: [columns, depth]
};

template <class T>
__device__ inline void store_bits(T* to, const float (&from)[8], int32_t dtype) {
  auto* bits = reinterpret_cast<uint16_t*>(to);
#pragma unroll
  for (int j = 0; j < 8; ++j)
    bits[j] = dtype == MERGE3_BFLOAT16 ? uint16_t(float_to_bfloat16(as_uint(from[j]))) : float_to_float16(from[j]);
}

// Eight merged weights from element i on, n of them within the row.
template <int K>
__device__ void merge8(const Args& a, const Prepared<float, K>& p, const Bounds<K>& bounds, int64_t i, int n, float (&out)[8]) {
  const merge3_tensor& tensor = a.tensor;
  float theta[8], expert[K][8];
  Draws8 drawn[K];
  load8(tensor.dtype, tensor.base, i, n, theta);
#pragma unroll
  for (int k = 0; k < K; ++k) load8(tensor.dtype, tensor.experts[k], i, n, expert[k]);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int64_t whole = i + j;
    if (draws(a.modes) && (j == 0 || whole % 8 == 0)) {
#pragma unroll
      for (int k = 0; k < K; ++k) drawn[k] = draws_of(tensor, whole, k, a.modes, a.c[k]);
    }
    float c[K];
    Keep<float, K> keep;
    const int32_t hash = tie_hash(whole, tensor.id);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const float tau = expert[k][j] - theta[j];
      if (j < n) decide(tensor, a.modes.sparsify, a.c[k], bounds, k, whole, hash, draws(a.modes) ? draw_of(drawn[k], whole) : 0, keep);
      c[k] = j < n && keeps(tau, k, keep, a.modes.sparsify) ? tau * p.scale[k] : 0.0f;
    }
    out[j] = j < n ? elect_any<K>(theta[j], c, p, a.modes.elect, a.modes.normalize != 0) : 0.0f;
  }
}

template <int K, class T>
__global__ void __launch_bounds__(kThreads, 1) linear_kernel(Args a) {
  alignas(32) __shared__ T x_tile[kRows * kStride];
  alignas(32) __shared__ T w_tile[kColumns * kStride];
  alignas(32) __shared__ float out_tile[kRows * kColumns];
  const int64_t across = (a.columns + kColumns - 1) / kColumns;
  const int64_t first_row = int64_t(blockIdx.x) / across * kRows, first_column = int64_t(blockIdx.x) % across * kColumns;
  const auto p = prepare<float, K>(a.c, a.lambda, a.tensor.base != nullptr);
  const auto bounds = make_bounds<K>(a.c);
  const int thread = int(threadIdx.x), warp = thread / 32;
  const int warp_row = warp / 2 * 32, warp_column = warp % 2 * 32;  // 4 x 2 warps, each 32 x 32 of y
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum[2][2];
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 2; ++j) wmma::fill_fragment(sum[i][j], 0.0f);

  const int row = thread / 4, at = thread % 4 * 8;  // 64 rows of 32 elements, eight a thread
  for (int64_t depth = 0; depth < a.depth; depth += kDepth) {
    const int64_t left = a.depth - depth - at;
    const int n = left < 0 ? 0 : left < 8 ? int(left) : 8;
    float values[8];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t r = first_row + row + 64 * half;
      load8(a.tensor.dtype, a.x, r * a.depth + depth + at, r < a.rows ? n : 0, values);
      store_bits(x_tile + (row + 64 * half) * kStride + at, values, a.tensor.dtype);
    }
    const int64_t column = first_column + row;
    merge8<K>(a, p, bounds, column * a.depth + depth + at, column < a.columns ? n : 0, values);
    store_bits(w_tile + row * kStride + at, values, a.tensor.dtype);
    __syncthreads();
#pragma unroll
    for (int step = 0; step < kDepth; step += 16) {
      wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major> left_part[2];
      wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::col_major> right_part[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        wmma::load_matrix_sync(left_part[i], x_tile + (warp_row + 16 * i) * kStride + step, kStride);
        wmma::load_matrix_sync(right_part[i], w_tile + (warp_column + 16 * i) * kStride + step, kStride);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) wmma::mma_sync(sum[i][j], left_part[i], right_part[j], sum[i][j]);
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 2; ++j)
      wmma::store_matrix_sync(out_tile + (warp_row + 16 * i) * kColumns + warp_column + 16 * j, sum[i][j], kColumns, wmma::mem_row_major);
  __syncthreads();
  for (int e = thread; e < kRows * kColumns; e += kThreads) {
    const int64_t r = first_row + e / kColumns, column = first_column + e % kColumns;
    if (r >= a.rows || column >= a.columns) continue;
    const float value = out_tile[e] + load1(a.tensor.dtype, a.bias, column);
    static_cast<uint16_t*>(a.y)[r * a.columns + column] =
        a.tensor.dtype == MERGE3_BFLOAT16 ? uint16_t(float_to_bfloat16(as_uint(value))) : float_to_float16(value);
  }
}

}  // namespace

int linear_cuda(const merge3_modes& modes, const merge3_tensor& tensor, const merge3_coefficient* coefficients, float lambda,
                const void* x, int64_t rows, const void* bias, void* y, void* stream) {
  Args a{tensor, {}, modes, lambda, x, bias, y, rows, tensor.numel / tensor.columns, tensor.columns};
  for (int k = 0; k < modes.experts; ++k) a.c[k] = coefficients[k];
  const int64_t blocks = (rows + kRows - 1) / kRows * ((a.columns + kColumns - 1) / kColumns);
  cudaError_t status = cudaErrorInvalidValue;
  dispatch_experts(modes.experts, [&](auto experts) {
    constexpr int K = decltype(experts)::value;
    const auto on = static_cast<cudaStream_t>(stream);
    status = tensor.dtype == MERGE3_BFLOAT16 ? launch(linear_kernel<K, __nv_bfloat16>, blocks, on, a)
                                             : launch(linear_kernel<K, __half>, blocks, on, a);
  });
  return status;
}

}  // namespace merge3
