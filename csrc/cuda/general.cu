// The fused merge of anything that merge.cuh does not take: mixed dtypes, addresses that are no multiple of 16 bytes, the
// end of a tensor that is no multiple of eight elements, elected signs of packed experts. One element a thread at a
// time, every mode a number known at run time: for the few tensors of a model that need it, not for speed.
#include "../backward.h"
#include "merge_launch.cuh"

namespace merge3 {
namespace {

template <int K>
__global__ void __launch_bounds__(kThreads, 1) general_kernel(const MergeArgs a) {
  const Span span = span_of(a.work);
  const merge3_tensor& tensor = span.tensor;
  const merge3_coefficient* c = a.coefficients + span.t * K;
  const auto p = prepare<float, K>(c, a.lambda[span.t], tensor.base != nullptr);
  const auto bounds = make_bounds<K>(c);
  const int32_t sparsify = a.modes.sparsify;
  const bool signs = sparsify == MERGE3_SIGNS, packed = signs || sparsify == MERGE3_KEEP_MASK;
  for (int64_t i = span.begin + threadIdx.x; i < span.end; i += kThreads) {
    const int64_t whole = tensor.offset + i;
    const int32_t hash = tie_hash(whole, tensor.id);
    const float theta = load1(tensor.dtype, tensor.base, i);
    float change[K];
    Keep<float, K> keep;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const float expert = load1(tensor.dtype, signs ? nullptr : tensor.experts[k], i);
      if (packed) {
        const bool bit = (tensor.masks[k][whole / 32] >> (whole % 32) & 1) != 0;
        change[k] = signs ? packed_change<true>(theta, expert, bit, p.scale[k]) : packed_change<false>(theta, expert, bit, p.scale[k]);
        continue;
      }
      const int32_t draw = draws(a.modes) ? draw_of(draws_of(tensor, whole, k, a.modes, c[k]), whole) : 0;
      decide(tensor, sparsify, c[k], bounds, k, whole, hash, draw, keep);
      const float tau = expert - theta;
      change[k] = keeps(tau, k, keep, sparsify) ? tau * p.scale[k] : 0.0f;
    }
    store1(tensor.out_dtype, tensor.out, i, elect_any<K>(theta, change, p, a.modes.elect, a.modes.normalize != 0));
  }
}

}  // namespace

cudaError_t merge_general(int64_t blocks, cudaStream_t stream, const MergeArgs& args) {
  cudaError_t status = cudaErrorInvalidValue;
  dispatch_experts(args.modes.experts, [&](auto k) { status = launch(general_kernel<decltype(k)::value>, blocks, stream, args); });
  return status;
}

}  // namespace merge3
