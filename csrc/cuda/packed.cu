// Merges whose keeps, or whole task vectors, are one bit per element, on a GPU; and the making of those bits.
#include "../dispatch.h"
#include "launch.cuh"

namespace merge3 {
namespace {

struct MergeArgs {
  const merge3_tensor* table;
  const merge3_coefficient* coefficients;
  const float* lambda;
  const int64_t* first;
  int64_t tensors;
  merge3_modes modes;
};

template <int K>
__global__ void __launch_bounds__(kThreads, 1) packed_kernel(MergeArgs a) {
  const int64_t t = tensor_of_chunk(a.first, a.tensors, blockIdx.x);
  const merge3_tensor& tensor = a.table[t];
  const int64_t begin = (int64_t(blockIdx.x) - a.first[t]) * kChunk;
  const int64_t end = begin + kChunk < tensor.numel ? begin + kChunk : tensor.numel;
  const auto p = prepare<float, K>(a.coefficients + t * K, a.lambda[t], tensor.base != nullptr);
  const bool reads = a.modes.sparsify == MERGE3_KEEP_MASK;
  for (int64_t i = begin + int64_t(threadIdx.x) * 8; i < end; i += int64_t(blockDim.x) * 8) {
    const int n = end - i < 8 ? int(end - i) : 8;
    const int64_t element = tensor.offset + i;
    float theta[8], expert[K][8], out[8];
    uint32_t bits[K];
    load8(tensor.dtype, tensor.base, i, n, theta);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      load8(tensor.dtype, reads ? tensor.experts[k] : nullptr, i, n, expert[k]);
      bits[k] = tensor.masks[k][element / 32] >> (element % 32);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float e[K];
      bool bit[K];
#pragma unroll
      for (int k = 0; k < K; ++k) e[k] = expert[k][j], bit[k] = (bits[k] >> j & 1u) != 0;
      out[j] = packed_element<K>(theta[j], e, bit, p, a.modes);
    }
    store8(tensor.out_dtype, tensor.out, i, n, out);
  }
}

struct PackArgs {
  const merge3_tensor* table;
  const int64_t* first;
  int64_t tensors;
  int32_t packing, experts;
  double* partial;  // [chunks, K, 2]
};

// A thread makes whole words, so that no two write to one.
__global__ void __launch_bounds__(kThreads, 1) pack_kernel(PackArgs a) {
  __shared__ double shared[2][kThreads];
  const int64_t t = tensor_of_chunk(a.first, a.tensors, blockIdx.x);
  const merge3_tensor& tensor = a.table[t];
  const int64_t begin = (int64_t(blockIdx.x) - a.first[t]) * kChunk;
  const int64_t end = begin + kChunk < tensor.numel ? begin + kChunk : tensor.numel;
  for (int k = 0; k < a.experts; ++k) {
    double all = 0.0, set = 0.0;
    for (int64_t i = begin + int64_t(threadIdx.x) * 32; i < end; i += int64_t(blockDim.x) * 32) {
      uint32_t word = 0;
      for (int part = 0; part < 32 && i + part < end; part += 8) {
        const int n = end - i - part < 8 ? int(end - i - part) : 8;
        float theta[8], expert[8], unified[8];
        load8(tensor.dtype, tensor.base, i + part, n, theta);
        load8(tensor.dtype, tensor.experts[k], i + part, n, expert);
        load8(tensor.out_dtype, a.packing == MERGE3_PACK_AGREEMENT ? tensor.out : nullptr, i + part, n, unified);
        for (int j = 0; j < n; ++j)
          word |= uint32_t(packed_bit(a.packing, theta[j], expert[j], unified[j], all, set)) << (part + j);
      }
      const_cast<uint32_t*>(tensor.masks[k])[i / 32] = word;
    }
    shared[0][threadIdx.x] = all, shared[1][threadIdx.x] = set;
    __syncthreads();
    for (int half = kThreads / 2; half > 0; half /= 2) {
      if (int(threadIdx.x) < half)
        for (int s = 0; s < 2; ++s) shared[s][threadIdx.x] += shared[s][threadIdx.x + half];
      __syncthreads();
    }
    if (threadIdx.x == 0)
      for (int s = 0; s < 2; ++s) a.partial[(int64_t(blockIdx.x) * a.experts + k) * 2 + s] = shared[s][0];
    __syncthreads();
  }
}

}  // namespace

int packed_cuda(const merge3_modes& modes, int64_t tensors, int64_t chunks, const merge3_tensor* table, const int64_t* first,
                const merge3_coefficient* coefficients, const float* lambda, void* stream) {
  const MergeArgs args{table, coefficients, lambda, first, tensors, modes};
  cudaError_t status = cudaErrorInvalidValue;
  dispatch_experts(modes.experts, [&](auto k) {
    status = launch(packed_kernel<decltype(k)::value>, chunks, static_cast<cudaStream_t>(stream), args);
  });
  return status;
}

int pack_cuda(int32_t packing, int32_t experts, int64_t tensors, const merge3_tensor* table, double* partial, void* raw_stream) {
  const auto stream = static_cast<cudaStream_t>(raw_stream);
  const Chunks chunks(table, tensors);
  DeviceArray<merge3_tensor> device_table(table, size_t(tensors), stream);
  DeviceArray<int64_t> first(chunks.first, size_t(tensors) + 1, stream);
  DeviceArray<double> device_partial(size_t(chunks.count() * experts * 2), stream);
  MERGE3_TRY(device_table.status);
  MERGE3_TRY(first.status);
  MERGE3_TRY(device_partial.status);
  const PackArgs args{device_table.get(), first.get(), tensors, packing, experts, device_partial.get()};
  MERGE3_TRY(launch(pack_kernel, chunks.count(), stream, args));
  return device_partial.read(partial);
}

}  // namespace merge3
