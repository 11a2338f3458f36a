// The C API: validates, spreads CPU work over threads, routes to the device. Nothing below this file
// checks its arguments again.
#include <exception>
#include <numeric>
#include <stdexcept>
#include <string>

#include "checks.h"
#include "cpu/loops.h"
#include "cpu/threads.h"
#include "cuda/launch.h"
#include "plan.h"

namespace merge3 {
namespace {

// Bytes. Results larger than this do not come back from the caches soon: they are stored past them.
constexpr int64_t kCached = int64_t(16) << 20;

#if defined(MERGE3_WITH_CUDA)
// What a launcher does besides launching: kCopies, it exchanges memory with the host while it is called. A graph
// would keep the address of that memory, and read it again when nothing is there any more.
enum Does { kLaunches, kCopies };

// Calls a launcher with the context's GPU as the current device.
template <class Launcher>
merge3_status on_device(const merge3_context& context, Does does, const Launcher& launcher) {
  const DeviceScope scope(context.device_index);
  int code = scope.status;
  bool capturing = false;
  if (!code && does == kCopies) code = find_capture(context.stream, &capturing);
  if (capturing)
    return fail(MERGE3_UNSUPPORTED,
                "a CUDA graph is being captured, and this call copies between the host and the GPU, which the graph "
                "could not repeat: capture Prepared.launch (merge3_merge_resident)");
  if (!code) code = launcher();
  return code == 0 ? MERGE3_OK : fail(MERGE3_DEVICE_ERROR, "CUDA error %d: %s", code, cuda_message(code));
}
// Launches one merge after the other, up to the first that fails.
template <class Launcher>
int launch_each(int32_t count, const merge3_prepared* merges, const Launcher& launcher) {
  for (int32_t i = 0; i < count; ++i)
    if (int code = launcher(merges[i])) return code;
  return 0;
}
#define MERGE3_ON_DEVICE(does, call) \
  if (context->device == MERGE3_CUDA) return on_device(*context, does, [&] { return call; })
#else
#define MERGE3_ON_DEVICE(does, call)
#endif

// Exceptions (bad_alloc, a thread that cannot start) must not cross the C boundary.
template <class Body>
merge3_status guarded(const Body& body) {
  try {
    return body();
  } catch (const std::exception& error) {
    return fail(MERGE3_DEVICE_ERROR, "%s", error.what());
  }
}

}  // namespace
}  // namespace merge3

using namespace merge3;

extern "C" {

merge3_status merge3_prepare(const merge3_context* context, const merge3_modes* modes, int64_t tensors,
                             const merge3_tensor* table, merge3_plan* plan, merge3_block* blocks) {
  return guarded([&]() -> merge3_status {
    if (merge3_status s = check_merge(context, modes, tensors, table)) return s;
    if (!plan) return fail(MERGE3_INVALID_ARGUMENT, "plan is NULL");
    *plan = plan_merge(*modes, tensors, table, blocks);
    return MERGE3_OK;
  });
}

merge3_status merge3_merge_resident(const merge3_context* context, const merge3_modes* modes, int64_t tensors,
                                    const merge3_plan* plan, const merge3_tensor* table, const merge3_block* blocks,
                                    const merge3_coefficient* coefficients, const float* lambda) {
  const merge3_prepared one{modes, plan, table, blocks, coefficients, lambda};
  return merge3_merge_together(context, 1, tensors, &one);
}

merge3_status merge3_merge_together(const merge3_context* context, int32_t count, int64_t tensors,
                                    const merge3_prepared* merges) {
  return guarded([&]() -> merge3_status {
    if (merge3_status s = check_context(context)) return s;
    if (count > 0 && !merges) return fail(MERGE3_INVALID_ARGUMENT, "merges is NULL");
    for (int32_t i = 0; i < count; ++i) {
      const merge3_prepared& own = merges[i];
      if (merge3_status s = check_modes(own.modes)) return s;
      if (merge3_status s = check_numbers(tensors, own.coefficients, own.lambda)) return s;
      if (tensors > 0 && context->device == MERGE3_CUDA && (!own.plan || !own.blocks))
        return fail(MERGE3_INVALID_ARGUMENT, "plan or blocks is NULL");
    }
    if (tensors <= 0 || count <= 0) return MERGE3_OK;
    MERGE3_ON_DEVICE(kLaunches, launch_each(count, merges, [&](const merge3_prepared& own) {
      return merge_resident_cuda(*own.modes, *own.plan, own.table, own.blocks, own.coefficients, own.lambda, context->stream);
    }));
    const Chunks range(merges[0].table, tensors);
    int64_t bytes = 0;
    for (int64_t t = 0; t < tensors; ++t)
      for (int32_t i = 0; i < count; ++i) {
        const merge3_tensor& own = merges[i].table[t];
        if (own.numel != merges[0].table[t].numel)
          return fail(MERGE3_INVALID_ARGUMENT, "merges[%d].table[%lld]: found %lld elements, expected %lld, as in merges[0]", int(i),
                      (long long)t, (long long)own.numel, (long long)merges[0].table[t].numel);
        bytes += own.numel * element_size(own.out_dtype);
      }
    const Loops& loop = loops();
    parallel(*context, range.count(), [&](int64_t from, int64_t to) {
      for (int32_t i = 0; i < count; ++i) {
        const merge3_prepared& own = merges[i];
        const MergeCall call{own.modes, own.table, own.coefficients, own.lambda, &range, bytes > kCached};
        if (own.modes->sparsify > MERGE3_KEEP_BAND) loop.packed(call, from, to);
        else loop.merge(call, from, to);
      }
    });
    return MERGE3_OK;
  });
}

merge3_status merge3_merge(const merge3_context* context, const merge3_modes* modes, int64_t tensors,
                           const merge3_tensor* table, const merge3_coefficient* coefficients,
                           const float* lambda) {
  return guarded([&]() -> merge3_status {
    if (merge3_status s = check_merge(context, modes, tensors, table)) return s;
    if (merge3_status s = check_numbers(tensors, coefficients, lambda)) return s;
    MERGE3_ON_DEVICE(kCopies, merge_cuda(*modes, tensors, table, coefficients, lambda, context->stream));
    return merge3_merge_resident(context, modes, tensors, nullptr, table, nullptr, coefficients, lambda);
  });
}

merge3_status merge3_merge_backward(const merge3_context* context, const merge3_modes* modes, int64_t tensors,
                                    const merge3_tensor* table, const merge3_coefficient* coefficients,
                                    const float* lambda, double* weight_gradient, double* rescale_gradient,
                                    double* lambda_gradient) {
  return guarded([&]() -> merge3_status {
    if (merge3_status s = check_merge(context, modes, tensors, table)) return s;
    if (merge3_status s = check_numbers(tensors, coefficients, lambda)) return s;
    if (modes->sparsify > MERGE3_KEEP_BAND) return fail(MERGE3_UNSUPPORTED, "packed merges have no gradient");
    const Chunks range(table, tensors);
    const int64_t width = 2 * modes->experts + 1;
    std::vector<double> partial(size_t(range.count() * width));
#if defined(MERGE3_WITH_CUDA)
    if (context->device == MERGE3_CUDA) {
      const auto launcher = [&] {
        return backward_cuda(*modes, tensors, table, coefficients, lambda, partial.data(), context->stream);
      };
      if (merge3_status s = on_device(*context, kCopies, launcher)) return s;
    } else
#endif
    {
      const MergeCall call{modes, table, coefficients, lambda, &range, false};
      parallel(*context, range.count(), [&](int64_t from, int64_t to) { backward_cpu(call, from, to, partial.data()); });
    }
    for (int64_t t = 0; t < tensors; ++t) {
      double sums[2 * MERGE3_MAX_EXPERTS + 1] = {};
      for (int64_t c = range.first[t]; c < range.first[t + 1]; ++c)
        for (int64_t s = 0; s < width; ++s) sums[s] += partial[size_t(c * width + s)];
      for (int32_t k = 0; k < modes->experts; ++k) {
        weight_gradient[t * modes->experts + k] = sums[2 * k];
        rescale_gradient[t * modes->experts + k] = sums[2 * k + 1];
      }
      lambda_gradient[t] = sums[width - 1];
    }
    return MERGE3_OK;
  });
}

merge3_status merge3_elementwise(const merge3_context* context, int32_t rule, int32_t experts,
                                 int64_t tensors, const merge3_tensor* table, const float* scalars,
                                 const float* per_expert) {
  return guarded([&]() -> merge3_status {
    if (merge3_status s = check(context, experts, tensors, table, true)) return s;
    if (rule < 0 || rule > MERGE3_UNIFY)
      return fail(MERGE3_INVALID_ARGUMENT, "rule %d: expected 0 to %d", int(rule), MERGE3_UNIFY);
    if (rule <= MERGE3_ARCEE_FUSION && experts != 1)
      return fail(MERGE3_INVALID_ARGUMENT, "rule %d takes 1 expert, found %d", int(rule), int(experts));
    if (rule == MERGE3_ARCEE_FUSION)
      if (merge3_status s = check_rows(table, tensors, 1, "arcee_fusion")) return s;
    MERGE3_ON_DEVICE(kCopies, elementwise_cuda(rule, experts, tensors, table, scalars, per_expert, context->stream));
    const Chunks chunks(table, tensors);
    const ElementwiseCall call{rule, experts, table, scalars, per_expert, &chunks};
    parallel(*context, chunks.count(), [&](int64_t from, int64_t to) { elementwise_cpu(call, from, to); });
    return MERGE3_OK;
  });
}

merge3_status merge3_gram(const merge3_context* context, int32_t experts, int64_t tensors,
                          const merge3_tensor* table, double* gram) {
  return guarded([&]() -> merge3_status {
    if (merge3_status s = check(context, experts, tensors, table, false)) return s;
    const Chunks chunks(table, tensors);
    const int vectors = experts + 1, pairs = vectors * (vectors + 1) / 2;
    std::vector<double> partial(size_t(chunks.count() * pairs));
#if defined(MERGE3_WITH_CUDA)
    if (context->device == MERGE3_CUDA) {
      const auto launcher = [&] { return gram_cuda(experts, tensors, table, partial.data(), context->stream); };
      if (merge3_status s = on_device(*context, kCopies, launcher)) return s;
    } else
#endif
      parallel(*context, chunks.count(), [&, gram_span = loops().gram](int64_t from, int64_t to) {
        gram_span(table, experts, chunks, from, to, partial.data());
      });
    for (int64_t t = 0; t < tensors; ++t) {
      double* g = gram + t * vectors * vectors;
      for (int a = 0, p = 0; a < vectors; ++a)
        for (int b = a; b < vectors; ++b, ++p) {
          double sum = 0.0;
          for (int64_t c = chunks.first[t]; c < chunks.first[t + 1]; ++c)
            sum += partial[size_t(c * pairs + p)];
          g[a * vectors + b] = g[b * vectors + a] = sum;
        }
    }
    return MERGE3_OK;
  });
}

merge3_status merge3_order_statistics(const merge3_context* context, int32_t statistic, int32_t experts,
                                      int64_t tensors, const merge3_tensor* table, int64_t rank_count,
                                      const int64_t* ranks, float* value, int64_t* greater,
                                      int64_t* equal, double* l1_greater, double* total,
                                      int64_t* nonzero) {
  return guarded([&]() -> merge3_status {
    if (merge3_status s = check(context, experts, tensors, table, false)) return s;
    if (statistic != MERGE3_MAGNITUDE && statistic != MERGE3_VARIANCE)
      return fail(MERGE3_INVALID_ARGUMENT, "statistic %d: expected 0 or 1", int(statistic));
    const OrderStatistics call{statistic, experts, table, rank_count, ranks, value,
                               greater, equal, l1_greater, total, nonzero};
    MERGE3_ON_DEVICE(kCopies, order_statistics_cuda(call, tensors, context->stream));
    // Pairs differ in size: the largest come first, and whoever is free takes the next.
    std::vector<int64_t> pairs(size_t(tensors * call.series()));
    std::iota(pairs.begin(), pairs.end(), int64_t(0));
    std::stable_sort(pairs.begin(), pairs.end(), [&](int64_t a, int64_t b) {
      return table[a / call.series()].numel > table[b / call.series()].numel;
    });
    parallel(*context, int64_t(pairs.size()), [&, pair = loops().order_statistics](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) pair(call, pairs[size_t(i)]);
    });
    return MERGE3_OK;
  });
}

merge3_status merge3_rank_tables(const merge3_context* context, int32_t experts, int64_t tensors,
                                 const merge3_tensor* table, double* bin_l1) {
  return guarded([&]() -> merge3_status {
    if (merge3_status s = check(context, experts, tensors, table, false)) return s;
    if (merge3_status s = check_rows(table, tensors, experts, "a rank table")) return s;
    MERGE3_ON_DEVICE(kCopies, rank_tables_cuda(experts, tensors, table, bin_l1, context->stream));
    parallel(*context, tensors * experts, [&](int64_t from, int64_t to) {
      rank_tables_cpu(table, experts, from, to, bin_l1);
    });
    return MERGE3_OK;
  });
}

merge3_status merge3_pack(const merge3_context* context, int32_t packing, int32_t experts, int64_t tensors,
                          const merge3_tensor* table, double* sums) {
  return guarded([&]() -> merge3_status {
    if (packing != MERGE3_PACK_SIGNS && packing != MERGE3_PACK_AGREEMENT)
      return fail(MERGE3_INVALID_ARGUMENT, "packing %d: expected 0 or 1", int(packing));
    if (merge3_status s = check(context, experts, tensors, table, false)) return s;
    if (merge3_status s = check_masks(table, tensors, experts)) return s;
    for (int64_t t = 0; packing == MERGE3_PACK_AGREEMENT && t < tensors; ++t)
      if (table[t].numel && !table[t].out) return fail(MERGE3_INVALID_ARGUMENT, "tensor %lld: no unified model", (long long)t);
    const Chunks chunks(table, tensors);
    const int64_t width = 2 * experts;
    std::vector<double> partial(size_t(chunks.count() * width));
#if defined(MERGE3_WITH_CUDA)
    if (context->device == MERGE3_CUDA) {
      const auto launcher = [&] {
        return pack_cuda(packing, experts, tensors, table, partial.data(), context->stream);
      };
      if (merge3_status s = on_device(*context, kCopies, launcher)) return s;
    } else
#endif
    {
      const PackCall call{packing, experts, table, &chunks};
      parallel(*context, chunks.count(), [&](int64_t from, int64_t to) { pack_cpu(call, from, to, partial.data()); });
    }
    std::fill(sums, sums + tensors * width, 0.0);
    for (int64_t t = 0; t < tensors; ++t)
      for (int64_t c = chunks.first[t]; c < chunks.first[t + 1]; ++c)
        for (int64_t s = 0; s < width; ++s) sums[t * width + s] += partial[size_t(c * width + s)];
    return MERGE3_OK;
  });
}

const char* merge3_last_error(void) { return last_error; }

const char* merge3_cpu(void) {
  try {
    return loops().name;
  } catch (const std::exception& error) {
    fail(MERGE3_INVALID_ARGUMENT, "%s", error.what());
    return "";
  }
}

const char* merge3_build(void) {
#if defined(MERGE3_WITH_CUDA)
  return "cpu cuda";
#else
  return "cpu";
#endif
}

}  // extern "C"
