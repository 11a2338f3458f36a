// One bit per element of task vectors, made on a GPU once per pool. What merges them: merge.cuh.
#include "../plan.h"
#include "launch.cuh"

namespace merge3 {
namespace {

struct Args {
  Work work;
  int32_t packing, experts;
  double* partial;  // [chunks, K, 2]
};

// A thread makes whole words, so that no two write to one.
__global__ void __launch_bounds__(kThreads) pack_kernel(const Args a) {
  const Span span = span_of(a.work);
  const merge3_tensor& tensor = span.tensor;
  const void* unified = a.packing == MERGE3_PACK_AGREEMENT ? tensor.out : nullptr;
  for (int k = 0; k < a.experts; ++k) {
    const bool aligned = aligned16(tensor.base) && aligned16(tensor.experts[k]) && aligned16(unified);
    double sums[2] = {};  // of all, and of those whose bit is set
    for (int64_t i = span.begin + int64_t(threadIdx.x) * 32; i < span.end; i += kThreads * 32) {
      uint32_t word = 0;
#pragma unroll
      for (int part = 0; part < 32; part += 8) {
        const int64_t left = span.end - i - part;
        const int n = left < 0 ? 0 : left < 8 ? int(left) : 8;
        float theta[8], expert[8], other[8];
        if (aligned && n == 8) {
          const Any8 raw[3] = {load_any8(tensor.dtype, tensor.base, i + part), load_any8(tensor.dtype, tensor.experts[k], i + part),
                               load_any8(tensor.out_dtype, unified, i + part)};
          widen(tensor.dtype, raw[0], theta), widen(tensor.dtype, raw[1], expert), widen(tensor.out_dtype, raw[2], other);
        } else {
          load_few(tensor.dtype, tensor.base, i + part, n, theta);
          load_few(tensor.dtype, tensor.experts[k], i + part, n, expert);
          load_few(tensor.out_dtype, unified, i + part, n, other);
        }
#pragma unroll
        for (int j = 0; j < 8; ++j)
          if (j < n) word |= uint32_t(packed_bit(a.packing, theta[j], expert[j], other[j], sums[0], sums[1])) << (part + j);
      }
      const_cast<uint32_t*>(tensor.masks[k])[i / 32] = word;
    }
    block_sum(sums, a.partial + (int64_t(blockIdx.x) * a.experts + k) * 2);
  }
}

}  // namespace

int pack_cuda(int32_t packing, int32_t experts, int64_t tensors, const merge3_tensor* table, double* partial, void* raw_stream) {
  const auto stream = static_cast<cudaStream_t>(raw_stream);
  const std::vector<merge3_block> blocks = list_blocks(table, tensors);
  Upload upload(stream);
  const auto work = upload.add_work(table, tensors, blocks);
  DeviceArray<double> sums(blocks.size() * size_t(experts) * 2, stream);
  MERGE3_TRY(upload.send());
  MERGE3_TRY(sums.status);
  MERGE3_TRY(launch(pack_kernel, int64_t(blocks.size()), stream, Args{upload.at(work), packing, experts, sums.get()}));
  return sums.read(partial);
}

}  // namespace merge3
