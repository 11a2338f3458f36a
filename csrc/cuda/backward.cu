// Gradient of the merge with respect to its coefficients on a GPU: a block per chunk, its threads' sums added in
// a fixed order. The host adds up the chunks, so this call waits for them.
//
// Moves K + 2 reads per element, in 16-byte accesses that are all asked for before the first is used. Eight elements are
// added up in float32, and these sums in float64: 2 K + 1 additions in float64 per eight elements, since most GPUs have
// one unit for them where there are 64 for float32.
#include "../backward.h"

#include "../dispatch.h"
#include "../plan.h"
#include "launch.cuh"

namespace merge3 {
namespace {

struct Args {
  Work work;
  const merge3_coefficient* coefficients;
  const float* lambda;
  merge3_modes modes;
  double* partial;  // [chunks, 2 K + 1]
};

// One bit for each of eight elements, the first of which is `whole` of its tensor: whether expert k's change is kept.
template <int K>
__device__ __forceinline__ uint32_t kept_bits(const merge3_tensor& tensor, const merge3_modes& modes, const merge3_coefficient& c,
                                              const Bounds<K>& bounds, int k, int64_t whole, int n, const float (&theta)[8],
                                              const float (&expert)[8]) {
  uint32_t bits = 0;
  if (!draws(modes)) {
    if (modes.sparsify == MERGE3_KEEP_ALL) return 0xffu;
    const bool band = modes.sparsify == MERGE3_KEEP_BAND;
    const uint32_t hash = uint32_t(tie_hash(whole, tensor.id));
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int32_t h = int32_t(hash + uint32_t(j) * 0x9E3779B1u);  // eight elements lie in one period
      const float tau = magnitude(expert[j] - theta[j]);
      bits |= uint32_t(tau >= limit(bounds.lo[k], h) && (!band || tau <= limit(bounds.hi[k], h))) << j;
    }
    return bits;
  }
  const Draws8 drawn = draws_of(tensor, whole, k, modes, c);
  if (modes.sparsify == MERGE3_KEEP_RANDOM) {
    const int32_t threshold = kept_draws(c);
#pragma unroll
    for (int j = 0; j < 8; ++j) bits |= uint32_t(draw_of(drawn, j) < threshold) << j;
    return bits;
  }
  const Spread spread = make_spread(c);
  int64_t row = whole / tensor.columns, left = tensor.columns - whole % tensor.columns;  // left: of the row
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (j == left) ++row, left += tensor.columns;
    if (j < n && magnitude(expert[j] - theta[j]) >= drawn_limit(spread, draw_of(drawn, j), tensor.rank_tables[k] + row * MERGE3_RANK_STRIDE))
      bits |= 1u << j;
  }
  return bits;
}

template <int K>
__global__ void __launch_bounds__(kThreads, 1) backward_kernel(const Args a) {
  const Span span = span_of(a.work);
  const merge3_tensor& tensor = span.tensor;
  const merge3_coefficient* c = a.coefficients + span.t * K;
  const auto p = prepare<float, K>(c, a.lambda[span.t], tensor.base != nullptr);
  const auto bounds = make_bounds<K>(c);
  const int32_t dtype = tensor.dtype;
  bool aligned = aligned16(tensor.out) && aligned16(tensor.base);
  const void* from[K + 1] = {tensor.base};
#pragma unroll
  for (int k = 0; k < K; ++k) from[k + 1] = tensor.experts[k], aligned = aligned && aligned16(from[k + 1]);
  double sums[2 * K + 1] = {};
  for (int64_t i = span.begin + int64_t(threadIdx.x) * 8; i < span.end; i += kThreads * 8) {
    const int n = span.end - i < 8 ? int(span.end - i) : 8;
    float g[8], x[K + 1][8];
    if (aligned && n == 8) {
      const Any8 raw_g = load_any8(tensor.out_dtype, tensor.out, i);
      Any8 raw[K + 1];
#pragma unroll
      for (int v = 0; v <= K; ++v) raw[v] = load_any8(dtype, from[v], i);
      widen(tensor.out_dtype, raw_g, g);
#pragma unroll
      for (int v = 0; v <= K; ++v) widen(dtype, raw[v], x[v]);
    } else {
      load_few(tensor.out_dtype, tensor.out, i, n, g);
#pragma unroll
      for (int v = 0; v <= K; ++v) load_few(dtype, from[v], i, n, x[v]);
    }
    uint32_t bits[K];
#pragma unroll
    for (int k = 0; k < K; ++k) bits[k] = kept_bits<K>(tensor, a.modes, c[k], bounds, k, tensor.offset + i, n, x[0], x[k + 1]);
    float run[2 * K + 1] = {};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float e[K];
      bool kept[K];
#pragma unroll
      for (int k = 0; k < K; ++k) e[k] = x[k + 1][j], kept[k] = (bits[k] >> j & 1) != 0;
      if (j < n) merge_gradient<K>(g[j], x[0][j], e, c, p, kept, a.modes.elect, a.modes.normalize != 0, tensor.base != nullptr, run);
    }
#pragma unroll
    for (int s = 0; s < 2 * K + 1; ++s) sums[s] += double(run[s]);
  }
  block_sum(sums, a.partial + int64_t(blockIdx.x) * (2 * K + 1));
}

}  // namespace

int backward_cuda(const merge3_modes& modes, int64_t tensors, const merge3_tensor* table,
                  const merge3_coefficient* coefficients, const float* lambda, double* partial, void* raw_stream) {
  const auto stream = static_cast<cudaStream_t>(raw_stream);
  const std::vector<merge3_block> blocks = list_blocks(table, tensors);
  Upload upload(stream);
  const auto work = upload.add_work(table, tensors, blocks);
  const auto numbers = upload.add(coefficients, size_t(tensors) * size_t(modes.experts));
  const auto scales = upload.add(lambda, size_t(tensors));
  DeviceArray<double> sums(blocks.size() * size_t(2 * modes.experts + 1), stream);
  MERGE3_TRY(upload.send());
  MERGE3_TRY(sums.status);
  const Args args{upload.at(work), upload.at(numbers), upload.at(scales), modes, sums.get()};
  cudaError_t status = cudaErrorInvalidValue;
  dispatch_experts(modes.experts, [&](auto k) {
    status = launch(backward_kernel<decltype(k)::value>, int64_t(blocks.size()), stream, args);
  });
  MERGE3_TRY(status);
  return sums.read(partial);
}

}  // namespace merge3
