// merge.cuh for 7 experts: a file of its own, so that they compile at the same time.
#include "merge.cuh"

namespace merge3 {
template cudaError_t merge_experts<7>(int32_t, int64_t, cudaStream_t, const MergeArgs&);
}  // namespace merge3
