// Merges from one bit per element, for any processor; and the making of those bits.
#define MERGE3_PACKED_ENTRY packed_generic
#define MERGE3_LANES f32x8
#define MERGE3_DIRECT 0
#include "packed_loop.h"

namespace merge3 {

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
