// The C API: validates, spreads CPU work over threads, routes to the device. Nothing below this file
// checks its arguments again.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <exception>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>

#include "cpu/merge_cpu.h"
#include "cuda/launch.h"
#include "overlap.h"

namespace merge3 {
namespace {

thread_local char last_error[512] = "";

merge3_status fail(merge3_status status, const char* format, ...) {
  va_list args;
  va_start(args, format);
  vsnprintf(last_error, sizeof last_error, format, args);
  va_end(args);
  return status;
}

// Results larger than this do not come back from the caches soon: they are stored past them.
constexpr int64_t kCacheElements = int64_t(4) << 20;

void threads_for(void*, int64_t count, void (*body)(void*, int64_t, int64_t), void* arg) {
  const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(std::thread::hardware_concurrency(), count));
  std::vector<std::thread> threads;
  for (int64_t w = 1; w < workers; ++w)
    threads.emplace_back(body, arg, count * w / workers, count * (w + 1) / workers);
  body(arg, 0, count / workers);
  for (std::thread& thread : threads) thread.join();
}

template <class Body>
void parallel(const merge3_context& context, int64_t count, const Body& body) {
  if (count == 0) return;
  auto call = [](void* arg, int64_t begin, int64_t end) { (*static_cast<const Body*>(arg))(begin, end); };
  void* arg = const_cast<void*>(static_cast<const void*>(&body));
  if (context.executor) context.executor->parallel_for(context.executor->self, count, call, arg);
  else threads_for(nullptr, count, call, arg);
}

// The loops for one instruction set. Statistics read more than they compute: AVX2 is enough for them.
struct Loops {
  const char* name;
  bool usable;
  decltype(&merge_generic) merge;
  decltype(&gram_generic) gram;
  decltype(&order_statistics_generic) order_statistics;
};

// The best for this processor, or what MERGE3_CPU names (to compare them; the results are the same).
const Loops& loops() {
  static const Loops chosen = [] {
    Loops best{"generic", true, merge_generic, gram_generic, order_statistics_generic};
    const char* wanted = getenv("MERGE3_CPU");
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    for (const Loops& better : {Loops{"avx2", avx2, merge_avx2, gram_avx2, order_statistics_avx2},
                                Loops{"avx512", avx512, merge_avx512, gram_avx2, order_statistics_avx2}})
      if (better.usable && !(wanted && !strcmp(wanted, best.name))) best = better;
#endif
    if (wanted && strcmp(wanted, best.name))
      throw std::runtime_error(std::string("MERGE3_CPU=") + wanted + ": expected generic, avx2 or avx512, one this processor has");
    return best;
  }();
  return chosen;
}

merge3_status check_experts(int32_t experts) {
  if (experts < 1 || experts > MERGE3_MAX_EXPERTS)
    return fail(MERGE3_INVALID_ARGUMENT, "%d experts: expected 1 to %d", int(experts), MERGE3_MAX_EXPERTS);
  return MERGE3_OK;
}

merge3_status check_modes(const merge3_modes* modes) {
  if (!modes) return fail(MERGE3_INVALID_ARGUMENT, "modes is NULL");
  if (modes->sparsify < 0 || modes->sparsify > MERGE3_SIGNS)
    return fail(MERGE3_INVALID_ARGUMENT, "sparsify %d: expected 0 to %d", int(modes->sparsify), MERGE3_SIGNS);
  if (modes->elect < 0 || modes->elect > MERGE3_ELECT_COUNT)
    return fail(MERGE3_INVALID_ARGUMENT, "elect %d: expected 0 to %d", int(modes->elect), MERGE3_ELECT_COUNT);
  return check_experts(modes->experts);
}

merge3_status check_context(const merge3_context* context) {
  if (!context) return fail(MERGE3_INVALID_ARGUMENT, "context is NULL");
  if (context->device != MERGE3_CPU && context->device != MERGE3_CUDA)
    return fail(MERGE3_INVALID_ARGUMENT, "device %d: expected MERGE3_CPU or MERGE3_CUDA", int(context->device));
#if !defined(MERGE3_WITH_CUDA)
  if (context->device == MERGE3_CUDA)
    return fail(MERGE3_UNSUPPORTED, "this build has no CUDA kernels: build with MERGE3_CUDA=1 where nvcc is installed");
#endif
  return MERGE3_OK;
}

merge3_status check(const merge3_context* context, int32_t experts, int64_t tensors,
                    const merge3_tensor* table, bool needs_out, bool needs_experts = true) {
  if (merge3_status s = check_context(context)) return s;
  if (merge3_status s = check_experts(experts)) return s;
  if (tensors < 0) return fail(MERGE3_INVALID_ARGUMENT, "%lld tensors", (long long)tensors);
  if (tensors > 0 && !table) return fail(MERGE3_INVALID_ARGUMENT, "the table is NULL");
  for (int64_t t = 0; t < tensors; ++t) {
    const merge3_tensor& x = table[t];
    if (x.numel < 0) return fail(MERGE3_INVALID_ARGUMENT, "tensor %lld: %lld elements", (long long)t, (long long)x.numel);
    if (x.dtype < 0 || x.dtype > MERGE3_BFLOAT16 || x.out_dtype < 0 || x.out_dtype > MERGE3_BFLOAT16)
      return fail(MERGE3_INVALID_ARGUMENT, "tensor %lld: unknown dtype", (long long)t);
    if (x.numel == 0) continue;
    if (needs_out && !x.out) return fail(MERGE3_INVALID_ARGUMENT, "tensor %lld: out is NULL", (long long)t);
    for (int k = 0; needs_experts && k < experts; ++k)
      if (!x.experts[k]) return fail(MERGE3_INVALID_ARGUMENT, "tensor %lld: expert %d is NULL", (long long)t, k);
    const auto misaligned = [](const void* data, int32_t dtype) { return reinterpret_cast<uintptr_t>(data) % uintptr_t(element_size(dtype)) != 0; };
    bool bad = misaligned(x.base, x.dtype) || (needs_out && misaligned(x.out, x.out_dtype));
    for (int k = 0; k < experts; ++k) bad |= misaligned(x.experts[k], x.dtype);
    if (bad) return fail(MERGE3_INVALID_ARGUMENT, "tensor %lld: an address that is no multiple of its element size", (long long)t);
  }
  if (needs_out) {
    const std::string overlap = find_overlap(table, tensors, experts);
    if (!overlap.empty()) return fail(MERGE3_INVALID_ARGUMENT, "%s: expected memory of its own (out may be its tensor's base)", overlap.c_str());
  }
  return MERGE3_OK;
}

merge3_status check_numbers(int64_t tensors, const void* coefficients, const void* lambda) {
  if (tensors > 0 && (!coefficients || !lambda)) return fail(MERGE3_INVALID_ARGUMENT, "coefficients or lambda is NULL");
  return MERGE3_OK;
}

// slices: the rows of a slice may begin and end in its neighbours.
merge3_status check_rows(const merge3_tensor* table, int64_t tensors, int32_t experts, const char* what, bool slices = false) {
  for (int64_t t = 0; t < tensors; ++t) {
    if (table[t].numel == 0) continue;
    if (table[t].columns < 1 || (!slices && table[t].numel % table[t].columns))
      return fail(MERGE3_INVALID_ARGUMENT, "tensor %lld: %s needs columns that divide its %lld elements, found %lld",
                  (long long)t, what, (long long)table[t].numel, (long long)table[t].columns);
    for (int k = 0; k < experts; ++k)
      if (!table[t].rank_tables[k])
        return fail(MERGE3_INVALID_ARGUMENT, "tensor %lld: %s needs a table for expert %d", (long long)t, what, k);
  }
  return MERGE3_OK;
}

merge3_status check_masks(const merge3_tensor* table, int64_t tensors, int32_t experts) {
  for (int64_t t = 0; t < tensors; ++t)
    for (int k = 0; table[t].numel && k < experts; ++k)
      if (!table[t].masks[k])
        return fail(MERGE3_INVALID_ARGUMENT, "tensor %lld: no mask for expert %d", (long long)t, k);
  return MERGE3_OK;
}

#if defined(MERGE3_WITH_CUDA)
merge3_status device_status(int code, const char* message) {
  return code == 0 ? MERGE3_OK : fail(MERGE3_DEVICE_ERROR, "CUDA error %d: %s", code, message);
}
#define MERGE3_ON_DEVICE(call) \
  if (context->device == MERGE3_CUDA) { int code = (call); return device_status(code, cuda_message(code)); }
#else
#define MERGE3_ON_DEVICE(call)
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
                             const merge3_tensor* table, int64_t* first) {
  return guarded([&]() -> merge3_status {
    if (merge3_status s = check_modes(modes)) return s;
    if (merge3_status s = check(context, modes->experts, tensors, table, true, modes->sparsify != MERGE3_SIGNS)) return s;
    if (modes->sparsify > MERGE3_KEEP_BAND)
      if (merge3_status s = check_masks(table, tensors, modes->experts)) return s;
    for (int64_t t = 0; t < tensors; ++t)
      if (table[t].offset < 0 || table[t].offset % kChunk)
        return fail(MERGE3_INVALID_ARGUMENT, "tensor %lld: a slice from element %lld: expected a multiple of %lld",
                    (long long)t, (long long)table[t].offset, (long long)kChunk);
    if (modes->sparsify == MERGE3_KEEP_RANKED)
      if (merge3_status s = check_rows(table, tensors, modes->experts, "a ranked keep", true)) return s;
    count_chunks(table, tensors, first);
    return MERGE3_OK;
  });
}

merge3_status merge3_merge_resident(const merge3_context* context, const merge3_modes* modes, int64_t tensors,
                                    int64_t chunks, const merge3_tensor* table, const int64_t* first,
                                    const merge3_coefficient* coefficients, const float* lambda) {
  return guarded([&]() -> merge3_status {
    if (merge3_status s = check_modes(modes)) return s;
    if (merge3_status s = check_context(context)) return s;
    if (merge3_status s = check_numbers(tensors, coefficients, lambda)) return s;
    if (tensors <= 0) return MERGE3_OK;
    MERGE3_ON_DEVICE(merge_resident_cuda(*modes, tensors, chunks, table, first, coefficients, lambda, context->stream));
    const ChunkRange range{first, tensors};
    const MergeCall call{modes, table, coefficients, lambda, &range, chunks * kChunk > kCacheElements};
    const bool packed = modes->sparsify > MERGE3_KEEP_BAND;
    const auto loop = loops().merge;
    parallel(*context, chunks, [&](int64_t from, int64_t to) { packed ? packed_cpu(call, from, to) : void(loop(call, from, to)); });
    return MERGE3_OK;
  });
}

merge3_status merge3_merge(const merge3_context* context, const merge3_modes* modes, int64_t tensors,
                           const merge3_tensor* table, const merge3_coefficient* coefficients,
                           const float* lambda) {
  return guarded([&]() -> merge3_status {
    std::vector<int64_t> first(size_t(std::max<int64_t>(tensors, 0)) + 1);
    if (merge3_status s = merge3_prepare(context, modes, tensors, table, first.data())) return s;
    if (merge3_status s = check_numbers(tensors, coefficients, lambda)) return s;
    MERGE3_ON_DEVICE(merge_cuda(*modes, tensors, table, coefficients, lambda, context->stream));
    return merge3_merge_resident(context, modes, tensors, first.back(), table, first.data(), coefficients, lambda);
  });
}

merge3_status merge3_merge_backward(const merge3_context* context, const merge3_modes* modes, int64_t tensors,
                                    const merge3_tensor* table, const merge3_coefficient* coefficients,
                                    const float* lambda, double* weight_gradient, double* rescale_gradient,
                                    double* lambda_gradient) {
  return guarded([&]() -> merge3_status {
    std::vector<int64_t> first(size_t(std::max<int64_t>(tensors, 0)) + 1);
    if (merge3_status s = merge3_prepare(context, modes, tensors, table, first.data())) return s;
    if (merge3_status s = check_numbers(tensors, coefficients, lambda)) return s;
    if (modes->sparsify > MERGE3_KEEP_BAND) return fail(MERGE3_UNSUPPORTED, "packed merges have no gradient");
    const ChunkRange range{first.data(), tensors};
    const int64_t width = 2 * modes->experts + 1;
    std::vector<double> partial(size_t(range.count() * width));
#if defined(MERGE3_WITH_CUDA)
    if (context->device == MERGE3_CUDA) {
      const int code = backward_cuda(*modes, tensors, table, coefficients, lambda, partial.data(), context->stream);
      if (code) return device_status(code, cuda_message(code));
    } else
#endif
    {
      const MergeCall call{modes, table, coefficients, lambda, &range, false};
      parallel(*context, range.count(), [&](int64_t from, int64_t to) { backward_cpu(call, from, to, partial.data()); });
    }
    for (int64_t t = 0; t < tensors; ++t) {
      double sums[2 * MERGE3_MAX_EXPERTS + 1] = {};
      for (int64_t c = first[size_t(t)]; c < first[size_t(t) + 1]; ++c)
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

merge3_status merge3_merged_linear(const merge3_context* context, const merge3_modes* modes, const merge3_tensor* tensor,
                                   const merge3_coefficient* coefficients, float lambda, const void* x, int64_t rows,
                                   const void* bias, void* y) {
  return guarded([&]() -> merge3_status {
    if (merge3_status s = check_modes(modes)) return s;
    if (merge3_status s = check(context, modes->experts, 1, tensor, false)) return s;
    if (context->device != MERGE3_CUDA || modes->sparsify > MERGE3_KEEP_BAND || tensor->dtype == MERGE3_FLOAT32)
      return fail(MERGE3_UNSUPPORTED, "merged_linear needs a GPU, an unpacked mode and a 16-bit dtype");
    if (merge3_status s = check_rows(tensor, 1, modes->sparsify == MERGE3_KEEP_RANKED ? modes->experts : 0, "merged_linear")) return s;
    if (rows < 0 || (rows && tensor->numel && (!x || !y))) return fail(MERGE3_INVALID_ARGUMENT, "%lld rows, or x or y is NULL", (long long)rows);
#if defined(MERGE3_WITH_CUDA)
    if (rows && tensor->numel) MERGE3_ON_DEVICE(linear_cuda(*modes, *tensor, coefficients, lambda, x, rows, bias, y, context->stream));
#else
    (void)coefficients, (void)lambda, (void)bias;
#endif
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
    MERGE3_ON_DEVICE(elementwise_cuda(rule, experts, tensors, table, scalars, per_expert, context->stream));
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
      const int code = gram_cuda(experts, tensors, table, partial.data(), context->stream);
      if (code) return device_status(code, cuda_message(code));
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
    MERGE3_ON_DEVICE(order_statistics_cuda(call, tensors, context->stream));
    // Pairs differ in size: the largest come first, and whoever is free takes the next.
    std::vector<int64_t> pairs(size_t(tensors * call.series()));
    std::iota(pairs.begin(), pairs.end(), int64_t(0));
    std::stable_sort(pairs.begin(), pairs.end(), [&](int64_t a, int64_t b) {
      return table[a / call.series()].numel > table[b / call.series()].numel;
    });
    std::atomic<size_t> next{0};
    parallel(*context, int64_t(pairs.size()), [&, pair = loops().order_statistics](int64_t, int64_t) {
      for (size_t i; (i = next++) < pairs.size();) pair(call, pairs[i]);
    });
    return MERGE3_OK;
  });
}

merge3_status merge3_rank_tables(const merge3_context* context, int32_t experts, int64_t tensors,
                                 const merge3_tensor* table, double* bin_l1) {
  return guarded([&]() -> merge3_status {
    if (merge3_status s = check(context, experts, tensors, table, false)) return s;
    if (merge3_status s = check_rows(table, tensors, experts, "a rank table")) return s;
    MERGE3_ON_DEVICE(rank_tables_cuda(experts, tensors, table, bin_l1, context->stream));
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
      const int code = pack_cuda(packing, experts, tensors, table, partial.data(), context->stream);
      if (code) return device_status(code, cuda_message(code));
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
