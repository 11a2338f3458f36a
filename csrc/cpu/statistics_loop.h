// The CPU loops over the statistics of task vectors, computed once per pool: candidates change
// coefficients, never these. Included once per instruction set (statistics.cpp, statistics_avx2.cpp).
//
// Gram: one read of base and experts. Order statistics: exact, by three radix passes over the float32
// pattern of |tau| (15 + 8 + 8 bits; non-negative floats order like their patterns), for any number
// of ranks at once. The later passes are skipped where the first already decides.
//
// Tried: std::sort of a tensor (60 ns per element against 4) and nth_element per rank (linear, but
// once per rank: a search needs 255).
#include "../radix.h"
#include "merge_cpu.h"
#include "storage.h"

namespace merge3 {
namespace {

constexpr int kBlock = 1024;

// Counts one pair's values for RadixSelect.
class Counter {
 public:
  Counter(const merge3_tensor& tensor, int32_t statistic, int32_t experts, int32_t k)
      : tensor_(tensor), statistic_(statistic), experts_(experts), k_(k) {}

  void top(Bucket* table, uint16_t* low_bits) const {
    each([&](uint32_t bits) {
      Bucket& bucket = table[bits >> 16];
      ++bucket.count;
      bucket.sum += double(as_float(bits));
      low_bits[bits >> 16] |= uint16_t(bits);
    });
  }

  void next(const uint32_t* slot, const uint32_t* child, int shift, size_t, Bucket* tables) const {
    each([&](uint32_t bits) {
      uint32_t at = slot[bits >> 16];
      if (at != kNoSlot && child) at = child[size_t(at) * 256 + ((bits >> 8) & 255)];
      if (at == kNoSlot) return;
      Bucket& bucket = tables[size_t(at) * 256 + ((bits >> shift) & 255)];
      ++bucket.count;
      bucket.sum += double(as_float(bits));
    });
  }

  int64_t zeros() const {
    int64_t count = 0;
    each([&](uint32_t bits) { count += bits == 0; });
    return count;
  }

 private:
  // body(float32 pattern) for each value of the statistic.
  template <class Body>
  void each(const Body& body) const {
    alignas(64) uint32_t bits[kBlock];
    for (int64_t i = 0; i < tensor_.numel; i += kBlock) {
      const int n = int(std::min<int64_t>(tensor_.numel - i, kBlock));
      read(i, n, bits);
      for (int j = 0; j < n; ++j) body(bits[j]);
    }
  }

  void read(int64_t at, int n, uint32_t* bits) const {
    alignas(64) float theta[kBlock], expert[MERGE3_MAX_EXPERTS][kBlock];
    load_block(tensor_.dtype, tensor_.base, at, n, theta);
    if (statistic_ == MERGE3_MAGNITUDE) {
      load_block(tensor_.dtype, tensor_.experts[k_], at, n, expert[0]);
      for (int j = 0; j < n; ++j) bits[j] = as_uint(expert[0][j] - theta[j]) & 0x7fffffffu;
      return;
    }
    for (int e = 0; e < experts_; ++e) load_block(tensor_.dtype, tensor_.experts[e], at, n, expert[e]);
    for (int j = 0; j < n; ++j) {
      float x[MERGE3_MAX_EXPERTS];
      for (int e = 0; e < experts_; ++e) x[e] = expert[e][j];
      bits[j] = as_uint(variance(theta[j], x, experts_));
    }
  }

  const merge3_tensor& tensor_;
  int32_t statistic_, experts_, k_;
};

}  // namespace

void MERGE3_STATISTICS(order_statistics)(const OrderStatistics& call, int64_t from, int64_t to) {
  RadixSelect select;
  for (int64_t pair = from; pair < to; ++pair) {
    const int64_t t = pair / call.series();
    Counter counter(call.table[t], call.statistic, call.experts, int32_t(pair % call.series()));
    select.run(counter, call.table[t].numel, call.ranks + t * call.rank_count, call.rank_count, call.result(pair));
  }
}

void MERGE3_STATISTICS(gram)(const merge3_tensor* table, int32_t experts, const Chunks& chunks, int64_t from,
              int64_t to, double* partial) {
  constexpr int kRun = 256;  // elements summed in float32 per lane before they join the double
  const int vectors = experts + 1, pairs = vectors * (vectors + 1) / 2;
  alignas(64) float x[MERGE3_MAX_EXPERTS + 1][kRun];
  chunks.each(table, from, to, [&](int64_t t, int64_t begin, int64_t end, int64_t chunk) {
    double* sums = partial + chunk * pairs;
    for (int p = 0; p < pairs; ++p) sums[p] = 0.0;
    for (int64_t at = begin; at < end; at += kRun) {
      const int n = int(std::min<int64_t>(end - at, kRun));
      for (int v = 0; v < vectors; ++v) {
        load_block(table[t].dtype, v ? table[t].experts[v - 1] : table[t].base, at, n, x[v]);
        for (int j = n; j < kRun; ++j) x[v][j] = 0.0f;
        if (v)
          for (int j = 0; j < n; ++j) x[v][j] -= x[0][j];
      }
      for (int a = 0, p = 0; a < vectors; ++a)
        for (int b = a; b < vectors; ++b, ++p) {
          f32x8 sum = {};
          for (int j = 0; j < kRun; j += 8) sum += *(const f32x8*)(x[a] + j) * *(const f32x8*)(x[b] + j);
          sums[p] += double(sum[0]) + double(sum[1]) + double(sum[2]) + double(sum[3]) +
                     double(sum[4]) + double(sum[5]) + double(sum[6]) + double(sum[7]);
        }
    }
  });
}

}  // namespace merge3
