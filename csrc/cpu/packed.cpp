// Merges whose keeps, or whole task vectors, are one bit per element; and the making of those bits.
#include "../dispatch.h"
#include "merge_cpu.h"
#include "storage.h"

namespace merge3 {
namespace {

constexpr int kBlock = 512;

// Eight bits as eight lanes.
i32x8 lanes_of(uint32_t byte) {
  const i32x8 place = {1, 2, 4, 8, 16, 32, 64, 128};
  return (same<i32x8>(int32_t(byte)) & place) != 0;
}

template <int K>
void merge_chunk(const MergeCall& call, int64_t t, int64_t begin, int64_t end) {
  const merge3_tensor& tensor = call.table[t];
  const auto p = prepare<f32x8, K>(call.coefficients + t * K, call.lambda[t], tensor.base != nullptr);
  const bool reads = call.modes->sparsify == MERGE3_KEEP_MASK;
  alignas(32) float theta[kBlock] = {}, expert[K][kBlock] = {}, out[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int n = int(std::min<int64_t>(end - at, kBlock));
    load_block(tensor.dtype, tensor.base, at, n, theta);
    for (int k = 0; reads && k < K; ++k) load_block(tensor.dtype, tensor.experts[k], at, n, expert[k]);
    for (int j = 0; j < n; j += 8) {
      const int64_t element = tensor.offset + at + j;
      f32x8 e[K];
      i32x8 bit[K];
      for (int k = 0; k < K; ++k) {
        e[k] = load8<Float32>(expert[k], j);
        bit[k] = lanes_of(tensor.masks[k][element / 32] >> (element % 32));
      }
      const f32x8 merged = packed_element<K>(load8<Float32>(theta, j), e, bit, p, *call.modes);
      memcpy(out + j, &merged, sizeof merged);
    }
    store_block(tensor.out_dtype, tensor.out, at, n, out, call.stream);
  }
}

}  // namespace

void packed_cpu(const MergeCall& call, int64_t from, int64_t to) {
  dispatch_experts(call.modes->experts, [&](auto k) {
    call.chunks->each(call.table, from, to, [&](int64_t t, int64_t begin, int64_t end, int64_t) {
      merge_chunk<decltype(k)::value>(call, t, begin, end);
    });
  });
}

void pack_cpu(const PackCall& call, int64_t from, int64_t to, double* partial) {
  float theta[32], expert[32], unified[32] = {};
  call.chunks->each(call.table, from, to, [&](int64_t t, int64_t begin, int64_t end, int64_t chunk) {
    const merge3_tensor& tensor = call.table[t];
    for (int k = 0; k < call.experts; ++k) {
      double all = 0.0, set = 0.0;
      for (int64_t i = begin; i < end; i += 32) {
        const int n = int(std::min<int64_t>(end - i, 32));
        load_block(tensor.dtype, tensor.base, i, n, theta);
        load_block(tensor.dtype, tensor.experts[k], i, n, expert);
        if (call.packing == MERGE3_PACK_AGREEMENT) load_block(tensor.out_dtype, tensor.out, i, n, unified);
        uint32_t word = 0;
        for (int j = 0; j < n; ++j)
          word |= uint32_t(packed_bit(call.packing, theta[j], expert[j], unified[j], all, set)) << j;
        const_cast<uint32_t*>(tensor.masks[k])[i / 32] = word;
      }
      partial[(chunk * call.experts + k) * 2] = all;
      partial[(chunk * call.experts + k) * 2 + 1] = set;
    }
  });
}

}  // namespace merge3
