// Statistics of task vectors on a GPU; the host reads the results, so these calls wait for them.
//
// Gram: a block per chunk, its threads' sums added in a fixed order. Order statistics: RadixSelect (see
// radix.h) over counts made here; its sums are integers, which add up the same in any order, as
// floating-point atomics would not. Rank tables: a block per row finds its bin boundaries by four rounds
// of eight bits in shared memory; its sums of |tau| are integers in fixed point.
#include "../dispatch.h"
#include "../plan.h"
#include "../radix.h"
#include "launch.cuh"

namespace merge3 {
namespace {

// ---------------------------------------------------------------------------------- Gram

struct GramArgs {
  Work work;
  double* partial;  // [chunks, pairs]
};

template <int VECTORS>
__global__ void __launch_bounds__(kThreads) gram_kernel(GramArgs a) {
  constexpr int kPairs = VECTORS * (VECTORS + 1) / 2;
  const Span span = span_of(a.work);
  const merge3_tensor& tensor = span.tensor;
  double sums[kPairs] = {};
  for (int64_t i = span.begin + threadIdx.x; i < span.end; i += kThreads) {
    float x[VECTORS];
    x[0] = load1(tensor.dtype, tensor.base, i);
#pragma unroll
    for (int v = 1; v < VECTORS; ++v) x[v] = load1(tensor.dtype, tensor.experts[v - 1], i) - x[0];
    int p = 0;
#pragma unroll
    for (int r = 0; r < VECTORS; ++r)
#pragma unroll
      for (int c = r; c < VECTORS; ++c, ++p) sums[p] += double(x[r]) * double(x[c]);
  }
  block_sum(sums, a.partial + int64_t(blockIdx.x) * kPairs);
}

// ------------------------------------------------------------------------ order statistics

struct Count {
  unsigned long long count, low;  // as Bucket, in the type that atomicAdd takes
};
static_assert(sizeof(Count) == sizeof(Bucket));

struct Values {
  merge3_tensor tensor;
  int32_t statistic, experts, k;

  __device__ uint32_t operator()(int64_t i) const {
    const float theta = load1(tensor.dtype, tensor.base, i);
    if (statistic == MERGE3_MAGNITUDE)
      return as_uint(load1(tensor.dtype, tensor.experts[k], i) - theta) & 0x7fffffffu;
    float e[MERGE3_MAX_EXPERTS];
    for (int j = 0; j < experts; ++j) e[j] = load1(tensor.dtype, tensor.experts[j], i);
    return as_uint(variance(theta, e, experts));
  }
};

__device__ void count(uint32_t bits, Count* bucket) {
  atomicAdd(&bucket->count, 1ull);
  atomicAdd(&bucket->low, static_cast<unsigned long long>(bits & 0xffffu));
}

__global__ void top_kernel(Values values, Count* table) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < values.tensor.numel;
       i += int64_t(gridDim.x) * blockDim.x) {
    const uint32_t bits = values(i);
    count(bits, &table[bits >> 16]);
  }
}

__global__ void next_kernel(Values values, const uint32_t* slot, const uint32_t* child, int shift, Count* tables) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < values.tensor.numel;
       i += int64_t(gridDim.x) * blockDim.x) {
    const uint32_t bits = values(i);
    uint32_t at = slot[bits >> 16];
    if (at != kNoSlot && child) at = child[size_t(at) * 256 + ((bits >> 8) & 255)];
    if (at != kNoSlot) count(bits, &tables[size_t(at) * 256 + ((bits >> shift) & 255)]);
  }
}

// RadixSelect's counter. The first error stays in `status`; what follows it does nothing.
class Counter {
 public:
  Counter(const Values& values, cudaStream_t stream) : values_(values), stream_(stream) {}

  void top(Bucket* table) {
    DeviceArray<Count> counts(kTop, stream_);
    if (keep(counts.status) && keep(counts.zero()) && keep(launch(top_kernel, blocks(), stream_, values_, counts.get())))
      keep(counts.read(reinterpret_cast<Count*>(table)));
  }

  void next(const uint32_t* slot, const uint32_t* child, int shift, size_t slots, Bucket* tables) {
    Upload upload(stream_);
    const auto slots_of = upload.add(slot, kTop), children = upload.add(child, child ? children_ : 0);
    DeviceArray<Count> counts(slots * 256, stream_);
    children_ = slots * 256;
    if (keep(upload.send()) && keep(counts.status) && keep(counts.zero()) &&
        keep(launch(next_kernel, blocks(), stream_, values_, upload.at(slots_of), child ? upload.at(children) : nullptr, shift,
                    counts.get())))
      keep(counts.read(reinterpret_cast<Count*>(tables)));
  }

  cudaError_t status = cudaSuccess;

 private:
  bool keep(cudaError_t e) {
    if (status == cudaSuccess) status = e;
    return status == cudaSuccess;
  }
  int64_t blocks() const { return std::min<int64_t>((values_.tensor.numel + kThreads - 1) / kThreads, 2048); }

  Values values_;
  cudaStream_t stream_;
  size_t children_ = 0;
};

// ------------------------------------------------------------------------------ rank tables

__device__ unsigned long long fixed_point(uint32_t bits, double scale) {
  return static_cast<unsigned long long>(double(as_float(bits)) * scale);
}

struct RankArgs {
  merge3_tensor tensor;
  int32_t k;
  double* bin_l1;  // [rows, bins]
};

__global__ void __launch_bounds__(kThreads) rank_kernel(RankArgs a) {
  constexpr int Q = MERGE3_RANK_BINS;
  __shared__ unsigned int counts[Q - 1][256];
  __shared__ uint32_t prefix[Q - 1], limits[Q - 1];
  __shared__ long long left[Q - 1], below[Q - 1];
  __shared__ unsigned int highest;
  __shared__ unsigned long long sums[Q];
  const merge3_tensor& tensor = a.tensor;
  const int64_t C = tensor.columns, start = int64_t(blockIdx.x) * C;
  auto value = [&](int64_t i) {
    const float theta = load1(tensor.dtype, tensor.base, start + i);
    return as_uint(load1(tensor.dtype, tensor.experts[a.k], start + i) - theta) & 0x7fffffffu;
  };
  if (int(threadIdx.x) < Q - 1) {
    prefix[threadIdx.x] = 0;
    left[threadIdx.x] = C * (int64_t(threadIdx.x) + 1) / Q;  // 0-based position from the smallest
    below[threadIdx.x] = 0;
  }
  if (int(threadIdx.x) < Q) sums[threadIdx.x] = 0;
  if (threadIdx.x == 0) highest = 0;
  __syncthreads();
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < (Q - 1) * 256; i += blockDim.x) (&counts[0][0])[i] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < C; i += blockDim.x) {
      const uint32_t bits = value(i);
      if (shift == 24) atomicMax(&highest, bits);
      for (int q = 0; q < Q - 1; ++q) {
        const bool first = q == 0 || prefix[q] != prefix[q - 1];  // equal prefixes share one count
        if (first && (shift == 24 || bits >> (shift + 8) == prefix[q])) atomicAdd(&counts[q][(bits >> shift) & 255], 1u);
      }
    }
    __syncthreads();
    uint32_t mine = 0;
    if (int(threadIdx.x) < Q - 1) {
      int shared_with = threadIdx.x;
      while (shared_with > 0 && prefix[shared_with - 1] == prefix[threadIdx.x]) --shared_with;
      int b = 0;
      while (b < 255 && left[threadIdx.x] >= (long long)counts[shared_with][b]) {
        left[threadIdx.x] -= counts[shared_with][b];
        below[threadIdx.x] += counts[shared_with][b];
        ++b;
      }
      mine = prefix[threadIdx.x] << 8 | uint32_t(b);
      if (shift == 0)
        limits[threadIdx.x] = as_uint(bin_limit(as_float(mine), C * (int64_t(threadIdx.x) + 1) / Q, below[threadIdx.x],
                                                counts[shared_with][b]));
    }
    __syncthreads();
    if (int(threadIdx.x) < Q - 1) prefix[threadIdx.x] = mine;
    __syncthreads();
  }
  float* out = const_cast<float*>(tensor.rank_tables[a.k]) + int64_t(blockIdx.x) * MERGE3_RANK_STRIDE;
  if (int(threadIdx.x) < Q) out[threadIdx.x] = threadIdx.x ? as_float(limits[threadIdx.x - 1]) : 0.0f;
  int exponent = 0, room = 62;
  frexp(double(as_float(highest)), &exponent);
  for (int64_t n = C; n > 1; n = (n + 1) / 2) --room;
  const double scale = ldexp(1.0, room - exponent);
  for (int64_t i = threadIdx.x; i < C; i += blockDim.x) {
    const uint32_t bits = value(i);
    int bin = 0;
    while (bin < Q - 1 && bits >= limits[bin]) ++bin;
    atomicAdd(&sums[bin], fixed_point(bits, scale));
  }
  __syncthreads();
  if (int(threadIdx.x) < Q) a.bin_l1[int64_t(blockIdx.x) * Q + threadIdx.x] = double(sums[threadIdx.x]) / scale;
}

}  // namespace

int gram_cuda(int32_t experts, int64_t tensors, const merge3_tensor* table, double* partial, void* raw_stream) {
  const auto stream = static_cast<cudaStream_t>(raw_stream);
  const std::vector<merge3_block> blocks = list_blocks(table, tensors);
  Upload upload(stream);
  const auto work = upload.add_work(table, tensors, blocks);
  DeviceArray<double> sums(blocks.size() * size_t((experts + 1) * (experts + 2) / 2), stream);
  MERGE3_TRY(upload.send());
  MERGE3_TRY(sums.status);
  const GramArgs args{upload.at(work), sums.get()};
  cudaError_t status = cudaErrorInvalidValue;
  dispatch_experts(experts, [&](auto k) { status = launch(gram_kernel<decltype(k)::value + 1>, int64_t(blocks.size()), stream, args); });
  MERGE3_TRY(status);
  return sums.read(partial);
}

int order_statistics_cuda(const OrderStatistics& call, int64_t tensors, void* raw_stream) {
  const auto stream = static_cast<cudaStream_t>(raw_stream);
  RadixSelect select;
  for (int64_t pair = 0; pair < tensors * call.series(); ++pair) {
    const int64_t t = pair / call.series();
    Counter counter({call.table[t], call.statistic, call.experts, int32_t(pair % call.series())}, stream);
    select.run(counter, call.table[t].numel, call.ranks + t * call.rank_count, call.rank_count, call.result(pair));
    MERGE3_TRY(counter.status);
  }
  return cudaSuccess;
}

int rank_tables_cuda(int32_t experts, int64_t tensors, const merge3_tensor* table, double* bin_l1, void* raw_stream) {
  const auto stream = static_cast<cudaStream_t>(raw_stream);
  for (int64_t t = 0; t < tensors; ++t) {
    const int64_t rows = table[t].columns ? table[t].numel / table[t].columns : 0;
    for (int32_t k = 0; k < experts; ++k) {
      double* total = bin_l1 + (t * experts + k) * MERGE3_RANK_BINS;
      std::fill(total, total + MERGE3_RANK_BINS, 0.0);
      DeviceArray<double> sums(size_t(rows) * MERGE3_RANK_BINS, stream);
      std::vector<double> host(size_t(rows) * MERGE3_RANK_BINS);
      MERGE3_TRY(sums.status);
      MERGE3_TRY(launch(rank_kernel, rows, stream, RankArgs{table[t], k, sums.get()}));
      MERGE3_TRY(sums.read(host.data()));
      for (int64_t r = 0; r < rows; ++r)
        for (int b = 0; b < MERGE3_RANK_BINS; ++b) total[b] += host[size_t(r * MERGE3_RANK_BINS + b)];
    }
  }
  return cudaSuccess;
}

}  // namespace merge3
