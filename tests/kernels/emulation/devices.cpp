// Which GPU the C API makes the current one for each of its calls, and what it refuses while a graph is captured.
//
// The launchers are fakes that note the current device; the runtime is the emulated one, with two devices.
// Prints one line per failed expectation; ends with their number.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>

#include "../../../csrc/cuda/launch.h"
#include "cuda_runtime.h"

static int launched_on = -1;  // -1: no launcher was called

static int note() { return cudaGetDevice(&launched_on), 0; }

namespace merge3 {
using Table = const merge3_tensor*;
using Modes = const merge3_modes&;
using Coefficients = const merge3_coefficient*;
int merge_cuda(Modes, int64_t, Table, Coefficients, const float*, void*) { return note(); }
int merge_resident_cuda(Modes, const merge3_plan&, Table, const merge3_block*, Coefficients, const float*, void*) {
  return note();
}
int backward_cuda(Modes, int64_t, Table, Coefficients, const float*, double*, void*) { return note(); }
int pack_cuda(int32_t, int32_t, int64_t, Table, double*, void*) { return note(); }
int elementwise_cuda(int32_t, int32_t, int64_t, Table, const float*, const float*, void*) { return note(); }
int gram_cuda(int32_t, int64_t, Table, double*, void*) { return note(); }
int order_statistics_cuda(const OrderStatistics&, int64_t, void*) { return note(); }
int rank_tables_cuda(int32_t, int64_t, Table, double*, void*) { return note(); }
}  // namespace merge3

static int failures = 0;

static void expect(bool holds, const std::string& name, const char* what) {
  if (holds) return;
  ++failures;
  const char* said = merge3_last_error();
  std::printf("%s: expected %s; launched on %d, last error: %s\n", name.c_str(), what, launched_on, said);
}

int main() {
  uint16_t out[64] = {}, base[64] = {}, expert[64] = {};
  float ranks[64] = {};
  uint32_t masks[2] = {};
  merge3_tensor tensor{};
  tensor.out = out, tensor.base = base, tensor.experts[0] = expert;
  tensor.rank_tables[0] = ranks, tensor.masks[0] = masks;
  tensor.numel = 64, tensor.columns = 8, tensor.dtype = tensor.out_dtype = MERGE3_BFLOAT16;
  const merge3_coefficient c{0.5f, 1.0f, 0.0f, 1.0f, INFINITY, 1.0f, 1.0f, 0.0f};
  const float lambda = 1.0f;
  merge3_modes modes{};
  modes.experts = 1;
  const int64_t rank = 1;
  const merge3_plan plan{{1}};
  const merge3_block block{0, 0};
  double x[64];
  float value;
  int64_t n[3];
  merge3_context on{MERGE3_CUDA, nullptr, nullptr, 1};

  struct Call {
    const char* name;
    bool copies;  // refused while a graph is captured
    std::function<merge3_status()> run;
  };
  const Call calls[] = {
      {"merge", true, [&] { return merge3_merge(&on, &modes, 1, &tensor, &c, &lambda); }},
      {"resident", false, [&] { return merge3_merge_resident(&on, &modes, 1, &plan, &tensor, &block, &c, &lambda); }},
      {"together", false, [&] {
         const merge3_prepared own{&modes, &plan, &tensor, &block, &c, &lambda};
         const merge3_prepared both[2] = {own, own};
         return merge3_merge_together(&on, 2, 1, both);
       }},
      {"backward", true, [&] { return merge3_merge_backward(&on, &modes, 1, &tensor, &c, &lambda, x, x + 1, x + 2); }},
      {"elementwise", true, [&] { return merge3_elementwise(&on, MERGE3_UNIFY, 1, 1, &tensor, &lambda, &lambda); }},
      {"gram", true, [&] { return merge3_gram(&on, 1, 1, &tensor, x); }},
      {"order_statistics", true, [&] {
         return merge3_order_statistics(&on, MERGE3_MAGNITUDE, 1, 1, &tensor, 1, &rank, &value, n, n + 1, x, x + 1,
                                        n + 2);
       }},
      {"rank_tables", true, [&] { return merge3_rank_tables(&on, 1, 1, &tensor, x); }},
      {"pack", true, [&] { return merge3_pack(&on, MERGE3_PACK_SIGNS, 1, 1, &tensor, x); }},
  };
  const auto says = [](const char* words) { return std::strstr(merge3_last_error(), words) != nullptr; };
  const auto current = [] {
    int device = -1;
    cudaGetDevice(&device);
    return device;
  };
  for (const Call& call : calls)
    for (int outside : {0, 1})
      for (int index : {0, 1}) {
        cudaSetDevice(outside);
        on.device_index = index, launched_on = -1;
        const std::string name = call.name + (" on " + std::to_string(index)) + " from " + std::to_string(outside);
        expect(call.run() == MERGE3_OK, name, "success");
        expect(launched_on == index, name, "a launch on the device of the context");
        expect(current() == outside, name, "the caller's device as it was");
      }
  for (const Call& call : calls) {
    launched_on = -1;
    on.device_index = 2;
    expect(call.run() == MERGE3_DEVICE_ERROR && says("CUDA error 101"), call.name, "an invalid device");
    on.device_index = -1;
    expect(call.run() == MERGE3_INVALID_ARGUMENT && says("device_index -1: expected"), call.name, "a refused number");
    expect(launched_on == -1 && current() == 1, call.name, "nothing done");
  }
  on.device_index = 0;
  for (const char* how : {"1", "implicit"}) {
    setenv("MERGE3_TEST_CAPTURING", how, 1);
    for (const Call& call : calls) {
      launched_on = -1;
      const merge3_status status = call.run();
      if (call.copies)
        expect(status == MERGE3_UNSUPPORTED && launched_on == -1 && says("capture Prepared.launch"), call.name,
               "a refusal while a graph is captured");
      else
        expect(status == MERGE3_OK && launched_on == 0, call.name, "a launch while a graph is captured");
      expect(current() == 1, call.name, "the caller's device as it was");
    }
  }
  return failures;
}
