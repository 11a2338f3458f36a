// Gradient of the merge with respect to its coefficients on a GPU: a block per chunk, its threads' sums added in
// a fixed order. The host adds up the chunks, so this call waits for them.
#include "../backward.h"

#include "../dispatch.h"
#include "launch.cuh"

namespace merge3 {
namespace {

struct Args {
  const merge3_tensor* table;
  const merge3_coefficient* coefficients;
  const float* lambda;
  const int64_t* first;
  int64_t tensors;
  merge3_modes modes;
  double* partial;  // [chunks, 2 K + 1]
};

template <int K>
__global__ void __launch_bounds__(kThreads, 1) backward_kernel(Args a) {
  __shared__ double shared[kThreads];
  const int64_t t = tensor_of_chunk(a.first, a.tensors, blockIdx.x);
  const merge3_tensor& tensor = a.table[t];
  const int64_t begin = (int64_t(blockIdx.x) - a.first[t]) * kChunk;
  const int64_t end = begin + kChunk < tensor.numel ? begin + kChunk : tensor.numel;
  const merge3_coefficient* c = a.coefficients + t * K;
  const auto p = prepare<float, K>(c, a.lambda[t], tensor.base != nullptr);
  const auto bounds = make_bounds<K>(c);
  double sums[2 * K + 1] = {};
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
    const float g = load1(tensor.out_dtype, tensor.out, i), theta = load1(tensor.dtype, tensor.base, i);
    const int64_t whole = tensor.offset + i;
    float expert[K];
    int32_t draw[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      expert[k] = load1(tensor.dtype, tensor.experts[k], i);
      draw[k] = draws(a.modes) ? draw_of(draws_of(tensor, whole, k, a.modes, c[k]), whole) : 0;
    }
    backward_element<K>(tensor, a.modes, c, p, bounds, whole, g, theta, expert, draw, sums);
  }
#pragma unroll
  for (int s = 0; s < 2 * K + 1; ++s) {
    shared[threadIdx.x] = sums[s];
    __syncthreads();
    for (int half = kThreads / 2; half > 0; half /= 2) {
      if (int(threadIdx.x) < half) shared[threadIdx.x] += shared[threadIdx.x + half];
      __syncthreads();
    }
    if (threadIdx.x == 0) a.partial[int64_t(blockIdx.x) * (2 * K + 1) + s] = shared[0];
    __syncthreads();
  }
}

}  // namespace

int backward_cuda(const merge3_modes& modes, int64_t tensors, const merge3_tensor* table,
                  const merge3_coefficient* coefficients, const float* lambda, double* partial, void* raw_stream) {
  const auto stream = static_cast<cudaStream_t>(raw_stream);
  const Chunks chunks(table, tensors);
  const size_t count = size_t(tensors);
  DeviceArray<merge3_tensor> device_table(table, count, stream);
  DeviceArray<merge3_coefficient> device_coefficients(coefficients, count * size_t(modes.experts), stream);
  DeviceArray<float> device_lambda(lambda, count, stream);
  DeviceArray<int64_t> first(chunks.first, count + 1, stream);
  DeviceArray<double> device_partial(size_t(chunks.count() * (2 * modes.experts + 1)), stream);
  MERGE3_TRY(device_table.status);
  MERGE3_TRY(device_coefficients.status);
  MERGE3_TRY(device_lambda.status);
  MERGE3_TRY(first.status);
  MERGE3_TRY(device_partial.status);
  const Args args{device_table.get(), device_coefficients.get(), device_lambda.get(), first.get(), tensors, modes,
                  device_partial.get()};
  cudaError_t status = cudaErrorInvalidValue;
  dispatch_experts(modes.experts, [&](auto k) {
    status = launch(backward_kernel<decltype(k)::value>, chunks.count(), stream, args);
  });
  MERGE3_TRY(status);
  return device_partial.read(partial);
}

}  // namespace merge3
