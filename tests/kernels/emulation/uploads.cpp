// What a call sends to a GPU and starts there: one copy, from pinned memory that nobody writes to before it has arrived,
// and one kernel for each dtype of its tensors. The emulated copy arrives late, when something on the stream needs it.
#include <stdio.h>

#include "../../../csrc/cuda/launch.cuh"

using namespace merge3;

static int failures = 0;
static void expect(bool holds, const char* what) {
  if (!holds) ++failures, puts(what);
}

int main() {
  {  // Two under way at once, and then many in turn.
    std::vector<int> first(100000, 1), second(3, 2);
    Upload a(nullptr), b(nullptr);
    const auto ones = a.add(first.data(), first.size());
    const auto tail = a.add(second.data(), second.size());
    const auto twos = b.add(second.data(), second.size());
    expect(a.send() == cudaSuccess && b.send() == cudaSuccess, "sent");
    expect(emulation::copies == 2 && emulation::pinned.size() == 2, "a copy each, from a piece of memory each");
    cudaStreamSynchronize(nullptr);
    expect(a.at(ones)[0] == 1 && a.at(ones)[99999] == 1 && a.at(tail)[2] == 2, "the first is whole");
    expect(b.at(twos)[0] == 2 && b.at(twos)[2] == 2, "the second too");
    expect(reinterpret_cast<uintptr_t>(a.at(tail)) % 16 == 0, "each array at a multiple of 16 bytes");
    for (int i = 0; i < 50; ++i) {
      Upload next(nullptr);
      next.add(second.data(), second.size());
      expect(next.send() == cudaSuccess, "sent again");
      cudaStreamSynchronize(nullptr);
    }
    expect(emulation::pinned.size() == 2, "memory serves again when its copy has arrived");
  }
  alignas(16) uint16_t base[64], expert[64], out[64], odd[64];
  alignas(16) float wide[64];
  std::fill_n(base, 64, 0x3f80), std::fill_n(expert, 64, 0x4040);  // 1 and 3
  const auto tensor = [&](void* to, int32_t out_dtype, int64_t numel) {
    merge3_tensor t{};
    t.out = to, t.base = base, t.experts[0] = expert, t.numel = t.columns = numel;
    t.dtype = MERGE3_BFLOAT16, t.out_dtype = out_dtype;
    return t;
  };
  const merge3_tensor table[] = {tensor(out, MERGE3_BFLOAT16, 64), tensor(wide, MERGE3_FLOAT32, 64), tensor(odd, MERGE3_BFLOAT16, 61)};
  const merge3_coefficient c{0.5f, 1.0f, 0.0f, 1.0f, INFINITY, 1.0f, 1.0f, 0.0f}, all[] = {c, c, c};
  const float lambda[] = {1.0f, 1.0f, 1.0f};
  merge3_modes modes{};
  modes.experts = 1;
  const auto merged = [&](int64_t tensors) {
    emulation::copies = emulation::launches = 0;
    return merge_cuda(modes, tensors, table, all, lambda, nullptr) == cudaSuccess;
  };
  expect(merged(1) && emulation::copies == 1 && emulation::launches == 1, "one dtype: one copy, one launch");
  expect(merged(3) && emulation::copies == 1 && emulation::launches == 2, "and one for what is of two, or ends within a group");
  expect(out[63] == 0x4000 && wide[63] == 2.0f && odd[60] == 0x4000, "merged");
  double sums[9];
  emulation::copies = 0;
  expect(gram_cuda(1, 1, table, sums, nullptr) == cudaSuccess && emulation::copies == 1, "a Gram matrix: one copy");
  expect(backward_cuda(modes, 3, table, all, lambda, sums, nullptr) == cudaSuccess && emulation::copies == 2, "a gradient: one copy");
  return failures;
}
