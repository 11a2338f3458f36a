// The CPU loops for the processor at hand.
#pragma once
#include <stdlib.h>
#include <string.h>

#include <stdexcept>
#include <string>

#include "merge_cpu.h"

namespace merge3 {

// The loops for one instruction set. Statistics read more than they compute: AVX2 is enough for them.
struct Loops {
  const char* name;
  bool usable;
  decltype(&merge_generic) merge;
  decltype(&packed_generic) packed;
  decltype(&gram_generic) gram;
  decltype(&order_statistics_generic) order_statistics;
};

// The best for this processor, or what MERGE3_CPU names (to compare them; the results are the same).
inline const Loops& loops() {
  static const Loops chosen = [] {
    Loops best{"generic", true, merge_generic, packed_generic, gram_generic, order_statistics_generic};
    const char* wanted = getenv("MERGE3_CPU");
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    for (const Loops& better : {Loops{"avx2", avx2, merge_avx2, packed_avx2, gram_avx2, order_statistics_avx2},
                                Loops{"avx512", avx512, merge_avx512, packed_avx512, gram_avx2, order_statistics_avx2}})
      if (better.usable && !(wanted && !strcmp(wanted, best.name))) best = better;
#endif
    if (wanted && strcmp(wanted, best.name))
      throw std::runtime_error(std::string("MERGE3_CPU=") + wanted + ": expected generic, avx2 or avx512, one this processor has");
    return best;
  }();
  return chosen;
}

}  // namespace merge3
