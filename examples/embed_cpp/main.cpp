// A TIES merge of two experts through the C API, with neither torch nor Python.
#include <merge3/merge.h>

#include <cmath>
#include <cstdio>
#include <vector>

static bool ok(merge3_status status) {
  if (status != MERGE3_OK) std::fprintf(stderr, "merge3: %s\n", merge3_last_error());
  return status == MERGE3_OK;
}

int main() {
  const int64_t n = 1000;
  std::vector<float> base(n), first(n), second(n), out(n);
  for (int64_t i = 0; i < n; ++i) {
    base[i] = std::sin(float(i));
    first[i] = base[i] + 0.01f * std::sin(7.0f * float(i));
    second[i] = base[i] + 0.01f * std::cos(3.0f * float(i));
  }

  merge3_tensor tensor{};
  tensor.out = out.data();
  tensor.base = base.data();
  tensor.experts[0] = first.data();
  tensor.experts[1] = second.data();
  tensor.numel = n;
  tensor.columns = n;
  tensor.dtype = tensor.out_dtype = MERGE3_FLOAT32;
  const merge3_context context{MERGE3_CPU, nullptr, nullptr};

  // Keep the largest half of each task vector: the magnitude at rank n / 2 is the threshold.
  const int64_t rank = n / 2;
  float value[2];
  int64_t greater[2], equal[2], nonzero[2];
  double l1[2], total[2];
  if (!ok(merge3_order_statistics(&context, MERGE3_MAGNITUDE, 2, 1, &tensor, 1, &rank, value, greater, equal, l1, total, nonzero))) return 1;

  merge3_coefficient coefficients[2]{};
  for (int k = 0; k < 2; ++k) {
    coefficients[k].weight = 0.5f;
    coefficients[k].rescale = 1.0f;
    coefficients[k].lo = value[k];
    coefficients[k].lo_share = float(rank - greater[k]) / float(equal[k]);
    coefficients[k].hi = INFINITY;
    coefficients[k].hi_share = 1.0f;
    coefficients[k].density = 1.0f;
  }
  merge3_modes modes{};
  modes.experts = 2;
  modes.sparsify = MERGE3_KEEP_MAGNITUDE;
  modes.elect = MERGE3_ELECT_SUM;
  modes.normalize = 1;
  const float lambda = 1.0f;
  if (!ok(merge3_merge(&context, &modes, 1, &tensor, coefficients, &lambda))) return 1;

  // What was merged, against the formula written out.
  double worst = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    double sum = 0.0, weights = 0.0, c[2];
    for (int k = 0; k < 2; ++k) {
      const float tau = (k ? second : first)[i] - base[i];
      c[k] = std::fabs(tau) >= value[k] ? 0.5 * tau : 0.0;
    }
    const double sign = c[0] + c[1] >= 0 ? 1.0 : -1.0;
    for (double x : c)
      if (x != 0.0 && (x > 0 ? 1.0 : -1.0) == sign) sum += x, weights += 0.5;
    worst = std::fmax(worst, std::fabs(out[i] - (base[i] + (weights ? sum / weights : 0.0))));
  }
  std::printf("merge3 (%s, %s): largest difference to the formula %.2g\n", merge3_build(), merge3_cpu(), worst);

  // Mistakes are told, not fatal.
  modes.experts = 9;
  if (merge3_merge(&context, &modes, 1, &tensor, coefficients, &lambda) != MERGE3_INVALID_ARGUMENT) return 1;
  std::printf("nine experts: %s\n", merge3_last_error());
  return worst < 1e-6 ? 0 : 1;
}
