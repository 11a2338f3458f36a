// Spreading CPU work over threads, and how many there are where no executor says so.
#pragma once
#include <stdint.h>
#include <stdlib.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <fstream>
#include <string>
#include <system_error>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <sched.h>
#endif

#include "../include/merge3/merge.h"

namespace merge3 {

// Cores' worth of time that one cgroup may take (version 2, or 1); 0: as many as there are.
inline double cgroup_quota(const std::string& group) {
  double quota = 0, period = 0;
  if (std::ifstream(group + "/cpu.max") >> quota >> period) return quota / period;  // no number: `max`
  const bool first = bool(std::ifstream(group + "/cpu.cfs_quota_us") >> quota) && quota > 0;
  return first && std::ifstream(group + "/cpu.cfs_period_us") >> period ? quota / period : 0;
}

// Cores that this process may use: by its affinity, and by the quota of every cgroup above it. A container with
// two cores of a host with 64 has two. The same rule in Python: merge3/threads.py.
inline int64_t usable_cores() {
  int64_t cores = std::max<int64_t>(1, std::thread::hardware_concurrency());
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) cores = CPU_COUNT(&set);
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // number:controllers:path
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1), mount = "/sys/fs/cgroup/";
    if (!controllers.empty() && ("," + controllers + ",").find(",cpu,") == std::string::npos) continue;
    for (const std::string& root : {mount + controllers, mount + (controllers.empty() ? "unified" : "cpu")}) {
      std::string path = line.substr(second + 1);
      for (bool more = true; more;) {  // the group, its parents, the mount
        const double quota = cgroup_quota(root + path);
        if (quota > 0) cores = std::min<int64_t>(cores, std::max<int64_t>(1, int64_t(std::ceil(quota))));
        more = !path.empty();
        path.resize(more ? path.rfind('/') == std::string::npos ? 0 : path.rfind('/') : 0);
      }
    }
  }
#endif
  return cores;
}

// Asked once. OMP_NUM_THREADS goes first, as it does for torch and OpenBLAS in the same process.
inline int64_t default_threads() {
  static const int64_t count = [] {
    const char* wanted = getenv("OMP_NUM_THREADS");
    const int64_t number = wanted ? atoll(wanted) : 0;
    return number > 0 ? number : usable_cores();
  }();
  return count;
}

// Calls work(arg, ..) on this thread and on others, which end with it. Nobody spins.
inline void on_threads(int64_t most, void (*work)(void*, int64_t, int64_t), void* arg) {
  const int64_t others = std::min(default_threads(), most) - 1;
  std::vector<std::thread> threads;
  threads.reserve(size_t(std::max<int64_t>(0, others)));
  try {
    for (int64_t i = 0; i < others; ++i) threads.emplace_back(work, arg, 0, 0);
  } catch (const std::system_error&) {  // no more threads to be had: those that are there do it all
  }
  work(arg, 0, 0);
  for (std::thread& thread : threads) thread.join();
}

// body(begin, end) over all of [0, count), whose order and cuts must not matter. Whoever is free takes the next
// one: a thread whose core is busy with other work delays the others by one piece at most, where equal shares
// would have all wait for it. So an executor's own cuts only decide how many threads there are.
template <class Body>
void parallel(const merge3_context& context, int64_t count, const Body& body) {
  if (count <= 0) return;
  struct Work {
    const Body& body;
    const int64_t count;
    std::atomic<int64_t> next{0};
  } work{body, count};
  const auto take = [](void* arg, int64_t, int64_t) {
    Work& work = *static_cast<Work*>(arg);
    for (int64_t at; (at = work.next.fetch_add(1, std::memory_order_relaxed)) < work.count;) work.body(at, at + 1);
  };
  if (context.executor) context.executor->parallel_for(context.executor->self, count, take, &work);
  else on_threads(count, take, &work);
}

}  // namespace merge3
