// What the files of a fused merge (merge_1.cu .. merge_8.cu, general.cu) take, and give to merge.cu.
#pragma once
#include "../dispatch.h"
#include "launch.cuh"

namespace merge3 {

struct MergeArgs {
  Work work;
  const merge3_coefficient* coefficients;
  const float* lambda;
  merge3_modes modes;
};

// Blocks of tensors that are whole groups of eight elements of one dtype, at addresses that are multiples of 16 bytes.
template <int K>
cudaError_t merge_experts(int32_t dtype, int64_t blocks, cudaStream_t stream, const MergeArgs& args);
// Any blocks, any modes.
cudaError_t merge_general(int64_t blocks, cudaStream_t stream, const MergeArgs& args);

}  // namespace merge3
