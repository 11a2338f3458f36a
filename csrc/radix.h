// Exact order statistics by radix: float32 patterns of non-negative values order like the values, so
// 15 + 8 + 8 leading bits lead to any rank. Only the counting differs between devices; `Counter` is
//
//   void top(Bucket* table)                                2^15 buckets
//   void next(const uint32_t* slot, const uint32_t* child, int shift, size_t slots, Bucket* tables)
//       tables: [slots, 256] over bits shift..shift+7 of elements whose top bucket has a slot and,
//       where `child` is not NULL ([slots before, 256]), whose next byte has a child slot
//
// All sums are integers: what one bucket holds shares sign, exponent and seven bits of the mantissa, so
// its values add up to count * (lowest value) + (sum of the lower 16 bits) * (distance of neighbours).
// The order of the additions then never matters, and CPU and GPU agree to the last bit.
#pragma once
#include <math.h>
#include <stdint.h>

#include <algorithm>
#include <vector>

#include "merge_math.h"

namespace merge3 {

constexpr uint32_t kTop = 1 << 15;
constexpr uint32_t kNoSlot = 0xffffffffu;

struct Bucket {
  int64_t count;
  int64_t low;  // sum over the elements of the lower 16 bits of their pattern
};

// Where one (tensor, expert) pair's results go: arrays over ranks, and two scalars.
struct OrderResult {
  float* value;
  int64_t *greater, *equal;
  double *l1_greater, *total;
  int64_t* nonzero;
};

namespace {  // of each instruction set's file its own: the linker would take one of them for all processors
class RadixSelect {
 public:
  template <class Counter>
  void run(Counter& counter, int64_t numel, const int64_t* ranks, int64_t rank_count, const OrderResult& out) {
    top_.assign(kTop, Bucket{0, 0});
    counter.top(top_.data());
    accumulate();
    searches_.assign(size_t(rank_count) + 1, Search{});
    for (int64_t r = 0; r < rank_count; ++r) find(std::min(ranks[r], numel), searches_[size_t(r)]);
    Search& smallest = searches_.back();  // ends at zero if there are zeros
    find(numel, smallest);
    refine(counter);
    *out.total = filled_.empty() ? 0.0 : filled_.back().sum_greater + sum(filled_.back().at, top_[filled_.back().at]);
    *out.nonzero = numel - (numel > 0 && smallest.pattern == 0 ? smallest.equal : 0);
    for (int64_t r = 0; r < rank_count; ++r) {
      const Search& s = searches_[size_t(r)];
      const bool none = s.left < 1;
      out.value[r] = none ? INFINITY : as_float(s.pattern);
      out.greater[r] = s.greater;
      out.equal[r] = none ? 0 : s.equal;
      out.l1_greater[r] = s.sum_greater;
    }
  }

 private:
  struct Search {
    int64_t left = 0;  // rank within the current bucket, 1-based from the largest
    int64_t greater = 0, equal = 0;
    double sum_greater = 0.0;
    uint32_t pattern = 0;  // bits decided so far, then zeros
    bool open = false;
  };
  struct Filled {  // a bucket with elements, and what lies above it
    uint32_t at;
    int64_t greater;
    double sum_greater;
  };

  static double sum(uint32_t top, const Bucket& b) {
    const uint32_t exponent = top >> 7;
    return double(b.count) * double(as_float(top << 16)) + ldexp(double(b.low), int(exponent ? exponent : 1) - 150);
  }

  void accumulate() {
    filled_.clear();
    int64_t greater = 0;
    double sum_greater = 0.0;
    for (uint32_t b = kTop; b-- > 0;) {
      if (top_[b].count == 0) continue;
      filled_.push_back({b, greater, sum_greater});
      greater += top_[b].count;
      sum_greater += sum(b, top_[b]);
    }
  }

  void find(int64_t rank, Search& s) const {
    s.left = rank;
    if (rank < 1) return;
    const auto above = std::partition_point(filled_.begin(), filled_.end(), [&](const Filled& f) { return f.greater < rank; });
    const Filled& f = *(above - 1);
    s.left -= f.greater;
    s.greater = f.greater;
    s.sum_greater = f.sum_greater;
    s.equal = top_[f.at].count;
    s.pattern = f.at << 16;
    s.open = top_[f.at].low != 0;  // else the bucket holds one value: nothing left to decide
  }

  static void descend(const Bucket* table, int shift, Search& s) {
    for (uint32_t b = 255;; --b) {
      if (s.left <= table[b].count) {
        s.pattern |= b << shift;
        s.equal = table[b].count;
        return;
      }
      s.left -= table[b].count;
      s.greater += table[b].count;
      s.sum_greater += sum(s.pattern >> 16, table[b]);
    }
  }

  template <class Counter>
  void refine(Counter& counter) {
    for (int shift = 8; shift >= 0; shift -= 8) {
      prefixes_.clear();
      for (const Search& s : searches_)
        if (s.open) prefixes_.push_back(s.pattern >> (shift + 8));
      if (prefixes_.empty()) return;
      std::sort(prefixes_.begin(), prefixes_.end());
      prefixes_.erase(std::unique(prefixes_.begin(), prefixes_.end()), prefixes_.end());
      if (shift == 8) {
        slot_.assign(kTop, kNoSlot);
        for (size_t i = 0; i < prefixes_.size(); ++i) slot_[prefixes_[i]] = uint32_t(i);
      } else {
        child_.assign(tables_.size(), kNoSlot);
        for (size_t i = 0; i < prefixes_.size(); ++i)
          child_[size_t(slot_[prefixes_[i] >> 8]) * 256 + (prefixes_[i] & 255)] = uint32_t(i);
      }
      tables_.assign(prefixes_.size() * 256, Bucket{0, 0});
      counter.next(slot_.data(), shift == 8 ? nullptr : child_.data(), shift, prefixes_.size(), tables_.data());
      for (Search& s : searches_)
        if (s.open) {
          const auto at = std::lower_bound(prefixes_.begin(), prefixes_.end(), s.pattern >> (shift + 8)) - prefixes_.begin();
          descend(tables_.data() + at * 256, shift, s);
        }
    }
  }

  std::vector<Bucket> top_, tables_;
  std::vector<Filled> filled_;
  std::vector<Search> searches_;
  std::vector<uint32_t> prefixes_, slot_, child_;
};
}  // namespace

}  // namespace merge3
