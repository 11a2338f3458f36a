// Statistics of task vectors, computed once per pool: candidates change coefficients, never these.
//
// Gram: one read of base and experts. Order statistics: exact, by three radix passes over the float32
// pattern of |tau| (15 + 8 + 8 bits; non-negative floats order like their patterns), for any number
// of ranks at once. The later passes are skipped where the first already decides.
//
// Tried: std::sort of a tensor (60 ns per element against 4) and nth_element per rank (linear, but
// once per rank: a search needs 255).
#include <math.h>

#include "merge_cpu.h"
#include "storage.h"

namespace merge3 {
namespace {

constexpr int kBlock = 1024;

// The statistic's float32 bit patterns for n elements from `at` on.
struct Reader {
  const merge3_tensor& tensor;
  int32_t statistic, experts, k;

  void operator()(int64_t at, int n, uint32_t* bits) const {
    alignas(64) float theta[kBlock], expert[MERGE3_MAX_EXPERTS][kBlock];
    load_block(tensor.dtype, tensor.base, at, n, theta);
    if (statistic == MERGE3_MAGNITUDE) {
      load_block(tensor.dtype, tensor.experts[k], at, n, expert[0]);
      for (int j = 0; j < n; ++j) bits[j] = as_uint(expert[0][j] - theta[j]) & 0x7fffffffu;
      return;
    }
    for (int e = 0; e < experts; ++e) load_block(tensor.dtype, tensor.experts[e], at, n, expert[e]);
    for (int j = 0; j < n; ++j) {
      float x[MERGE3_MAX_EXPERTS];
      for (int e = 0; e < experts; ++e) x[e] = expert[e][j];
      bits[j] = as_uint(variance(theta[j], x, experts));
    }
  }
};

struct Bucket {
  int64_t count;
  double sum;
};

// One rank on its way down the radix tree.
struct Search {
  int64_t left;       // rank within the current bucket, 1-based from the largest
  int64_t greater;    // elements above the bucket
  double sum_greater;
  uint32_t prefix;    // bits decided so far
  int32_t slot;       // its bucket's row in the next level's table; -1: done
};

// Descends `search` through one table of `size` buckets (highest first).
void descend(const Bucket* table, int size, Search& search) {
  for (int b = size - 1; b >= 0; --b) {
    if (search.left <= table[b].count) {
      search.prefix = search.prefix * uint32_t(size) + uint32_t(b);
      return;
    }
    search.left -= table[b].count;
    search.greater += table[b].count;
    search.sum_greater += table[b].sum;
  }
}

class RadixSelect {
 public:
  void run(const Reader& read, int64_t numel, const OrderStatistics& call, const int64_t* ranks,
           int64_t at) {
    alignas(64) uint32_t bits[kBlock];
    top_.assign(1 << 15, Bucket{0, 0.0});
    low_bits_.assign(1 << 15, 0);
    for (int64_t i = 0; i < numel; i += kBlock) {
      const int n = int(std::min<int64_t>(numel - i, kBlock));
      read(i, n, bits);
      for (int j = 0; j < n; ++j) {
        Bucket& bucket = top_[bits[j] >> 16];
        ++bucket.count;
        bucket.sum += double(as_float(bits[j]));
        low_bits_[bits[j] >> 16] |= uint16_t(bits[j]);
      }
    }
    double total = 0.0;
    for (const Bucket& b : top_) total += b.sum;
    call.total[at] = total;
    searches_.assign(size_t(call.rank_count), Search{0, 0, 0.0, 0, -1});
    for (int64_t r = 0; r < call.rank_count; ++r) {
      Search& s = searches_[size_t(r)];
      s.left = std::min(ranks[r], numel);
      if (s.left >= 1) descend(top_.data(), 1 << 15, s);
    }
    refine(read, numel);
    int64_t zeros = 0;
    if (top_[0].count) {  // only the lowest bucket can hold zeros
      if (low_bits_[0] == 0) zeros = top_[0].count;
      else
        for (int64_t i = 0; i < numel; i += kBlock) {
          const int n = int(std::min<int64_t>(numel - i, kBlock));
          read(i, n, bits);
          for (int j = 0; j < n; ++j) zeros += bits[j] == 0;
        }
    }
    call.nonzero[at] = numel - zeros;
    for (int64_t r = 0; r < call.rank_count; ++r) {
      const Search& s = searches_[size_t(r)];
      const int64_t i = at * call.rank_count + r;
      const bool none = std::min(ranks[r], numel) < 1;
      call.value[i] = none ? INFINITY : as_float(s.prefix);
      call.greater[i] = s.greater;
      call.l1_greater[i] = s.sum_greater;
      call.equal[i] = none ? 0 : equal_[size_t(r)];
    }
  }

 private:
  void refine(const Reader& read, int64_t numel) {
    equal_.assign(searches_.size(), 0);
    // A bucket whose low bits are all zero holds one value: nothing left to decide.
    for (size_t r = 0; r < searches_.size(); ++r) {
      Search& s = searches_[r];
      if (s.left < 1) continue;
      equal_[r] = top_[s.prefix].count;
      if (low_bits_[s.prefix] != 0) s.slot = 0;
      else s.prefix <<= 16;
    }
    for (int shift = 8; shift >= 0; shift -= 8) {
      // Slots: the distinct prefixes still open, in order.
      prefixes_.clear();
      for (const Search& s : searches_)
        if (s.slot >= 0) prefixes_.push_back(s.prefix);
      if (prefixes_.empty()) return;
      std::sort(prefixes_.begin(), prefixes_.end());
      prefixes_.erase(std::unique(prefixes_.begin(), prefixes_.end()), prefixes_.end());
      for (Search& s : searches_)
        if (s.slot >= 0)
          s.slot = int32_t(std::lower_bound(prefixes_.begin(), prefixes_.end(), s.prefix) - prefixes_.begin());
      if (shift == 8) {
        slot_.assign(1 << 15, kNoSlot);
        for (size_t i = 0; i < prefixes_.size(); ++i) slot_[prefixes_[i]] = uint32_t(i);
      } else {
        // (level 2 slot, byte) -> level 3 slot
        const std::vector<uint32_t> parents = slot_;
        next_.assign(tables_.size(), kNoSlot);
        for (size_t i = 0; i < prefixes_.size(); ++i)
          next_[size_t(parents[prefixes_[i] >> 8]) * 256 + (prefixes_[i] & 255)] = uint32_t(i);
      }
      const bool last = shift == 0;
      tables_.assign(prefixes_.size() * 256, Bucket{0, 0.0});
      alignas(64) uint32_t bits[kBlock];
      for (int64_t i = 0; i < numel; i += kBlock) {
        const int n = int(std::min<int64_t>(numel - i, kBlock));
        read(i, n, bits);
        for (int j = 0; j < n; ++j) {
          uint32_t slot = slot_[bits[j] >> 16];
          if (slot == kNoSlot) continue;
          if (last && (slot = next_[size_t(slot) * 256 + ((bits[j] >> 8) & 255)]) == kNoSlot) continue;
          Bucket& bucket = tables_[size_t(slot) * 256 + ((bits[j] >> shift) & 255)];
          ++bucket.count;
          bucket.sum += double(as_float(bits[j]));
        }
      }
      for (size_t r = 0; r < searches_.size(); ++r) {
        Search& s = searches_[r];
        if (s.slot < 0) continue;
        const Bucket* table = tables_.data() + size_t(s.slot) * 256;
        descend(table, 256, s);
        equal_[r] = table[s.prefix & 255].count;
      }
    }
  }

  static constexpr uint32_t kNoSlot = 0xffffffffu;
  std::vector<Bucket> top_, tables_;
  std::vector<uint16_t> low_bits_;  // OR of the low 16 bits in each top bucket
  std::vector<Search> searches_;
  std::vector<int64_t> equal_;
  std::vector<uint32_t> prefixes_, slot_, next_;
};

}  // namespace

void order_statistics_cpu(const OrderStatistics& call, int64_t from, int64_t to) {
  const int64_t K = call.statistic == MERGE3_VARIANCE ? 1 : call.experts;
  RadixSelect select;
  for (int64_t pair = from; pair < to; ++pair) {
    const int64_t t = pair / K;
    const Reader read{call.table[t], call.statistic, call.experts, int32_t(pair % K)};
    select.run(read, call.table[t].numel, call, call.ranks + t * call.rank_count, pair);
  }
}

void gram_cpu(const merge3_tensor* table, int32_t experts, const Chunks& chunks, int64_t from,
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

void rank_tables_cpu(const merge3_tensor* table, int32_t experts, int64_t from, int64_t to,
                     double* bin_l1) {
  constexpr int Q = MERGE3_RANK_BINS;
  std::vector<float> theta, row;
  for (int64_t pair = from; pair < to; ++pair) {
    const merge3_tensor& tensor = table[pair / experts];
    const int k = int(pair % experts);
    const int64_t C = tensor.columns;
    double* l1 = bin_l1 + pair * Q;
    std::fill(l1, l1 + Q, 0.0);
    theta.resize(size_t(C));
    row.resize(size_t(C));
    for (int64_t r = 0; C > 0 && r < tensor.numel / C; ++r) {
      for (int64_t i = 0; i < C; i += 1 << 20) {
        const int n = int(std::min<int64_t>(C - i, 1 << 20));
        load_block(tensor.dtype, tensor.base, r * C + i, n, theta.data() + i);
        load_block(tensor.dtype, tensor.experts[k], r * C + i, n, row.data() + i);
      }
      for (int64_t i = 0; i < C; ++i) row[size_t(i)] = magnitude(row[size_t(i)] - theta[size_t(i)]);
      std::sort(row.begin(), row.end());
      float* boundary = const_cast<float*>(tensor.rank_tables[k]) + r * MERGE3_RANK_STRIDE;
      float* mean_rank = boundary + Q - 1;
      for (int j = 1; j < Q; ++j) boundary[j - 1] = row[size_t(C * j / Q)];
      // The mean position of a bin's members, so that ties share their average rank.
      int64_t i = 0;
      for (int bin = 0; bin < Q; ++bin) {
        const int64_t start = i;
        double sum = 0.0;
        for (; i < C && (bin == Q - 1 || row[size_t(i)] < boundary[bin]); ++i) sum += row[size_t(i)];
        const double position = i > start ? 0.5 * double(start + i - 1) : double(start);
        mean_rank[bin] = C > 1 ? float(std::min(1.0, position / double(C - 1))) : 0.5f;
        l1[bin] += sum;
      }
    }
  }
}

}  // namespace merge3
