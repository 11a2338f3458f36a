// Exact order statistics by radix: float32 patterns of non-negative values order like the values, so
// 15 + 8 + 8 leading bits lead to any rank. Only the counting differs between devices; `Counter` is
//
//   void top(Bucket* table, uint16_t* low_bits)            2^15 buckets; OR of the low 16 bits in each
//   void next(const uint32_t* slot, const uint32_t* child, int shift, size_t slots, Bucket* tables)
//       tables: [slots, 256] over bits shift..shift+7 of elements whose top bucket has a slot and,
//       where `child` is not NULL ([slots before, 256]), whose next byte has a child slot
//   int64_t zeros()                                        elements that are exactly 0
#pragma once
#include <math.h>
#include <stdint.h>

#include <algorithm>
#include <vector>

#include "merge_math.h"

namespace merge3 {

constexpr int kTop = 1 << 15;
constexpr uint32_t kNoSlot = 0xffffffffu;

struct Bucket {
  int64_t count;
  double sum;
};

// Where one (tensor, expert) pair's results go: arrays over ranks, and two scalars.
struct OrderResult {
  float* value;
  int64_t *greater, *equal;
  double *l1_greater, *total;
  int64_t* nonzero;
};

class RadixSelect {
 public:
  template <class Counter>
  void run(Counter& counter, int64_t numel, const int64_t* ranks, int64_t rank_count, const OrderResult& out) {
    top_.assign(kTop, Bucket{0, 0.0});
    low_bits_.assign(kTop, 0);
    counter.top(top_.data(), low_bits_.data());
    *out.total = 0.0;
    for (const Bucket& b : top_) *out.total += b.sum;
    searches_.assign(size_t(rank_count), Search{});
    for (int64_t r = 0; r < rank_count; ++r) {
      Search& s = searches_[size_t(r)];
      s.left = std::min(ranks[r], numel);
      if (s.left < 1) continue;
      descend(top_.data(), kTop, s);
      // A bucket whose low bits are all zero holds one value: nothing left to decide.
      if (low_bits_[s.prefix] != 0) s.open = true;
      else s.prefix <<= 16;
    }
    refine(counter);
    *out.nonzero = numel;
    if (top_[0].count)  // only the lowest bucket can hold zeros
      *out.nonzero -= low_bits_[0] == 0 ? top_[0].count : counter.zeros();
    for (int64_t r = 0; r < rank_count; ++r) {
      const Search& s = searches_[size_t(r)];
      const bool none = s.left < 1;
      out.value[r] = none ? INFINITY : as_float(s.prefix);
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
    uint32_t prefix = 0;  // bits decided so far
    bool open = false;
  };

  static void descend(const Bucket* table, int size, Search& s) {
    for (int b = size - 1; b >= 0; --b) {
      if (s.left <= table[b].count) {
        s.prefix = s.prefix * (size == kTop ? 0 : uint32_t(size)) + uint32_t(b);
        s.equal = table[b].count;
        return;
      }
      s.left -= table[b].count;
      s.greater += table[b].count;
      s.sum_greater += table[b].sum;
    }
  }

  template <class Counter>
  void refine(Counter& counter) {
    for (int shift = 8; shift >= 0; shift -= 8) {
      prefixes_.clear();
      for (const Search& s : searches_)
        if (s.open) prefixes_.push_back(s.prefix);
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
      tables_.assign(prefixes_.size() * 256, Bucket{0, 0.0});
      counter.next(slot_.data(), shift == 8 ? nullptr : child_.data(), shift, prefixes_.size(), tables_.data());
      for (Search& s : searches_)
        if (s.open) {
          const auto at = std::lower_bound(prefixes_.begin(), prefixes_.end(), s.prefix) - prefixes_.begin();
          descend(tables_.data() + at * 256, 256, s);
        }
    }
  }

  std::vector<Bucket> top_, tables_;
  std::vector<uint16_t> low_bits_;
  std::vector<Search> searches_;
  std::vector<uint32_t> prefixes_, slot_, child_;
};

}  // namespace merge3
