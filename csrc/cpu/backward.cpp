// Gradient of the merge with respect to its coefficients: one pass, each chunk's sums in a row of its own, so
// that they are added in a fixed order whatever the number of threads.
#include "../backward.h"

#include "../dispatch.h"
#include "merge_cpu.h"
#include "storage.h"

namespace merge3 {

// Where everything is kept and nothing elected or divided, a merge is linear in each task vector: all gradients follow
// from t_k = sum g tau_k (merge_gradient's sums with kept = tau, divisor 1). Eight sums side by side, added in order.
template <int K>
void backward_plain(const merge3_tensor& tensor, const merge3_coefficient* c, float lambda, int64_t begin, int64_t end,
                    double (&sums)[2 * K + 1]) {
  double lanes[K][8] = {};
  float g[8], theta[8], expert[8];
  for (int64_t i = begin; i < end; i += 8) {
    const int n = int(std::min<int64_t>(8, end - i));
    if (n < 8) std::fill_n(g, 8, 0.0f), std::fill_n(theta, 8, 0.0f), std::fill_n(expert, 8, 0.0f);
    load_block(tensor.out_dtype, tensor.out, i, n, g);
    load_block(tensor.dtype, tensor.base, i, n, theta);
    for (int k = 0; k < K; ++k) {
      load_block(tensor.dtype, tensor.experts[k], i, n, expert);
      for (int j = 0; j < 8; ++j) lanes[k][j] += double(g[j]) * double(expert[j] - theta[j]);
    }
  }
  for (int k = 0; k < K; ++k) {
    double t = 0.0;
    for (int j = 0; j < 8; ++j) t += lanes[k][j];
    sums[2 * k] = double(lambda) * double(c[k].rescale) * t;
    sums[2 * k + 1] = double(lambda) * double(c[k].weight) * t;
    sums[2 * K] += double(c[k].weight * c[k].rescale) * t;
  }
}

template <int K>
void backward_any(const MergeCall& call, const merge3_tensor& tensor, const merge3_coefficient* c, float lambda,
                  int64_t begin, int64_t end, double (&sums)[2 * K + 1]) {
  const auto p = prepare<float, K>(c, lambda, tensor.base != nullptr);
  const auto bounds = make_bounds<K>(c);
  for (int64_t i = begin; i < end; i += 8) {
    const int n = int(std::min<int64_t>(8, end - i));
    float g[8], theta[8], expert[K][8];
    load_block(tensor.out_dtype, tensor.out, i, n, g);
    load_block(tensor.dtype, tensor.base, i, n, theta);
    for (int k = 0; k < K; ++k) load_block(tensor.dtype, tensor.experts[k], i, n, expert[k]);
    Draws8 drawn[K] = {};
    for (int k = 0; k < K && draws(*call.modes); ++k) drawn[k] = draws_of(tensor, tensor.offset + i, k, *call.modes, c[k]);
    for (int j = 0; j < n; ++j) {
      float e[K];
      int32_t draw[K];
      for (int k = 0; k < K; ++k) e[k] = expert[k][j], draw[k] = draw_of(drawn[k], j);
      backward_element<K>(tensor, *call.modes, c, p, bounds, tensor.offset + i + j, g[j], theta[j], e, draw, sums);
    }
  }
}

void backward_cpu(const MergeCall& call, int64_t from, int64_t to, double* partial) {
  const merge3_modes& modes = *call.modes;
  const bool plain = modes.sparsify == MERGE3_KEEP_ALL && modes.elect == MERGE3_ELECT_NONE && !modes.normalize;
  dispatch_experts(modes.experts, [&](auto experts) {
    constexpr int K = decltype(experts)::value;
    call.chunks->each(call.table, from, to, [&](int64_t t, int64_t begin, int64_t end, int64_t chunk) {
      const merge3_coefficient* c = call.coefficients + t * K;
      double sums[2 * K + 1] = {};
      if (plain) backward_plain<K>(call.table[t], c, call.lambda[t], begin, end, sums);
      else backward_any<K>(call, call.table[t], c, call.lambda[t], begin, end, sums);
      std::copy(sums, sums + 2 * K + 1, partial + chunk * (2 * K + 1));
    });
  });
}

}  // namespace merge3
