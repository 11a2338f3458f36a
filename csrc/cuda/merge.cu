// The fused merge on a GPU: one launch for the whole model, one block per chunk.
//
// Moves (K + 1) reads + 1 write per element in 16-byte accesses; each thread has K + 1 independent loads
// in flight before its first use of any. No atomics, no barriers. The arithmetic is merge_element, built
// without fused multiply-add, so the bits equal the CPU's.
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
  uint64_t seed;
  bool normalize;
};

template <int K, int SPARSIFY, int ELECT>
__global__ void __launch_bounds__(kThreads, 1) merge_kernel(Args a) {
  constexpr bool kRanked = SPARSIFY == MERGE3_KEEP_RANKED;
  constexpr bool kRandom = kRanked || SPARSIFY == MERGE3_KEEP_RANDOM;
  constexpr bool kBounded = SPARSIFY == MERGE3_KEEP_MAGNITUDE || SPARSIFY == MERGE3_KEEP_BAND;
  const int64_t t = tensor_of_chunk(a.first, a.tensors, blockIdx.x);
  const merge3_tensor& tensor = a.table[t];
  const int64_t begin = (int64_t(blockIdx.x) - a.first[t]) * kChunk;
  const int64_t end = begin + kChunk < tensor.numel ? begin + kChunk : tensor.numel;
  const auto p = prepare<float, K>(a.coefficients + t * K, a.lambda[t], tensor.base != nullptr);
  Bound lo[K], hi[K];
  Spread spread[K];
  int32_t threshold[K];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const merge3_coefficient& c = a.coefficients[t * K + k];
    lo[k] = make_bound(c.lo, c.lo_share, false);
    hi[k] = make_bound(c.hi, c.hi_share, true);
    spread[k] = make_spread(c);
    threshold[k] = kRanked ? -1 : kept_draws(c);
  }
  for (int64_t i = begin + int64_t(threadIdx.x) * 8; i < end; i += int64_t(blockDim.x) * 8) {
    const int n = end - i < 8 ? int(end - i) : 8;
    float theta[8], expert[K][8], out[8];
    load8(tensor.dtype, tensor.base, i, n, theta);
#pragma unroll
    for (int k = 0; k < K; ++k) load8(tensor.dtype, tensor.experts[k], i, n, expert[k]);
    Draws8 drawn[kRandom ? K : 1];
    if (kRandom)
#pragma unroll
      for (int k = 0; k < K; ++k) drawn[k] = draw8(tensor.offset + i, tensor.id, uint32_t(k), a.seed, threshold[k]);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float e[K];
      Keep<float, K> keep;
      const int32_t hash = tie_hash(tensor.offset + i + j, tensor.id);
#pragma unroll
      for (int k = 0; k < K; ++k) {
        e[k] = expert[k][j];
        if (kBounded) keep.lo[k] = limit(lo[k], hash);
        if (SPARSIFY == MERGE3_KEEP_BAND) keep.hi[k] = limit(hi[k], hash);
        const int32_t draw = kRandom ? draw_of(drawn[kRandom ? k : 0], j) : 0;
        keep.drawn[k] = draw < threshold[k];
        if (kRanked && j < n)
          keep.lo[k] = drawn_limit(spread[k], draw, tensor.rank_tables[k] + (tensor.offset + i + j) / tensor.columns * MERGE3_RANK_STRIDE);
      }
      out[j] = merge_element<K, SPARSIFY, ELECT>(theta[j], e, p, keep, a.normalize);
    }
    store8(tensor.out_dtype, tensor.out, i, n, out);
  }
}

}  // namespace

int merge_resident_cuda(const merge3_modes& modes, int64_t tensors, int64_t chunks, const merge3_tensor* table,
                        const int64_t* first, const merge3_coefficient* coefficients, const float* lambda,
                        void* stream) {
  if (modes.sparsify > MERGE3_KEEP_BAND)
    return packed_cuda(modes, tensors, chunks, table, first, coefficients, lambda, stream);
  const Args args{table, coefficients, lambda, first, tensors, modes.seed, modes.normalize != 0};
  cudaError_t status = cudaErrorInvalidValue;
  dispatch_experts(modes.experts, [&](auto k) {
    dispatch_sparsify(modes.sparsify, [&](auto s) {
      dispatch_elect(modes.elect, [&](auto e) {
        status = launch(merge_kernel<decltype(k)::value, decltype(s)::value, decltype(e)::value>, chunks,
                        static_cast<cudaStream_t>(stream), args);
      });
    });
  });
  return status;
}

int merge_cuda(const merge3_modes& modes, int64_t tensors, const merge3_tensor* table,
               const merge3_coefficient* coefficients, const float* lambda, void* raw_stream) {
  const auto stream = static_cast<cudaStream_t>(raw_stream);
  const Chunks chunks(table, tensors);
  const size_t count = size_t(tensors);
  DeviceArray<merge3_tensor> device_table(table, count, stream);
  DeviceArray<merge3_coefficient> device_coefficients(coefficients, count * size_t(modes.experts), stream);
  DeviceArray<float> device_lambda(lambda, count, stream);
  DeviceArray<int64_t> first(chunks.first, count + 1, stream);
  MERGE3_TRY(device_table.status);
  MERGE3_TRY(device_coefficients.status);
  MERGE3_TRY(device_lambda.status);
  MERGE3_TRY(first.status);
  return merge_resident_cuda(modes, tensors, chunks.count(), device_table.get(), first.get(),
                             device_coefficients.get(), device_lambda.get(), raw_stream);
}

}  // namespace merge3
