// The only file with <<<>>>; what a launcher sends to the device, and what every kernel begins and ends with.
#pragma once
#include <cuda_runtime.h>

#include <vector>

#include "launch.h"
#include "storage.cuh"

namespace merge3 {

// Of a block.
#if !defined(MERGE3_THREADS)
#define MERGE3_THREADS 256
#endif
constexpr int kThreads = MERGE3_THREADS;

template <class Kernel, class... Args>
cudaError_t launch(Kernel kernel, int64_t blocks, cudaStream_t stream, Args... args) {
  if (blocks == 0) return cudaSuccess;
#if defined(MERGE3_EMULATED)  // tests/kernels/emulation: this file as C++
  (void)stream;
  return emulation::launch(kernel, blocks, kThreads, args...);
#else
  kernel<<<unsigned(blocks), kThreads, 0, stream>>>(args...);
  return cudaGetLastError();
#endif
}

#define MERGE3_TRY(call)                     \
  do {                                       \
    cudaError_t error_ = (call);             \
    if (error_ != cudaSuccess) return error_; \
  } while (0)

// Memory of the device for the length of a call, in the order of a stream: no call synchronises, and the pool of the
// allocator keeps it cheap.
template <class T>
class DeviceArray {
 public:
  DeviceArray(size_t count, cudaStream_t stream) : count_(count), stream_(stream) {
    status = count ? cudaMallocAsync(reinterpret_cast<void**>(&data_), count * sizeof(T), stream) : cudaSuccess;
  }
  ~DeviceArray() {
    if (data_) cudaFreeAsync(data_, stream_);
  }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* get() const { return data_; }
  cudaError_t zero() { return count_ ? cudaMemsetAsync(data_, 0, count_ * sizeof(T), stream_) : cudaSuccess; }
  // Waits: the host needs the numbers.
  cudaError_t read(T* host) const {
    if (!count_) return cudaSuccess;
    cudaError_t e = cudaMemcpyAsync(host, data_, count_ * sizeof(T), cudaMemcpyDeviceToHost, stream_);
    return e ? e : cudaStreamSynchronize(stream_);
  }

  cudaError_t status = cudaSuccess;

 private:
  T* data_ = nullptr;
  size_t count_;
  cudaStream_t stream_;
};

// What the blocks of a launch work on, one part of a tensor each.
struct Work {
  const merge3_tensor* table;
  const merge3_block* blocks;
};

// Everything that a call sends to the device, as one copy from pinned memory: the copy engine reads that by itself,
// where a copy of more than 64 KB from ordinary memory may wait for all work before it on the stream.
//
//   Upload upload(stream);
//   const auto numbers = upload.add(coefficients, count);
//   MERGE3_TRY(upload.send());
//   .. upload.at(numbers) ..
class Upload {
 public:
  template <class T>
  struct Part {
    size_t offset;
  };

  explicit Upload(cudaStream_t stream) : stream_(stream) {}
  ~Upload() {
    if (data_) cudaFreeAsync(data_, stream_);
  }
  Upload(const Upload&) = delete;
  Upload& operator=(const Upload&) = delete;

  // The array is read by send().
  template <class T>
  Part<T> add(const T* host, size_t count) {
    const Part<T> part{size_};
    sources_.push_back({host, count * sizeof(T), size_});
    size_ += (count * sizeof(T) + 15) / 16 * 16;
    return part;
  }
  struct WorkPart {
    Part<merge3_tensor> table;
    Part<merge3_block> blocks;
  };
  WorkPart add_work(const merge3_tensor* table, int64_t tensors, const std::vector<merge3_block>& blocks) {
    return {add(table, size_t(tensors)), add(blocks.data(), blocks.size())};
  }
  cudaError_t send();

  Work at(WorkPart part) const { return {at(part.table), at(part.blocks)}; }
  template <class T>
  const T* at(Part<T> part) const {
    return reinterpret_cast<const T*>(data_ + part.offset);
  }

 private:
  struct Source {
    const void* host;
    size_t bytes, offset;
  };
  std::vector<Source> sources_;
  size_t size_ = 0;
  char* data_ = nullptr;
  cudaStream_t stream_;
};

// ---------------------------------------------------------------------------- inside kernels

// Elements [begin, end) of tensor t.
struct Span {
  int64_t t;
  const merge3_tensor& tensor;
  int64_t begin, end;
};
__device__ __forceinline__ Span span_of(const Work& work) {
  const merge3_block block = work.blocks[blockIdx.x];
  const merge3_tensor& tensor = work.table[block.tensor];
  const int64_t begin = block.chunk * kChunk;
  return {block.tensor, tensor, begin, begin + kChunk < tensor.numel ? begin + kChunk : tensor.numel};
}

// The sums over a block's threads, each in the same order, to `to`. Every thread of the block must come here.
template <int N>
__device__ inline void block_sum(const double (&sums)[N], double* to) {
  __shared__ double shared[kThreads];
#pragma unroll
  for (int s = 0; s < N; ++s) {
    shared[threadIdx.x] = sums[s];
    __syncthreads();
#pragma unroll 1
    for (int half = kThreads / 2; half > 0; half /= 2) {
      if (int(threadIdx.x) < half) shared[threadIdx.x] += shared[threadIdx.x + half];
      __syncthreads();
    }
    if (threadIdx.x == 0) to[s] = shared[0];
    __syncthreads();
  }
}

}  // namespace merge3
