// What the C API refuses, each with a code and a message, and what it does for a table that stays.
// Prints one line per failed expectation; ends with their number.
#include <merge3/merge.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

static int failures = 0;

static void expect(const char* name, merge3_status found, merge3_status status, const char* message) {
  if (found == status && (status == MERGE3_OK || std::strstr(merge3_last_error(), message))) return;
  ++failures;
  std::printf("%s: status %d, \"%s\"; expected %d, \"%s\"\n", name, int(found), merge3_last_error(), int(status), message);
}

struct Case {
  std::vector<float> out = std::vector<float>(64), base = std::vector<float>(64, 1.0f), first = std::vector<float>(64, 2.0f),
                     second = std::vector<float>(64, 4.0f);
  merge3_tensor tensor{};
  merge3_coefficient coefficients[2]{};
  float lambda = 1.0f;
  merge3_modes modes{};
  merge3_context context{MERGE3_CPU, nullptr, nullptr, 0};

  Case() {
    tensor.out = out.data(), tensor.base = base.data();
    tensor.experts[0] = first.data(), tensor.experts[1] = second.data();
    tensor.numel = 64, tensor.columns = 8;
    for (auto& c : coefficients) c = {0.5f, 1.0f, 0.0f, 1.0f, INFINITY, 1.0f, 1.0f, 0.0f};
    modes.experts = 2;
  }
  merge3_status merge() { return merge3_merge(&context, &modes, 1, &tensor, coefficients, &lambda); }
};

static void refused(const char* name, const char* message, const std::function<void(Case&)>& change,
                    merge3_status status = MERGE3_INVALID_ARGUMENT) {
  Case c;
  change(c);
  expect(name, c.merge(), status, message);
  for (float x : c.out)
    if (x != 0.0f) {
      ++failures;
      std::printf("%s: wrote something\n", name);
      return;
    }
}

int main() {
  Case good;
  expect("merge", good.merge(), MERGE3_OK, "");
  if (good.out[5] != 3.0f) ++failures, std::printf("merge: %g\n", double(good.out[5]));

  refused("no experts", "0 experts: expected 1 to 8", [](Case& c) { c.modes.experts = 0; });
  refused("nine experts", "9 experts: expected 1 to 8", [](Case& c) { c.modes.experts = 9; });
  refused("sparsify", "sparsify 7: expected 0 to 6", [](Case& c) { c.modes.sparsify = 7; });
  refused("elect", "elect -1: expected 0 to 2", [](Case& c) { c.modes.elect = -1; });
  refused("device", "device 3: expected MERGE3_CPU or MERGE3_CUDA", [](Case& c) { c.context.device = 3; });
  refused("no expert", "tensor 0: expert 1 is NULL", [](Case& c) { c.tensor.experts[1] = nullptr; });
  refused("dtype", "tensor 0: unknown dtype", [](Case& c) { c.tensor.dtype = 5; });
  refused("numel", "tensor 0: -1 elements", [](Case& c) { c.tensor.numel = -1; });
  refused("offset", "tensor 0: a slice from element 12: expected a multiple of 65536", [](Case& c) { c.tensor.offset = 12; });
  refused("misaligned", "tensor 0: an address that is no multiple",
          [](Case& c) { c.tensor.base = reinterpret_cast<char*>(c.base.data()) + 1, c.tensor.numel = 8; });
  refused("overlap", "expert 0 of tensor 0 overlaps out of tensor 0", [](Case& c) { c.tensor.experts[0] = c.out.data() + 8; });
  refused("ranks", "tensor 0: a ranked keep needs a table for expert 0", [](Case& c) { c.modes.sparsify = MERGE3_KEEP_RANKED; });
  refused("columns", "tensor 0: a ranked keep needs columns", [](Case& c) { c.modes.sparsify = MERGE3_KEEP_RANKED, c.tensor.columns = 0; });
  refused("masks", "tensor 0: no mask for expert 0", [](Case& c) { c.modes.sparsify = MERGE3_KEEP_MASK; });
  if (!std::strstr(merge3_build(), "cuda"))
    refused("cuda", "this build has no CUDA kernels: build with MERGE3_CUDA=1", [](Case& c) { c.context.device = MERGE3_CUDA; },
            MERGE3_UNSUPPORTED);
  {
    Case c;
    c.tensor.out = nullptr;
    expect("no out", c.merge(), MERGE3_INVALID_ARGUMENT, "tensor 0: out is NULL");
    c.tensor.out = c.out.data();
    expect("no modes", merge3_merge(&c.context, nullptr, 1, &c.tensor, c.coefficients, &c.lambda), MERGE3_INVALID_ARGUMENT, "modes is NULL");
    expect("no context", merge3_merge(nullptr, &c.modes, 1, &c.tensor, c.coefficients, &c.lambda), MERGE3_INVALID_ARGUMENT, "context is NULL");
    expect("no table", merge3_merge(&c.context, &c.modes, 1, nullptr, c.coefficients, &c.lambda), MERGE3_INVALID_ARGUMENT, "the table is NULL");
    expect("no coefficients", merge3_merge(&c.context, &c.modes, 1, &c.tensor, nullptr, &c.lambda), MERGE3_INVALID_ARGUMENT, "coefficients or lambda");
    expect("negative", merge3_merge(&c.context, &c.modes, -1, &c.tensor, c.coefficients, &c.lambda), MERGE3_INVALID_ARGUMENT, "-1 tensors");
    expect("nothing", merge3_merge(&c.context, &c.modes, 0, nullptr, nullptr, nullptr), MERGE3_OK, "");
    double gram[9];
    expect("gram", merge3_gram(&c.context, 2, 1, &c.tensor, gram), MERGE3_OK, "");
    if (gram[4] != 64.0 || gram[8] != 9 * 64.0) ++failures, std::printf("gram: %g %g\n", gram[4], gram[8]);
    expect("rule", merge3_elementwise(&c.context, 9, 2, 1, &c.tensor, &c.lambda, &c.lambda), MERGE3_INVALID_ARGUMENT, "rule 9: expected 0 to 4");
    expect("nearswap", merge3_elementwise(&c.context, MERGE3_NEARSWAP, 2, 1, &c.tensor, &c.lambda, &c.lambda), MERGE3_INVALID_ARGUMENT,
           "rule 0 takes 1 expert, found 2");
  }
  {  // A table prepared once, merged with other coefficients each time.
    Case c;
    merge3_plan plan;
    merge3_block blocks[1] = {{7, 7}};
    expect("count", merge3_prepare(&c.context, &c.modes, 1, &c.tensor, &plan, nullptr), MERGE3_OK, "");
    expect("no plan", merge3_prepare(&c.context, &c.modes, 1, &c.tensor, nullptr, nullptr), MERGE3_INVALID_ARGUMENT, "plan is NULL");
    expect("prepare", merge3_prepare(&c.context, &c.modes, 1, &c.tensor, &plan, blocks), MERGE3_OK, "");
    if (plan.blocks[0] + plan.blocks[1 + c.tensor.dtype] != 1 || blocks[0].tensor || blocks[0].chunk) ++failures, std::printf("plan\n");
    for (float weight : {0.25f, 1.0f}) {
      for (auto& x : c.coefficients) x.weight = weight;
      expect("resident", merge3_merge_resident(&c.context, &c.modes, 1, &plan, &c.tensor, blocks, c.coefficients, &c.lambda), MERGE3_OK, "");
      if (c.out[63] != 1.0f + weight * 4.0f) ++failures, std::printf("resident: %g\n", double(c.out[63]));
    }
  }
  {  // Two merges of the same inputs at once, and one that has another size.
    Case c, other;
    other.tensor.experts[0] = c.tensor.experts[0], other.tensor.experts[1] = c.tensor.experts[1], other.tensor.base = c.tensor.base;
    for (auto& x : c.coefficients) x.weight = 0.25f;
    const merge3_prepared both[2] = {{&c.modes, nullptr, &c.tensor, nullptr, c.coefficients, &c.lambda},
                                     {&other.modes, nullptr, &other.tensor, nullptr, other.coefficients, &other.lambda}};
    expect("together", merge3_merge_together(&c.context, 2, 1, both), MERGE3_OK, "");
    if (c.out[63] != 2.0f || other.out[63] == 2.0f) ++failures, std::printf("together: %g %g\n", double(c.out[63]), double(other.out[63]));
    expect("none together", merge3_merge_together(&c.context, 0, 1, nullptr), MERGE3_OK, "");
    expect("no merges", merge3_merge_together(&c.context, 1, 1, nullptr), MERGE3_INVALID_ARGUMENT, "merges is NULL");
    other.tensor.numel = 32;
    expect("sizes", merge3_merge_together(&c.context, 2, 1, both), MERGE3_INVALID_ARGUMENT,
           "merges[1].table[0]: found 32 elements, expected 64, as in merges[0]");
    other.modes.elect = 9;
    expect("modes together", merge3_merge_together(&c.context, 2, 1, both), MERGE3_INVALID_ARGUMENT, "elect 9");
  }
  return failures;
}
