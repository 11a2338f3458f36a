// Philox4x32-7 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): a counter
// based generator, so element i of tensor t draws the same bits on every device, in any order and
// for any number of threads. Seven rounds are the fewest that pass BigCrush (their Table 2).
//
// One block (128 bits) serves eight consecutive elements: element 8 b + j uses 16-bit half j.
#pragma once
#include "lanes.h"

namespace merge3 {

constexpr int kPhiloxRounds = 7;

// U is uint32_t, or a vector of them (one block per lane).
template <class U>
MERGE3_HD void philox_block(U counter_lo, U counter_hi, uint32_t tensor, uint32_t expert,
                            uint64_t seed, U (&words)[4]) {
  U c0 = counter_lo, c1 = counter_hi, c2 = same<U>(tensor), c3 = same<U>(expert);
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  MERGE3_UNROLL
  for (int round = 0; round < kPhiloxRounds; ++round) {
    U hi0, lo0, hi1, lo1;
    multiply_wide(c0, 0xD2511F53u, hi0, lo0);
    multiply_wide(c2, 0xCD9E8D57u, hi1, lo1);
    c0 = hi1 ^ c1 ^ same<U>(k0);
    c1 = lo1;
    c2 = hi0 ^ c3 ^ same<U>(k1);
    c3 = lo0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

}  // namespace merge3
