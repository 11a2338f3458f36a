// The fused merge of K experts on a GPU: a block of threads per chunk of a tensor, eight elements a thread at a time.
//
// Moves (K + 1) reads + 1 write per element, in 16-byte accesses; a thread asks for all its K + 1 inputs before it waits
// for the first (of seven or more, in some modes, the assembler has it ask for six), and pointers and coefficients stay
// in registers. No atomics, no barriers. The arithmetic is that of merge_math.h, built without fused multiply-add, so the
// bits equal the CPU's; how signs are elected and whether sums are divided is asked once per eight elements.
// benchmarks/ptxas.py checks in the machine code what this promises.
//
// Tried: the dtype as a number known at run time, which put each conversion, and its wait, right behind its load; the
// election as a template argument too: twice the time to compile, five times the kernels, for eight registers less.
// Limits of the tie-breaking hash kept in registers: 16 registers more for two experts, one block less per processor.
#pragma once
#include "merge_launch.cuh"

namespace merge3 {

// How many times eight elements a thread asks for at once. Signs of packed experts leave one input, the base.
#if !defined(MERGE3_DEPTH)
#define MERGE3_DEPTH 1
#endif
template <int K, int SPARSIFY>
constexpr int kInputsOf = SPARSIFY == MERGE3_SIGNS ? 1 : K + 1;
template <int SPARSIFY>
constexpr int kDepthOf = SPARSIFY == MERGE3_SIGNS ? 2 : MERGE3_DEPTH;

// Blocks that a multiprocessor must have room for: as many as keep 48 KB of loads in flight, what an H200 wants by
// CCCL's figures, unless that many would make the assembler spill registers.
template <int K, int SPARSIFY, class T>
constexpr int blocks_per_processor() {
  const int in_flight = kThreads * kDepthOf<SPARSIFY> * kInputsOf<K, SPARSIFY> * T::kBytes;
  const int wanted = (48 * 1024 + in_flight - 1) / in_flight;
  const int per_expert = SPARSIFY == MERGE3_KEEP_RANKED ? 24 : SPARSIFY == MERGE3_KEEP_RANDOM && T::kBytes == 32 ? 18 : 12;
  const int possible = 65536 / kThreads / (32 + (kDepthOf<SPARSIFY> - 1) * 8 + per_expert * K);
  if (SPARSIFY == MERGE3_KEEP_BAND && K == 4 && possible > 2) return 2;  // 8 bytes of spills else
  return wanted < possible ? wanted : possible < 1 ? 1 : possible;
}

// Which row of a tensor the elements at one position and then `step` further on lie in, without a division for each.
struct Rows {
  int64_t row, column, columns, step_rows, step_columns;

  __device__ __forceinline__ Rows(int64_t element, int64_t columns_, int64_t step)
      : row(element / columns_), column(element % columns_), columns(columns_), step_rows(step / columns_), step_columns(step % columns_) {}
  __device__ __forceinline__ void advance() {
    row += step_rows, column += step_columns;
    if (column >= columns) column -= columns, ++row;
  }
};

template <int K, int SPARSIFY, class T>
__global__ void __launch_bounds__(kThreads, blocks_per_processor<K, SPARSIFY, T>()) merge_kernel(const MergeArgs a) {
  constexpr bool kRanked = SPARSIFY == MERGE3_KEEP_RANKED, kRandom = SPARSIFY == MERGE3_KEEP_RANDOM;
  constexpr bool kBand = SPARSIFY == MERGE3_KEEP_BAND, kBounded = kBand || SPARSIFY == MERGE3_KEEP_MAGNITUDE;
  constexpr bool kSigns = SPARSIFY == MERGE3_SIGNS, kPacked = kSigns || SPARSIFY == MERGE3_KEEP_MASK;
  constexpr int kInputs = kInputsOf<K, SPARSIFY>, kDepth = kDepthOf<SPARSIFY>, kStep = kThreads * 8;
  const Span span = span_of(a.work);
  const merge3_tensor& tensor = span.tensor;
  const merge3_coefficient* c = a.coefficients + span.t * K;
  const bool has_base = tensor.base != nullptr;
  const auto p = prepare<float, K>(c, a.lambda[span.t], has_base);
  const int64_t first = tensor.offset + span.begin;  // in the whole tensor
  const int32_t size = int32_t(span.end - span.begin);
  const uint32_t id = tensor.id;
  const char* from[kInputs];
  const uint8_t* masks[kPacked ? K : 1];
  const float* quantiles[kRanked ? K : 1];
  from[0] = static_cast<const char*>(tensor.base) + span.begin / 8 * T::kBytes;
  Bound lo[K], hi[K];
  Spread spread[K];
  int32_t threshold[K];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if constexpr (!kSigns) from[k + 1] = static_cast<const char*>(tensor.experts[k]) + span.begin / 8 * T::kBytes;
    if constexpr (kPacked) masks[k] = reinterpret_cast<const uint8_t*>(tensor.masks[k]) + first / 8;
    if constexpr (kRanked) quantiles[k] = tensor.rank_tables[k], spread[k] = make_spread(c[k]);
    if constexpr (kBounded) lo[k] = make_bound(c[k].lo, c[k].lo_share, false);
    if constexpr (kBand) hi[k] = make_bound(c[k].hi, c[k].hi_share, true);
    threshold[k] = kRandom ? kept_draws(c[k]) : -1;
  }
  char* const to = static_cast<char*>(tensor.out) + span.begin / 8 * T::kBytes;
  // All elements that are a thread's eight have this hash in turn: it repeats every kTiePeriod elements of a run.
  static_assert(kStep % kTiePeriod == 0 && kTieRun % kChunk == 0);
  uint32_t hash = uint32_t(tie_hash(first + int64_t(threadIdx.x) * 8, id));
  Rows rows(kRanked ? first + int64_t(threadIdx.x) * 8 : 0, kRanked ? tensor.columns : 1, kStep);

  for (int32_t start = int32_t(threadIdx.x) * 8; start < size; start += kDepth * kStep) {
    Raw8<T> raw[kDepth][kInputs];
    uint32_t bits[kDepth][kPacked ? K : 1];
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const int32_t at = (start + d * kStep) / 8;
      if (d > 0 && start + d * kStep >= size) break;
      raw[d][0] = load_raw8_if<T>(has_base, from[0] + at * T::kBytes);
#pragma unroll
      for (int v = 1; v < kInputs; ++v) raw[d][v] = load_raw8<T>(from[v] + at * T::kBytes);
      if constexpr (kPacked)
#pragma unroll
        for (int k = 0; k < K; ++k) bits[d][k] = masks[k][at];
    }
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const int32_t i = start + d * kStep;
      if (d > 0 && i >= size) break;
#if defined(__CUDA_ARCH__)
      // Else the compiler finds that limits never change, and keeps 8 K or 16 K of them in registers.
      if constexpr (kBounded) asm volatile("" : "+r"(hash));
#endif
      Draws8 drawn[kRandom || kRanked ? K : 1];
      if constexpr (kRandom || kRanked)
#pragma unroll
        for (int k = 0; k < K; ++k) drawn[k] = draw8(first + i, id, uint32_t(k), a.modes.seed, threshold[k]);
      float change[8][K], out[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float theta = element_of<T>(raw[d][0], j);
        const int32_t h = int32_t(hash + uint32_t(j) * 0x9E3779B1u);
        Keep<float, K> keep;
#pragma unroll
        for (int k = 0; k < K; ++k) {
          if constexpr (kBounded) keep.lo[k] = limit(lo[k], h);
          if constexpr (kBand) keep.hi[k] = limit(hi[k], h);
          if constexpr (kRandom) keep.drawn[k] = draw_of(drawn[k], j) < threshold[k];
          if constexpr (kRanked)
            keep.lo[k] = drawn_limit(spread[k], draw_of(drawn[k], j), quantiles[k] + rows.row * MERGE3_RANK_STRIDE);
          if constexpr (kPacked)
            change[j][k] = packed_change<kSigns>(theta, element_of<T>(raw[d][kSigns ? 0 : k + 1], j), (bits[d][k] >> j & 1) != 0, p.scale[k]);
          else change[j][k] = change_of<K, SPARSIFY>(theta, element_of<T>(raw[d][k + 1], j), k, p, keep);
        }
      }
      const auto finish = [&](auto elect, auto normalize) {
#pragma unroll
        for (int j = 0; j < 8; ++j)
          out[j] = elect_and_add<K, decltype(elect)::value>(element_of<T>(raw[d][0], j), change[j], p, decltype(normalize)::value != 0);
      };
      const bool sum = a.modes.elect == MERGE3_ELECT_SUM;
      if (kPacked || a.modes.elect == MERGE3_ELECT_NONE) {
        if (a.modes.normalize) finish(Constant<MERGE3_ELECT_NONE>(), Constant<1>());
        else finish(Constant<MERGE3_ELECT_NONE>(), Constant<0>());
      } else if (a.modes.normalize) {
        if (sum) finish(Constant<MERGE3_ELECT_SUM>(), Constant<1>());
        else finish(Constant<MERGE3_ELECT_COUNT>(), Constant<1>());
      } else {
        if (sum) finish(Constant<MERGE3_ELECT_SUM>(), Constant<0>());
        else finish(Constant<MERGE3_ELECT_COUNT>(), Constant<0>());
      }
      store_raw8<T>(to + i / 8 * T::kBytes, out);
      if constexpr (kRanked) rows.advance();
    }
  }
}

template <int K, class T>
cudaError_t launch_merge(int64_t blocks, cudaStream_t stream, const MergeArgs& args) {
  switch (args.modes.sparsify) {
    case MERGE3_KEEP_ALL: return launch(merge_kernel<K, MERGE3_KEEP_ALL, T>, blocks, stream, args);
    case MERGE3_KEEP_MAGNITUDE: return launch(merge_kernel<K, MERGE3_KEEP_MAGNITUDE, T>, blocks, stream, args);
    case MERGE3_KEEP_RANDOM: return launch(merge_kernel<K, MERGE3_KEEP_RANDOM, T>, blocks, stream, args);
    case MERGE3_KEEP_RANKED: return launch(merge_kernel<K, MERGE3_KEEP_RANKED, T>, blocks, stream, args);
    case MERGE3_KEEP_BAND: return launch(merge_kernel<K, MERGE3_KEEP_BAND, T>, blocks, stream, args);
    case MERGE3_KEEP_MASK: return launch(merge_kernel<K, MERGE3_KEEP_MASK, T>, blocks, stream, args);
    case MERGE3_SIGNS: return launch(merge_kernel<K, MERGE3_SIGNS, T>, blocks, stream, args);
    default: return cudaErrorInvalidValue;
  }
}

template <int K>
cudaError_t merge_experts(int32_t dtype, int64_t blocks, cudaStream_t stream, const MergeArgs& args) {
  switch (dtype) {
    case MERGE3_FLOAT32: return launch_merge<K, Float32>(blocks, stream, args);
    case MERGE3_FLOAT16: return launch_merge<K, Float16>(blocks, stream, args);
    case MERGE3_BFLOAT16: return launch_merge<K, BFloat16>(blocks, stream, args);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace merge3
