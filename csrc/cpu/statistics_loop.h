// The CPU loops over the statistics of task vectors, computed once per pool: candidates change
// coefficients, never these. Included once per instruction set (statistics.cpp, statistics_avx2.cpp).
//
// Gram: one read of base and experts. Order statistics: exact, for any number of ranks at once: one read
// counts elements by the leading bits of |tau|, a second one gathers the other bits of those that share
// a bucket with a rank. Where a bucket holds one value the first read decides.
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

  void top(Bucket* table) {
    for (int64_t from = 0; from < tensor_.numel; from += kRun) {
      packed_.assign(kTop, 0);
      uint64_t* packed = packed_.data();
      each(from, std::min(from + kRun, tensor_.numel), [=](uint32_t bits) { packed[bits >> 16] += kOne | (bits & 0xffffu); });
      for (uint32_t b = 0; b < kTop; ++b) add(packed_[b], table[b]);
    }
    sizes_ = table;
  }

  void next(const uint32_t* slot, const uint32_t* child, int shift, size_t slots, Bucket* tables) {
    if (child == nullptr) gather(slot, slots);
    for (size_t s = 0; s + 1 < begins_.size(); ++s) {
      const uint16_t* low = gathered_.data() + begins_[s];
      const int64_t size = begins_[s + 1] - begins_[s];
      if (child == nullptr) {
        for (int64_t from = 0; from < size; from += kRun) {
          uint64_t packed[256] = {};
          for (int64_t i = from, to = std::min(from + kRun, size); i < to; ++i) packed[low[i] >> shift] += kOne | low[i];
          for (int b = 0; b < 256; ++b) add(packed[b], tables[s * 256 + size_t(b)]);
        }
        continue;
      }
      const uint32_t* children = child + s * 256;  // few have a slot, so a branch is predicted
      for (int64_t i = 0; i < size; ++i)
        if (const uint32_t at = children[low[i] >> 8]; at != kNoSlot) {
          Bucket& bucket = tables[size_t(at) * 256 + (low[i] & 255)];
          ++bucket.count;
          bucket.low += low[i];
        }
    }
  }

 private:
  // A count and a sum of lower halves in one word, so that one addition serves both: sixteen million
  // elements fit.
  static constexpr int kCountBit = 40;
  static constexpr uint64_t kOne = uint64_t(1) << kCountBit;
  static constexpr int64_t kRun = int64_t(1) << (64 - kCountBit - 1);
  static void add(uint64_t packed, Bucket& to) {
    to.count += int64_t(packed >> kCountBit);
    to.low += int64_t(packed & (kOne - 1));
  }

  // The lower halves of all elements in buckets with a slot, bucket by bucket.
  void gather(const uint32_t* slot, size_t slots) {
    struct Cursor {
      int64_t at, step;
    };
    // Other buckets write to one place that nobody reads: a branch would often be mispredicted.
    std::vector<Cursor> cursors(kTop, Cursor{0, 0});
    begins_.assign(slots + 1, 1);
    for (uint32_t b = 0; b < kTop; ++b)
      if (slot[b] != kNoSlot) begins_[slot[b] + 1] = sizes_[b].count;
    for (size_t s = 0; s < slots; ++s) begins_[s + 1] += begins_[s];
    for (uint32_t b = 0; b < kTop; ++b)
      if (slot[b] != kNoSlot) cursors[b] = {begins_[slot[b]], 1};
    gathered_.resize(size_t(begins_[slots]));
    uint16_t* to = gathered_.data();
    Cursor* cursor = cursors.data();
    each(0, tensor_.numel, [=](uint32_t bits) {
      Cursor& c = cursor[bits >> 16];
      to[c.at] = uint16_t(bits);
      c.at += c.step;
    });
  }

  // body(float32 pattern) for each value of the statistic.
  template <class Body>
  void each(int64_t from, int64_t to, const Body& body) const {
    alignas(64) uint32_t bits[kBlock];
    for (int64_t i = from; i < to; i += kBlock) {
      const int n = int(std::min<int64_t>(to - i, kBlock));
      read(i, n, bits);
      for (int j = 0; j < n; ++j) body(bits[j]);
    }
  }

  void read(int64_t at, int n, uint32_t* bits) const {
    if (statistic_ == MERGE3_MAGNITUDE && n % 8 == 0 && tensor_.base != nullptr) {
      if (tensor_.dtype == MERGE3_FLOAT32) return read_magnitudes<Float32>(at, n, bits);
      if (tensor_.dtype == MERGE3_BFLOAT16) return read_magnitudes<BFloat16>(at, n, bits);
      return read_magnitudes<Float16>(at, n, bits);
    }
    alignas(64) float theta[kBlock], expert[MERGE3_MAX_EXPERTS][kBlock];
    load_block(tensor_.dtype, tensor_.base, at, n, theta);
    if (statistic_ == MERGE3_MAGNITUDE) {
      load_block(tensor_.dtype, tensor_.experts[k_], at, n, expert[0]);
      for (int j = 0; j < n; ++j) bits[j] = as_uint(magnitude(expert[0][j] - theta[j]));
      return;
    }
    for (int e = 0; e < experts_; ++e) load_block(tensor_.dtype, tensor_.experts[e], at, n, expert[e]);
    for (int j = 0; j < n; ++j) {
      float x[MERGE3_MAX_EXPERTS];
      for (int e = 0; e < experts_; ++e) x[e] = expert[e][j];
      bits[j] = as_uint(variance(theta[j], x, experts_));
    }
  }

  template <class T>
  void read_magnitudes(int64_t at, int n, uint32_t* bits) const {
    for (int j = 0; j < n; j += 8) {
      const u32x8 x = as_uint(magnitude(load8<T>(tensor_.experts[k_], at + j) - load8<T>(tensor_.base, at + j)));
      memcpy(bits + j, &x, sizeof x);
    }
  }

  const merge3_tensor& tensor_;
  int32_t statistic_, experts_, k_;
  const Bucket* sizes_ = nullptr;
  std::vector<uint64_t> packed_;
  std::vector<int64_t> begins_;  // of each slot's elements in gathered_
  std::vector<uint16_t> gathered_;
};

}  // namespace

void MERGE3_STATISTICS(order_statistics)(const OrderStatistics& call, int64_t pair) {
  const int64_t t = pair / call.series();
  Counter counter(call.table[t], call.statistic, call.experts, int32_t(pair % call.series()));
  RadixSelect().run(counter, call.table[t].numel, call.ranks + t * call.rank_count, call.rank_count, call.result(pair));
}

void MERGE3_STATISTICS(gram)(const merge3_tensor* table, int32_t experts, const Chunks& chunks, int64_t from,
              int64_t to, double* partial) {
  constexpr int kRun = 256;  // elements summed in float32 per lane before they join the double
  const int vectors = experts + 1, pairs = vectors * (vectors + 1) / 2;
  alignas(64) float x[MERGE3_MAX_EXPERTS + 1][kRun];
  chunks.each(table, from, to, [&](int64_t t, int64_t begin, int64_t end, int64_t chunk) {
    // Not in `partial` yet: there the rows of two threads share cache lines.
    double sums[(MERGE3_MAX_EXPERTS + 1) * (MERGE3_MAX_EXPERTS + 2) / 2] = {};
    for (int64_t at = begin; at < end; at += kRun) {
      const int n = int(std::min<int64_t>(end - at, kRun));
      for (int v = 0; v < vectors; ++v) {
        load_block(table[t].dtype, v ? table[t].experts[v - 1] : table[t].base, at, n, x[v]);
        for (int j = n; j < kRun; ++j) x[v][j] = 0.0f;
        if (v)
          for (int j = 0; j < kRun; j += 8) *(f32x8*)(x[v] + j) -= *(const f32x8*)(x[0] + j);
      }
      for (int a = 0, p = 0; a < vectors; ++a)
        for (int b = a; b < vectors; ++b, ++p) {
          f32x8 sum = {};
          for (int j = 0; j < kRun; j += 8) sum += *(const f32x8*)(x[a] + j) * *(const f32x8*)(x[b] + j);
          sums[p] += double(sum[0]) + double(sum[1]) + double(sum[2]) + double(sum[3]) +
                     double(sum[4]) + double(sum[5]) + double(sum[6]) + double(sum[7]);
        }
    }
    std::copy(sums, sums + pairs, partial + chunk * pairs);
  });
}

}  // namespace merge3
