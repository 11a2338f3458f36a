// A CUDA device on the CPU, for tests: enough of the runtime to compile csrc/cuda/*.cu as C++ and run them.
//
// A launch runs its blocks one after the other. A block's threads are fibers: each runs to its next barrier
// or its end before the next one starts, in an order that changes from barrier to barrier, so that a result
// that depends on the order shows. A barrier that some threads miss ends the program. Device memory is host
// memory, filled with 0xCD when allocated, so that what was never written shows as well. There are two devices; all
// memory and streams count as those of the one that MERGE3_TEST_DEVICE_INDEX names, and work sent to the other fails.
#pragma once
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local  // blocks take turns on one thread, and its fibers share what it has

typedef int cudaError_t;
typedef void* cudaStream_t;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2, cudaErrorInsufficientDriver = 35,
       cudaErrorInvalidDeviceFunction = 98, cudaErrorInvalidDevice = 101, cudaErrorNoKernelImageForDevice = 209,
       cudaErrorInvalidResourceHandle = 400, cudaErrorNotReady = 600, cudaErrorStreamCaptureImplicit = 906 };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor };

namespace emulation {
inline thread_local int current_device = 0;
inline cudaError_t work() {  // what everything given to a stream begins with
  const char* owner = getenv("MERGE3_TEST_DEVICE_INDEX");
  return current_device == (owner ? atoi(owner) : 0) ? cudaSuccess : cudaErrorInvalidResourceHandle;
}
}  // namespace emulation

inline cudaError_t cudaGetDevice(int* to) { return *to = emulation::current_device, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device > 1) return cudaErrorInvalidDevice;
  return emulation::current_device = device, cudaSuccess;
}
// MERGE3_TEST_CAPTURING: 1, the stream is recorded; implicit, another one is, which waits for it.
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* to) {
  const char* capturing = getenv("MERGE3_TEST_CAPTURING");
  *to = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return capturing && *capturing == 'i' ? cudaErrorStreamCaptureImplicit : cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* to, cudaDeviceAttr which, int) { return *to = which ? 5 : 7, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* to) { return *to = 12040, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* to) { return *to = 13000, cudaSuccess; }
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };

struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// Copies from pinned memory happen late, when other work on the stream needs them: whoever changes that memory, or
// what it is copied to, before the event behind the copy has passed, spoils it.
namespace emulation {
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};
inline std::vector<Copy> late;
inline std::vector<std::pair<char*, size_t>> pinned;
inline int64_t copies = 0, launches = 0, passed = 0, queued = 0;  // copies to the device; late ones done, and ordered
inline void catch_up() {
  for (const Copy& copy : late) memcpy(copy.to, copy.from, copy.bytes);
  passed += int64_t(late.size());
  late.clear();
}
}  // namespace emulation

typedef int64_t* cudaEvent_t;
enum { cudaEventDisableTiming = 2 };
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return *event = new int64_t(0), cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) { return *event = emulation::queued, cudaSuccess; }
inline cudaError_t cudaEventQuery(cudaEvent_t event) { return *event <= emulation::passed ? cudaSuccess : cudaErrorNotReady; }
inline cudaError_t cudaMallocHost(void** to, size_t bytes) {
  *to = malloc(bytes);
  emulation::pinned.push_back({static_cast<char*>(*to), bytes});
  return *to ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline cudaError_t cudaFreeHost(void* p) { return free(p), cudaSuccess; }

inline cudaError_t cudaMallocAsync(void** to, size_t bytes, cudaStream_t) {
  if (cudaError_t e = emulation::work()) return e;
  *to = malloc(bytes);
  if (!*to) return cudaErrorMemoryAllocation;
  memset(*to, 0xCD, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaFreeAsync(void* p, cudaStream_t) {
  emulation::catch_up();
  free(p);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  if (cudaError_t e = emulation::work()) return e;
  const char* at = static_cast<const char*>(from);
  emulation::copies += kind == cudaMemcpyHostToDevice;
  for (const auto& [data, size] : emulation::pinned)
    if (at >= data && at < data + size) {
      emulation::late.push_back({to, from, bytes});
      ++emulation::queued;
      return cudaSuccess;
    }
  emulation::catch_up();
  memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  emulation::catch_up();
  memset(to, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return emulation::catch_up(), cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }

template <class T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at += value;
  return before;
}
template <class T>
T atomicMax(T* at, T value) {
  const T before = *at;
  *at = std::max(before, value);
  return before;
}

namespace emulation {

struct Index { unsigned x = 0, y = 0, z = 0; };
inline thread_local Index block_index, thread_index, block_dim, grid_dim;
// Of a launch only so many blocks are run, the last ones: a tensor larger than memory is touched at its end.
inline int64_t last_blocks = INT64_MAX;

// One block's threads.
class Block {
 public:
  explicit Block(unsigned threads) : fibers_(threads) {
    for (Fiber& fiber : fibers_) {
      fiber.stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (fiber.stack == MAP_FAILED) abort();
    }
  }
  ~Block() {
    for (Fiber& fiber : fibers_) munmap(fiber.stack, kStack);
  }

  unsigned threads() const { return unsigned(fibers_.size()); }

  void run(const std::function<void()>& body) {
    body_ = &body;
    current() = this;
    const size_t n = fibers_.size();
    // Most kernels have no barrier. Where the first thread meets none, the others are called as functions.
    resume(0, true);
    if (fibers_[0].done) {
      running_ = nullptr;
      for (size_t t = n - 1; t > 0; --t) {
        thread_index.x = unsigned(t);
        body();
      }
      return;
    }
    for (size_t pass = 0, ended = 0; ended < n; ++pass) {
      for (size_t i = pass == 0 ? 1 : 0; i < n; ++i) {
        // Forwards, backwards, and from the middle on, in turn.
        const size_t at = pass % 3 == 0 ? i : pass % 3 == 1 ? n - 1 - i : (i + n / 2) % n;
        if (pass != 0 && fibers_[at].done) continue;
        resume(at, pass == 0);
        ended += fibers_[at].done;
      }
      check_waiting(ended);
    }
  }

  // Threads wait for their block, or those of a warp for one another: then other warps may have ended.
  void check_waiting(size_t ended) {
    size_t at_barrier = 0;
    for (size_t at = 0; at < fibers_.size(); ++at) {
      const bool waits = !fibers_[at].done, alone = waits && fibers_[at].for_warp && fibers_[at / 32 * 32 + (at + 1) % 32].done;
      at_barrier += waits && !fibers_[at].for_warp;
      if (alone) {
        fprintf(stderr, "emulation: thread %zu waits for its warp, of which the next has ended\n", at);
        abort();
      }
    }
    if (at_barrier != 0 && at_barrier != fibers_.size()) {
      fprintf(stderr, "emulation: %zu of %zu threads ended while the others wait at a barrier\n", ended, fibers_.size());
      abort();
    }
  }

  // What thread `lane` of this thread's warp gives. All of a warp must come here.
  template <class T>
  T shuffle(T value, unsigned lane) {
    static_assert(sizeof(T) == 4);
    const unsigned at = thread_index.x, from = at / 32 * 32 + lane % 32;
    if (exchange_.size() != fibers_.size()) exchange_.resize(fibers_.size());
    memcpy(&exchange_[at], &value, 4);
    wait(true);
    memcpy(&value, &exchange_[from], 4);
    wait(true);
    return value;
  }

  void barrier() { wait(false); }

  void wait(bool for_warp) {
    if (!running_) {
      fprintf(stderr, "emulation: a thread waits at a barrier that the first thread did not meet\n");
      abort();
    }
    running_->for_warp = for_warp;
    leave_for(&running_->context, &main_, main_stack_, main_size_);
  }

  static Block*& current() {
    static thread_local Block* block = nullptr;
    return block;
  }

 private:
  struct Fiber {
    ucontext_t context;
    void* stack;
    bool done, for_warp;
  };
  static constexpr size_t kStack = 256 << 10;

  void resume(size_t at, bool first) {
    Fiber& fiber = fibers_[at];
    if (first) {
      fiber.done = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack;
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &Block::enter, 0);
    }
    running_ = &fiber;
    thread_index.x = unsigned(at);
    leave_for(&main_, &fiber.context, fiber.stack, kStack);
  }

  static void enter() {
    Block& block = *current();
    block.arrived(&block.main_stack_, &block.main_size_);
    (*block.body_)();
    block.running_->done = true;
    block.leave_for(nullptr, &block.main_, block.main_stack_, block.main_size_);
  }

  // Switch contexts, and tell the address sanitizer which stack is now in use. from: null when it never comes back.
  void leave_for(ucontext_t* from, ucontext_t* to, const void* stack, size_t size) {
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(from ? &fake : nullptr, stack, size);
#endif
    if (!from) setcontext(to);
    swapcontext(from, to);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
    (void)stack, (void)size;
  }
  void arrived(const void** stack, size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, stack, size);
#endif
    (void)stack, (void)size;
  }

  std::vector<Fiber> fibers_;
  std::vector<uint32_t> exchange_;
  Fiber* running_ = nullptr;
  ucontext_t main_;
  const void* main_stack_ = nullptr;
  size_t main_size_ = 0;
  const std::function<void()>* body_ = nullptr;
};

template <class Kernel, class... Args>
cudaError_t launch(Kernel kernel, int64_t blocks, unsigned threads, Args... args) {
  if (const char* failing = getenv("MERGE3_TEST_CUDA_ERROR")) return atoi(failing);
  if (cudaError_t e = work()) return e;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;  // as a real grid's x
  block_dim.x = threads;
  grid_dim.x = unsigned(blocks);
  static thread_local std::unique_ptr<Block> kept;  // its stacks serve the next launch
  if (!kept || kept->threads() != threads) kept = std::make_unique<Block>(threads);
  Block& block = *kept;
  const std::function<void()> body = [&] { kernel(args...); };
  catch_up();
  ++launches;
  for (int64_t b = std::max<int64_t>(0, blocks - last_blocks); b < blocks; ++b) {
    block_index.x = unsigned(b);
    block.run(body);
  }
  return cudaSuccess;
}

}  // namespace emulation

#define blockIdx ::emulation::block_index
#define threadIdx ::emulation::thread_index
#define blockDim ::emulation::block_dim
#define gridDim ::emulation::grid_dim
inline void __syncthreads() { emulation::Block::current()->barrier(); }
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulation::Block::current()->shuffle(value, unsigned(lane));
}
inline bool __all_sync(unsigned, bool value) {  // asked only of what a warp agrees on
  if (__shfl_sync(0u, uint32_t(value), 0) == uint32_t(value)) return value;
  fprintf(stderr, "emulation: threads of a warp disagree\n");
  abort();
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int other) {
  return emulation::Block::current()->shuffle(value, emulation::thread_index.x ^ unsigned(other));
}
