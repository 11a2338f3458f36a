// Gradient of the merge with respect to its coefficients: one pass, each chunk's sums in a row of its own, so
// that they are added in a fixed order whatever the number of threads.
#include "../backward.h"

#include "../dispatch.h"
#include "merge_cpu.h"
#include "storage.h"

namespace merge3 {

void backward_cpu(const MergeCall& call, int64_t from, int64_t to, double* partial) {
  dispatch_experts(call.modes->experts, [&](auto experts) {
    constexpr int K = decltype(experts)::value;
    call.chunks->each(call.table, from, to, [&](int64_t t, int64_t begin, int64_t end, int64_t chunk) {
      const merge3_tensor& tensor = call.table[t];
      const merge3_coefficient* c = call.coefficients + t * K;
      const auto p = prepare<float, K>(c, call.lambda[t], tensor.base != nullptr);
      const auto bounds = make_bounds<K>(c);
      double sums[2 * K + 1] = {};
      for (int64_t i = begin; i < end; i += 8) {
        const int n = int(std::min<int64_t>(8, end - i));
        float g[8], theta[8], expert[K][8];
        load_block(tensor.out_dtype, tensor.out, i, n, g);
        load_block(tensor.dtype, tensor.base, i, n, theta);
        for (int k = 0; k < K; ++k) load_block(tensor.dtype, tensor.experts[k], i, n, expert[k]);
        uint32_t words[K][4] = {};
        for (int k = 0; k < K && draws(*call.modes); ++k) random_words(tensor, tensor.offset + i, k, call.modes->seed, words[k]);
        for (int j = 0; j < n; ++j) {
          float e[K];
          int32_t random[K];
          for (int k = 0; k < K; ++k) e[k] = expert[k][j], random[k] = random_of(words[k], j);
          backward_element<K>(tensor, *call.modes, c, p, bounds, tensor.offset + i + j, g[j], theta[j], e, random, sums);
        }
      }
      std::copy(sums, sums + 2 * K + 1, partial + chunk * (2 * K + 1));
    });
  });
}

}  // namespace merge3
