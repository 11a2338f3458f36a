// What api.cpp hands to the CPU loops, and the loops it can call.
#pragma once
#include "../chunks.h"
#include "../radix.h"

namespace merge3 {

struct MergeCall {
  const merge3_modes* modes;
  const merge3_tensor* table;
  const merge3_coefficient* coefficients;
  const float* lambda;
  const ChunkRange* chunks;
  bool stream;  // the result is larger than the caches
};

// Chunks [from, to) of the call; false for modes that do not exist.
bool merge_generic(const MergeCall& call, int64_t from, int64_t to);
bool merge_avx2(const MergeCall& call, int64_t from, int64_t to);
bool merge_avx512(const MergeCall& call, int64_t from, int64_t to);

// partial: [chunks, 2 K + 1], one row per chunk so that the sum has a fixed order.
void backward_cpu(const MergeCall& call, int64_t from, int64_t to, double* partial);

// Modes mask and signs.
void packed_generic(const MergeCall& call, int64_t from, int64_t to);
void packed_avx2(const MergeCall& call, int64_t from, int64_t to);
void packed_avx512(const MergeCall& call, int64_t from, int64_t to);

struct PackCall {
  int32_t packing, experts;
  const merge3_tensor* table;
  const ChunkRange* chunks;
};
// partial: [chunks, K, 2].
void pack_cpu(const PackCall& call, int64_t from, int64_t to, double* partial);

struct ElementwiseCall {
  int32_t rule, experts;
  const merge3_tensor* table;
  const float *scalars, *per_expert;
  const Chunks* chunks;
};
void elementwise_cpu(const ElementwiseCall& call, int64_t from, int64_t to);

// partial: [chunks, (K + 1)(K + 2) / 2], one row per chunk so that the sum has a fixed order.
void gram_generic(const merge3_tensor* table, int32_t experts, const Chunks& chunks, int64_t from,
                  int64_t to, double* partial);
void gram_avx2(const merge3_tensor* table, int32_t experts, const Chunks& chunks, int64_t from,
               int64_t to, double* partial);

struct OrderStatistics {
  int32_t statistic, experts;
  const merge3_tensor* table;
  int64_t rank_count;
  const int64_t* ranks;
  float* value;
  int64_t *greater, *equal;
  double *l1_greater, *total;
  int64_t* nonzero;

  int64_t series() const { return statistic == MERGE3_VARIANCE ? 1 : experts; }  // per tensor
  OrderResult result(int64_t pair) const {
    const int64_t at = pair * rank_count;
    return {value + at, greater + at, equal + at, l1_greater + at, total + pair, nonzero + pair};
  }
};
// One pair (tensor, expert), expert fastest.
void order_statistics_generic(const OrderStatistics& call, int64_t pair);
void order_statistics_avx2(const OrderStatistics& call, int64_t pair);
void rank_tables_cpu(const merge3_tensor* table, int32_t experts, int64_t from, int64_t to,
                     double* bin_l1);

}  // namespace merge3
