// The methods with a per-element rule of their own, on a GPU: one block per chunk.
// Moves (K + 1) reads + 1 write per element.
#include "launch.cuh"

namespace merge3 {
namespace {

struct Args {
  const merge3_tensor* table;
  const float *scalars, *per_expert;
  const int64_t* first;
  int64_t tensors;
  int32_t rule, experts;
};

__global__ void __launch_bounds__(kThreads) elementwise_kernel(Args a) {
  const int64_t t = tensor_of_chunk(a.first, a.tensors, blockIdx.x);
  const merge3_tensor& tensor = a.table[t];
  const int64_t begin = (int64_t(blockIdx.x) - a.first[t]) * kChunk;
  const int64_t end = begin + kChunk < tensor.numel ? begin + kChunk : tensor.numel;
  const float scalar = a.scalars[t];
  const float* weight = a.per_expert + t * a.experts;
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
    const float theta = load1(tensor.dtype, tensor.base, i);
    float e[MERGE3_MAX_EXPERTS];
#pragma unroll
    for (int k = 0; k < MERGE3_MAX_EXPERTS; ++k)
      e[k] = k < a.experts ? load1(tensor.dtype, tensor.experts[k], i) : 0.0f;
    float out;
    switch (a.rule) {
      case MERGE3_NEARSWAP: out = nearswap(theta, e[0], scalar); break;
      case MERGE3_ARCEE_FUSION:
        out = arcee_fusion(theta, e[0], tensor.rank_tables[0][i / tensor.columns], scalar);
        break;
      case MERGE3_UNIFY: out = unify(theta, e, a.experts); break;
      case MERGE3_RAM: out = ram(theta, e, a.experts, scalar, weight); break;
      default: out = sce(theta, e, a.experts, scalar, weight); break;
    }
    if (tensor.out_dtype == MERGE3_FLOAT32) static_cast<float*>(tensor.out)[i] = out;
    else
      static_cast<uint16_t*>(tensor.out)[i] =
          tensor.out_dtype == MERGE3_BFLOAT16 ? uint16_t(float_to_bfloat16(as_uint(out))) : float_to_float16(out);
  }
}

}  // namespace

int elementwise_cuda(int32_t rule, int32_t experts, int64_t tensors, const merge3_tensor* table,
                     const float* scalars, const float* per_expert, void* raw_stream) {
  const auto stream = static_cast<cudaStream_t>(raw_stream);
  const Chunks chunks(table, tensors);
  const size_t count = size_t(tensors);
  DeviceArray<merge3_tensor> device_table(table, count, stream);
  DeviceArray<float> device_scalars(scalars, count, stream);
  DeviceArray<float> device_weights(per_expert, count * size_t(experts), stream);
  DeviceArray<int64_t> first(chunks.first, size_t(tensors) + 1, stream);
  MERGE3_TRY(device_table.status);
  MERGE3_TRY(device_scalars.status);
  MERGE3_TRY(device_weights.status);
  MERGE3_TRY(first.status);
  const Args args{device_table.get(), device_scalars.get(), device_weights.get(), first.get(), tensors, rule, experts};
  return launch(elementwise_kernel, chunks.count(), stream, args);
}

}  // namespace merge3
