// What the C API refuses, and the message that says why. Nothing below api.cpp checks its arguments again.
#pragma once
#include <stdarg.h>
#include <stdio.h>

#include <string>

#include "chunks.h"
#include "overlap.h"

namespace merge3 {

inline thread_local char last_error[512] = "";

inline merge3_status fail(merge3_status status, const char* format, ...) {
  va_list args;
  va_start(args, format);
  vsnprintf(last_error, sizeof last_error, format, args);
  va_end(args);
  return status;
}

inline merge3_status check_experts(int32_t experts) {
  if (experts < 1 || experts > MERGE3_MAX_EXPERTS)
    return fail(MERGE3_INVALID_ARGUMENT, "%d experts: expected 1 to %d", int(experts), MERGE3_MAX_EXPERTS);
  return MERGE3_OK;
}

inline merge3_status check_modes(const merge3_modes* modes) {
  if (!modes) return fail(MERGE3_INVALID_ARGUMENT, "modes is NULL");
  if (modes->sparsify < 0 || modes->sparsify > MERGE3_SIGNS)
    return fail(MERGE3_INVALID_ARGUMENT, "sparsify %d: expected 0 to %d", int(modes->sparsify), MERGE3_SIGNS);
  if (modes->elect < 0 || modes->elect > MERGE3_ELECT_COUNT)
    return fail(MERGE3_INVALID_ARGUMENT, "elect %d: expected 0 to %d", int(modes->elect), MERGE3_ELECT_COUNT);
  return check_experts(modes->experts);
}

inline merge3_status check_context(const merge3_context* context) {
  if (!context) return fail(MERGE3_INVALID_ARGUMENT, "context is NULL");
  if (context->device != MERGE3_CPU && context->device != MERGE3_CUDA)
    return fail(MERGE3_INVALID_ARGUMENT, "device %d: expected MERGE3_CPU or MERGE3_CUDA", int(context->device));
  if (context->device == MERGE3_CUDA && context->device_index < 0)
    return fail(MERGE3_INVALID_ARGUMENT, "device_index %d: expected 0 or more", int(context->device_index));
#if !defined(MERGE3_WITH_CUDA)
  if (context->device == MERGE3_CUDA)
    return fail(MERGE3_UNSUPPORTED, "this build has no CUDA kernels: build with MERGE3_CUDA=1 where nvcc is installed");
#endif
  return MERGE3_OK;
}

inline merge3_status check(const merge3_context* context, int32_t experts, int64_t tensors,
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

inline merge3_status check_numbers(int64_t tensors, const void* coefficients, const void* lambda) {
  if (tensors > 0 && (!coefficients || !lambda)) return fail(MERGE3_INVALID_ARGUMENT, "coefficients or lambda is NULL");
  return MERGE3_OK;
}

// slices: the rows of a slice may begin and end in its neighbours.
inline merge3_status check_rows(const merge3_tensor* table, int64_t tensors, int32_t experts, const char* what, bool slices = false) {
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

inline merge3_status check_masks(const merge3_tensor* table, int64_t tensors, int32_t experts) {
  for (int64_t t = 0; t < tensors; ++t)
    for (int k = 0; table[t].numel && k < experts; ++k)
      if (!table[t].masks[k])
        return fail(MERGE3_INVALID_ARGUMENT, "tensor %lld: no mask for expert %d", (long long)t, k);
  return MERGE3_OK;
}

// What every merge of a table asks of it.
inline merge3_status check_merge(const merge3_context* context, const merge3_modes* modes, int64_t tensors, const merge3_tensor* table) {
  if (merge3_status s = check_modes(modes)) return s;
  if (merge3_status s = check(context, modes->experts, tensors, table, true, modes->sparsify != MERGE3_SIGNS)) return s;
  if (modes->sparsify > MERGE3_KEEP_BAND)
    if (merge3_status s = check_masks(table, tensors, modes->experts)) return s;
  for (int64_t t = 0; t < tensors; ++t)
    if (table[t].offset < 0 || table[t].offset % kChunk)
      return fail(MERGE3_INVALID_ARGUMENT, "tensor %lld: a slice from element %lld: expected a multiple of %lld", (long long)t,
                  (long long)table[t].offset, (long long)kChunk);
  if (modes->sparsify == MERGE3_KEEP_RANKED) return check_rows(table, tensors, modes->experts, "a ranked keep", true);
  return MERGE3_OK;
}

}  // namespace merge3
