// The methods with a per-element rule of their own (nearswap, arcee_fusion, ram, sce, unify): the CPU loop.
// Moves (K + 1) reads + 1 write per element.
#include "merge_cpu.h"
#include "storage.h"

namespace merge3 {

void elementwise_cpu(const ElementwiseCall& call, int64_t from, int64_t to) {
  constexpr int kBlock = 512;
  const int K = call.experts;
  float theta[kBlock], expert[MERGE3_MAX_EXPERTS][kBlock], out[kBlock];
  call.chunks->each(call.table, from, to, [&](int64_t t, int64_t begin, int64_t end, int64_t) {
    const merge3_tensor& tensor = call.table[t];
    const float scalar = call.scalars[t];
    const float* weight = call.per_expert + t * K;
    for (int64_t at = begin; at < end; at += kBlock) {
      const int n = int(std::min<int64_t>(end - at, kBlock));
      load_block(tensor.dtype, tensor.base, at, n, theta);
      for (int k = 0; k < K; ++k) load_block(tensor.dtype, tensor.experts[k], at, n, expert[k]);
      for (int j = 0; j < n; ++j) {
        float e[MERGE3_MAX_EXPERTS];
        for (int k = 0; k < K; ++k) e[k] = expert[k][j];
        switch (call.rule) {
          case MERGE3_NEARSWAP: out[j] = nearswap(theta[j], e[0], scalar); break;
          case MERGE3_ARCEE_FUSION:
            out[j] = arcee_fusion(theta[j], e[0], tensor.rank_tables[0][(at + j) / tensor.columns], scalar);
            break;
          case MERGE3_UNIFY: out[j] = unify(theta[j], e, K); break;
          case MERGE3_RAM: out[j] = ram(theta[j], e, K, scalar, weight); break;
          default: out[j] = sce(theta[j], e, K, scalar, weight); break;  // api.cpp checked the rule
        }
      }
      store_block(tensor.out_dtype, tensor.out, at, n, out, false);
    }
  });
}

}  // namespace merge3
