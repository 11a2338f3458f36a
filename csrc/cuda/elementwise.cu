// The methods with a per-element rule of their own, on a GPU: one block per chunk.
// Moves (K + 1) reads + 1 write per element.
#include "../plan.h"
#include "launch.cuh"

namespace merge3 {
namespace {

struct Args {
  Work work;
  const float *scalars, *per_expert;
  int32_t rule, experts;
};

__global__ void __launch_bounds__(kThreads) elementwise_kernel(Args a) {
  const Span span = span_of(a.work);
  const merge3_tensor& tensor = span.tensor;
  const float scalar = a.scalars[span.t];
  const float* weight = a.per_expert + span.t * a.experts;
  for (int64_t i = span.begin + threadIdx.x; i < span.end; i += kThreads) {
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
    store1(tensor.out_dtype, tensor.out, i, out);
  }
}

}  // namespace

int elementwise_cuda(int32_t rule, int32_t experts, int64_t tensors, const merge3_tensor* table,
                     const float* scalars, const float* per_expert, void* raw_stream) {
  const auto stream = static_cast<cudaStream_t>(raw_stream);
  const std::vector<merge3_block> blocks = list_blocks(table, tensors);
  Upload upload(stream);
  const auto work = upload.add_work(table, tensors, blocks);
  const auto numbers = upload.add(scalars, size_t(tensors));
  const auto weights = upload.add(per_expert, size_t(tensors) * size_t(experts));
  MERGE3_TRY(upload.send());
  const Args args{upload.at(work), upload.at(numbers), upload.at(weights), rule, experts};
  return launch(elementwise_kernel, int64_t(blocks.size()), stream, args);
}

}  // namespace merge3
