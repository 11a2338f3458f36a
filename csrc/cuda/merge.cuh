// The fused merge of K experts on a GPU: a block of threads per chunk of a tensor, eight elements a thread at a time.
//
// Moves (K + 1) reads + 1 write per element, in 16-byte accesses; a thread asks for all its K + 1 inputs before it waits
// for the first (of seven or more, in some modes, the assembler has it ask for six), and pointers and coefficients stay
// in registers (but for ranks in rows that are shorter than what a warp takes). No atomics; one barrier, after limits were put into shared memory. The arithmetic is that of merge_math.h,
// with fused multiply-add only where a quotient is corrected, so the bits equal the CPU's; how signs are elected and
// whether sums are divided is asked once per eight elements. benchmarks/ptxas.py checks in the machine code what this
// promises, benchmarks/gpu_check.py measures it.
//
// What is not bound by memory is bound by comparisons, selections and bits, of which a GPU does half as many as additions
// and multiplications: hence the ways of divide.cuh, draws.cuh, side_of and sign.
//
// Tried: the dtype as a number known at run time, which put each conversion, and its wait, right behind its load; the
// election as a template argument too: twice the time to compile, five times the kernels, for eight registers less.
// More: docs/kernels.md.
#pragma once
#include "divide.cuh"
#include "draws.cuh"
#include "merge_launch.cuh"

namespace merge3 {

// How many times eight elements a thread asks for at once. Signs of packed experts leave one input, the base.
#if !defined(MERGE3_DEPTH)
#define MERGE3_DEPTH 1
#endif
template <int K, int SPARSIFY>
constexpr int kInputsOf = SPARSIFY == MERGE3_SIGNS ? 1 : K + 1;
// Draws last for two turns.
template <int SPARSIFY>
constexpr bool kDrawnOf = SPARSIFY == MERGE3_KEEP_RANDOM || SPARSIFY == MERGE3_KEEP_RANKED;
template <int SPARSIFY>
constexpr int kDepthOf = SPARSIFY == MERGE3_SIGNS ? 2 : kDrawnOf<SPARSIFY> ? 1 : MERGE3_DEPTH;

// Blocks that a multiprocessor must have room for: as many as keep so many KB of loads in flight, by CCCL's figures 48 for
// an H200 and less for cards with slower memory, unless that many would make the assembler spill registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kInFlight = 24;
constexpr int kRegistersForEight = 5;  // experts up to which ranks leave registers for the changes of eight elements
#else
constexpr int kInFlight = 48, kRegistersForEight = MERGE3_MAX_EXPERTS;
#endif
template <int K, int SPARSIFY, class T>
constexpr int blocks_per_processor() {
  const int in_flight = kThreads * kDepthOf<SPARSIFY> * kInputsOf<K, SPARSIFY> * T::kBytes;
  const int wanted = (kInFlight * 1024 + in_flight - 1) / in_flight;
  constexpr bool kWide = T::kBytes == 32;
  const int per_expert = SPARSIFY == MERGE3_KEEP_RANKED ? (kWide ? 28 : 24) : SPARSIFY == MERGE3_KEEP_RANDOM && kWide ? 18 : 12;
  const int possible = 65536 / kThreads / (32 + (kDepthOf<SPARSIFY> - 1) * 8 + per_expert * K);
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

// Eight of a table in shared memory.
__device__ __forceinline__ void load8(const float* from, float (&to)[8]) {
#pragma unroll
  for (int q = 0; q < 2; ++q) {
    const float4 four = reinterpret_cast<const float4*>(from)[q];
    to[4 * q] = four.x, to[4 * q + 1] = four.y, to[4 * q + 2] = four.z, to[4 * q + 3] = four.w;
  }
}

template <int K, int SPARSIFY, class T>
__global__ void __launch_bounds__(kThreads, blocks_per_processor<K, SPARSIFY, T>()) merge_kernel(const MergeArgs a) {
  constexpr bool kRanked = SPARSIFY == MERGE3_KEEP_RANKED, kRandom = SPARSIFY == MERGE3_KEEP_RANDOM, kDrawn = kRanked || kRandom;
  constexpr bool kBand = SPARSIFY == MERGE3_KEEP_BAND, kBounded = kBand || SPARSIFY == MERGE3_KEEP_MAGNITUDE;
  constexpr bool kSigns = SPARSIFY == MERGE3_SIGNS, kPacked = kSigns || SPARSIFY == MERGE3_KEEP_MASK;
  constexpr int kInputs = kInputsOf<K, SPARSIFY>, kDepth = kDepthOf<SPARSIFY>, kStep = kThreads * 8;
  constexpr int kSide = kRanked ? 16 : 8;  // elements of a thread side by side, eight at a time
  constexpr int kPeriod = int(kTiePeriod), kGroup = kRanked && K > kRegistersForEight ? 4 : 8;
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
  TableSpread spread[kRanked ? K : 1];
  int32_t threshold[kRandom ? K : 1];
  bool more = false;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if constexpr (!kSigns) from[k + 1] = static_cast<const char*>(tensor.experts[k]) + span.begin / 8 * T::kBytes;
    if constexpr (kPacked) masks[k] = reinterpret_cast<const uint8_t*>(tensor.masks[k]) + first / 8;
    if constexpr (kRanked) quantiles[k] = tensor.rank_tables[k], spread[k] = in_tables(make_spread(c[k]));
    if constexpr (kRandom) threshold[k] = kept_draws(c[k]), more = more || needs_more(threshold[k]);
  }
  const bool easy = divides_easily<K>(c, p.total);

  // Limits repeat every kPeriod elements of a run, in which a chunk lies whole: [lo or hi][expert][place].
  alignas(16) __shared__ float limits[kBounded ? (kBand ? 2 : 1) * K * kPeriod : 4];
  static_assert(kStep % kPeriod == 0 && kTieRun % kChunk == 0);
  if constexpr (kBounded) {
#pragma unroll 1
    for (int at = int(threadIdx.x); at < K * kPeriod; at += kThreads) {
      const merge3_coefficient& own = c[at / kPeriod];
      const int32_t hash = tie_hash(first + at % kPeriod, id);
      limits[at] = limit(make_bound(own.lo, own.lo_share, false), hash);
      if constexpr (kBand) limits[K * kPeriod + at] = limit(make_bound(own.hi, own.hi_share, true), hash);
    }
    __syncthreads();
  }
  const float* const own_limits = limits + (kBounded ? int(threadIdx.x) * 8 % kPeriod : 0);

  // Rows are those of a warp, whose 512 elements lie in one nearly always where rows are long.
  const int32_t side_by_side = int32_t(threadIdx.x) * kSide, in_warp = int32_t(threadIdx.x % 32) * kSide;
  const int64_t columns = kRanked ? tensor.columns : 1;
  Rows rows(kRanked ? first + side_by_side - in_warp : 0, columns, 2 * kStep);
  using Drawn = Words<kRanked ? 4 : 2>;
  Drawn drawn[kDrawn ? K : 1], next[kDrawn ? K : 1];
  float quantile[kRanked ? K : 1];
  [[maybe_unused]] bool second = false, row_of_warp = false;
  [[maybe_unused]] Raw8<T> held;  // what comes out of the first of two turns

  // Of kernels that draw, all threads go as far as the first: they hand each other what they draw, look up and store.
  // That they do is plain to the compiler from `begin`, which is the same for all.
  for (int32_t begin = kDrawn ? 0 : side_by_side; begin < size;) {
    const int32_t start = kDrawn ? begin + side_by_side + (kRanked && second ? 8 : 0) : begin;
    Raw8<T> raw[kDepth][kInputs];
    uint32_t bits[kDepth][kPacked ? K : 1];
    const bool inside = !kDrawn || start < size;
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const int32_t at = (start + d * kStep) / 8;
      if (d > 0 && start + d * kStep >= size) break;
      raw[d][0] = load_raw8_if<T>(has_base && inside, from[0] + at * T::kBytes);
#pragma unroll
      for (int v = 1; v < kInputs; ++v) {
        if constexpr (kDrawn) raw[d][v] = load_raw8_if<T>(inside, from[v] + at * T::kBytes);
        else raw[d][v] = load_raw8<T>(from[v] + at * T::kBytes);
      }
      if constexpr (kPacked)
#pragma unroll
        for (int k = 0; k < K; ++k) bits[d][k] = masks[k][at];
    }
    if constexpr (kDrawn) {
      if (second) {
#pragma unroll
        for (int k = 0; k < K; ++k) drawn[k] = next[k];
      } else {
        if constexpr (kRanked) {
          row_of_warp = __all_sync(0xffffffffu, start - in_warp < size && rows.column + 32 * kSide <= columns);
#pragma unroll
          for (int k = 0; k < K; ++k) quantile[k] = row_of_warp ? quantiles[k][rows.row * MERGE3_RANK_STRIDE + threadIdx.x % 32] : 0.0f;
        }
        const auto sixteen = [&](int k, auto any_more) {
          if constexpr (kRanked) return drawn_halves(first + start, id, uint32_t(k), a.modes.seed);
          else
            return shared_draws(first + start, kStep, [&](int64_t element) {
              return kept_halves(element, id, uint32_t(k), a.modes.seed, threshold[k], any_more);
            });
        };
        const auto draw = [&](auto any_more) {
#pragma unroll
          for (int k = 0; k < K; ++k) {
            const auto made = sixteen(k, any_more);
            drawn[k] = made.first, next[k] = made.second;
          }
        };
        if (more) draw(Constant<1>());
        else draw(Constant<0>());
      }
    }
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const int32_t i = start + d * kStep;
      if (d > 0 && i >= size) break;
      float change[kGroup][K], out[8];
      const auto changes = [&](int group, auto of_lanes) {
        [[maybe_unused]] int64_t own_row = 0;
        if constexpr (kRanked && decltype(of_lanes)::value == 0)
          if (inside) own_row = (rows.row + (rows.column + in_warp + (second ? 8 : 0)) / columns) * MERGE3_RANK_STRIDE;
#pragma unroll
        for (int k = 0; k < K; ++k) {
          [[maybe_unused]] float lo[8], hi[8];
          if constexpr (kBounded) load8(own_limits + k * kPeriod, lo);
          if constexpr (kBand) load8(own_limits + (K + k) * kPeriod, hi);
#pragma unroll
          for (int at = 0; at < kGroup; ++at) {
            const int j = group + at;
            const float theta = element_of<T>(raw[d][0], j), expert = element_of<T>(raw[d][kSigns ? 0 : k + 1], j);
            Keep<float, K> keep;
            if constexpr (kBounded) keep.lo[k] = lo[j];
            if constexpr (kBand) keep.hi[k] = hi[j];
            if constexpr (kDrawn) change[at][k] = change_of<K, MERGE3_KEEP_ALL>(theta, expert, k, p, keep);
            else change[at][k] = change_of<K, SPARSIFY>(theta, expert, k, p, keep);
            if constexpr (kRandom) change[at][k] = kept_where(drawn[k], j, change[at][k]);
            if constexpr (kRanked && decltype(of_lanes)::value != 0)
              change[at][k] = keep_where(reaches_limit_of_lanes(spread[k], drawn_of(drawn[k], j), quantile[k], expert - theta),
                                         change[at][k]);
            else if constexpr (kRanked)
              change[at][k] = keep_where(reaches_limit(make_spread(c[k]), drawn_of(drawn[k], j), quantiles[k] + own_row, expert - theta),
                                         change[at][k]);
          }
        }
      };
      // Element by element, or the assembler for sm_120 converts the first expert before it asks for the others.
      const auto packed_changes = [&] {
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
          for (int k = 0; k < K; ++k)
            change[j][k] = packed_change<kSigns>(element_of<T>(raw[d][0], j), element_of<T>(raw[d][kSigns ? 0 : k + 1], j),
                                                 (bits[d][k] >> j & 1) != 0, p.scale[k]);
      };
      const auto finish = [&](int group, auto elect, auto normalize) {
        constexpr int kElect = decltype(elect)::value;
        constexpr bool kElects = kElect != MERGE3_ELECT_NONE, kNormalize = decltype(normalize)::value != 0;
#pragma unroll
        for (int four = 0; four < kGroup; four += 4) {
          float sum[4], divisor[4], side[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            sum[j] = vote_of<K, kElect>(change[four + j]), divisor[j] = p.total;
            if constexpr (kElects) {
              side[j] = side_of(sum[j]);
              sum[j] = elect_aligned<K, false>(change[four + j], side[j], p, kNormalize, divisor[j]);
            }
          }
          if constexpr (kNormalize) divide<!kElects, kElects>(sum, divisor, easy);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if constexpr (kElects) sum[j] = towards(sum[j], side[j]);
            out[group + four + j] = add_change<K>(element_of<T>(raw[d][0], group + four + j), sum[j], divisor[j], p, false);
          }
        }
      };
      const bool sum = a.modes.elect == MERGE3_ELECT_SUM;
#pragma unroll
      for (int group = 0; group < 8; group += kGroup) {
        if constexpr (kPacked) packed_changes();
        else if (row_of_warp) changes(group, Constant<1>());
        else changes(group, Constant<0>());
        if (kPacked || a.modes.elect == MERGE3_ELECT_NONE) {
          if (a.modes.normalize) finish(group, Constant<MERGE3_ELECT_NONE>(), Constant<1>());
          else finish(group, Constant<MERGE3_ELECT_NONE>(), Constant<0>());
        } else if (a.modes.normalize) {
          if (sum) finish(group, Constant<MERGE3_ELECT_SUM>(), Constant<1>());
          else finish(group, Constant<MERGE3_ELECT_COUNT>(), Constant<1>());
        } else {
          if (sum) finish(group, Constant<MERGE3_ELECT_SUM>(), Constant<0>());
          else finish(group, Constant<MERGE3_ELECT_COUNT>(), Constant<0>());
        }
      }
      // The address is read where it is used: two registers less.
      if constexpr (kRanked && T::kBytes == 16) {
        if (second) store_two_turns<T>(static_cast<char*>(tensor.out) + span.begin / 8 * T::kBytes, i - 8, size, held, raw8_of<T>(out));
        else held = raw8_of<T>(out);
      } else if (inside) {
        store_raw8<T>(static_cast<char*>(tensor.out) + (span.begin + i) / 8 * T::kBytes, raw8_of<T>(out));
      }
    }
    if (!kRanked) begin += kDepth * kStep;
    else if (second) begin += 2 * kStep, rows.advance();
    second = kDrawn && !second;
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
