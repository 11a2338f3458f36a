// The fused merge on a GPU: one launch for each kernel that a table needs, one for a model of one dtype.
#include "../plan.h"
#include "merge_launch.cuh"

namespace merge3 {

int merge_resident_cuda(const merge3_modes& modes, const merge3_plan& plan, const merge3_tensor* table,
                        const merge3_block* blocks, const merge3_coefficient* coefficients, const float* lambda,
                        void* raw_stream) {
  const auto stream = static_cast<cudaStream_t>(raw_stream);
  MergeArgs args{{table, blocks}, coefficients, lambda, modes};
  // Signs of packed experts are hardly ever elected, so only the general kernel can.
  if (modes.sparsify > MERGE3_KEEP_BAND && modes.elect != MERGE3_ELECT_NONE)
    return merge_general(count_blocks(plan), stream, args);
  MERGE3_TRY(merge_general(plan.blocks[0], stream, args));
  for (int32_t dtype = 0; dtype + 1 < MERGE3_MERGE_KERNELS; ++dtype) {
    args.work.blocks += plan.blocks[dtype];
    const int64_t count = plan.blocks[1 + dtype];
    cudaError_t status = cudaErrorInvalidValue;
    dispatch_experts(modes.experts, [&](auto k) { status = merge_experts<decltype(k)::value>(dtype, count, stream, args); });
    MERGE3_TRY(status);
  }
  return cudaSuccess;
}

int merge_cuda(const merge3_modes& modes, int64_t tensors, const merge3_tensor* table,
               const merge3_coefficient* coefficients, const float* lambda, void* raw_stream) {
  std::vector<merge3_block> blocks(size_t(count_blocks(plan_merge(modes, tensors, table, nullptr))));
  const merge3_plan plan = plan_merge(modes, tensors, table, blocks.data());
  Upload upload(static_cast<cudaStream_t>(raw_stream));
  const auto work = upload.add_work(table, tensors, blocks);
  const auto numbers = upload.add(coefficients, size_t(tensors * modes.experts));
  const auto scales = upload.add(lambda, size_t(tensors));
  MERGE3_TRY(upload.send());
  const Work at = upload.at(work);
  return merge_resident_cuda(modes, plan, at.table, at.blocks, upload.at(numbers), upload.at(scales), raw_stream);
}

}  // namespace merge3
