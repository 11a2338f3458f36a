// Statistics for any processor, and rank tables (sorting, which no instruction set helps).
#define MERGE3_STATISTICS(name) name##_generic
#include "statistics_loop.h"

namespace merge3 {

void rank_tables_cpu(const merge3_tensor* table, int32_t experts, int64_t from, int64_t to,
                     double* bin_l1) {
  constexpr int Q = MERGE3_RANK_BINS;
  std::vector<float> theta, row;
  for (int64_t pair = from; pair < to; ++pair) {
    const merge3_tensor& tensor = table[pair / experts];
    const int k = int(pair % experts);
    const int64_t C = tensor.columns;
    double* l1 = bin_l1 + pair * Q;
    std::fill(l1, l1 + Q, 0.0);
    theta.resize(size_t(C));
    row.resize(size_t(C));
    for (int64_t r = 0; C > 0 && r < tensor.numel / C; ++r) {
      for (int64_t i = 0; i < C; i += 1 << 20) {
        const int n = int(std::min<int64_t>(C - i, 1 << 20));
        load_block(tensor.dtype, tensor.base, r * C + i, n, theta.data() + i);
        load_block(tensor.dtype, tensor.experts[k], r * C + i, n, row.data() + i);
      }
      for (int64_t i = 0; i < C; ++i) row[size_t(i)] = magnitude(row[size_t(i)] - theta[size_t(i)]);
      std::sort(row.begin(), row.end());
      float* limits = const_cast<float*>(tensor.rank_tables[k]) + r * MERGE3_RANK_STRIDE;
      limits[0] = 0.0f;
      for (int bin = 1; bin < Q; ++bin) {
        const int64_t at = C * bin / Q;
        const float value = row[size_t(at)];
        const auto [first, past] = std::equal_range(row.begin(), row.end(), value);
        limits[bin] = bin_limit(value, at, first - row.begin(), past - first);
      }
      int64_t i = 0;
      for (int bin = 0; bin < Q; ++bin) {
        double sum = 0.0;
        for (; i < C && (bin == Q - 1 || !(row[size_t(i)] >= limits[bin + 1])); ++i) sum += row[size_t(i)];
        l1[bin] += sum;
      }
    }
  }
}

}  // namespace merge3
