// The only file with <<<>>>, and the device arrays a launcher needs for the length of a call.
#pragma once
#include <cuda_runtime.h>

#include <vector>

#include "launch.h"

namespace merge3 {

// Of a block. Kernels ask for at least one block per multiprocessor: for more, the assembler would spill registers
// (benchmarks/ptxas.py).
constexpr int kThreads = 256;

template <class Kernel, class... Args>
cudaError_t launch(Kernel kernel, int64_t blocks, cudaStream_t stream, Args... args) {
  if (blocks == 0) return cudaSuccess;
#if defined(MERGE3_EMULATED)  // tests/kernels/emulation: this file as C++
  return emulation::launch(kernel, blocks, kThreads, args...);
#else
  kernel<<<unsigned(blocks), kThreads, 0, stream>>>(args...);
  return cudaGetLastError();
#endif
}

// A stream-ordered device array: no call synchronises, and the pool of the allocator keeps it cheap.
template <class T>
class DeviceArray {
 public:
  DeviceArray(size_t count, cudaStream_t stream) : count_(count), stream_(stream) {
    status = count ? cudaMallocAsync(reinterpret_cast<void**>(&data_), count * sizeof(T), stream) : cudaSuccess;
  }
  DeviceArray(const T* host, size_t count, cudaStream_t stream) : DeviceArray(count, stream) {
    if (status == cudaSuccess && count)
      status = cudaMemcpyAsync(data_, host, count * sizeof(T), cudaMemcpyHostToDevice, stream);
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

#define MERGE3_TRY(call)                     \
  do {                                       \
    cudaError_t error_ = (call);             \
    if (error_ != cudaSuccess) return error_; \
  } while (0)

// ---------------------------------------------------------------------------- inside kernels

// Which tensor a chunk belongs to: the last t with first[t] <= chunk.
__device__ inline int64_t tensor_of_chunk(const int64_t* first, int64_t tensors, int64_t chunk) {
  int64_t low = 0, high = tensors;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (first[middle] <= chunk) low = middle;
    else high = middle;
  }
  return low;
}

__device__ inline float load1(int32_t dtype, const void* data, int64_t i) {
  if (data == nullptr) return 0.0f;
  if (dtype == MERGE3_FLOAT32) return static_cast<const float*>(data)[i];
  const uint16_t x = static_cast<const uint16_t*>(data)[i];
  return dtype == MERGE3_BFLOAT16 ? bfloat16_to_float(x) : float16_to_float(x);
}

__device__ inline bool aligned16(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

// Eight consecutive elements as float32: 16-byte loads where the address allows, zeros past n. Loops over a
// part of them run to eight all the same: an array indexed by a number not known when compiling leaves the registers.
__device__ inline void load8(int32_t dtype, const void* data, int64_t i, int n, float (&to)[8]) {
  if (data != nullptr && n == 8) {
    if (dtype == MERGE3_FLOAT32 && aligned16(static_cast<const float*>(data) + i)) {
      const float4* p = reinterpret_cast<const float4*>(static_cast<const float*>(data) + i);
      const float4 a = p[0], b = p[1];
      to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w, to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
      return;
    }
    if (dtype != MERGE3_FLOAT32 && aligned16(static_cast<const uint16_t*>(data) + i)) {
      const uint4 v = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(data) + i);
      const uint32_t w[4] = {v.x, v.y, v.z, v.w};
      for (int j = 0; j < 4; ++j) {
        const uint16_t low = uint16_t(w[j]), high = uint16_t(w[j] >> 16);
        to[2 * j] = dtype == MERGE3_BFLOAT16 ? bfloat16_to_float(low) : float16_to_float(low);
        to[2 * j + 1] = dtype == MERGE3_BFLOAT16 ? bfloat16_to_float(high) : float16_to_float(high);
      }
      return;
    }
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) to[j] = j < n ? load1(dtype, data, i + j) : 0.0f;
}

__device__ inline void store8(int32_t dtype, void* out, int64_t i, int n, const float (&from)[8]) {
  if (dtype == MERGE3_FLOAT32) {
    float* to = static_cast<float*>(out) + i;
    if (n == 8 && aligned16(to)) {
      reinterpret_cast<float4*>(to)[0] = make_float4(from[0], from[1], from[2], from[3]);
      reinterpret_cast<float4*>(to)[1] = make_float4(from[4], from[5], from[6], from[7]);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (j < n) to[j] = from[j];
    }
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(out) + i;
  uint32_t x[8];
  for (int j = 0; j < 8; ++j)
    x[j] = dtype == MERGE3_BFLOAT16 ? float_to_bfloat16(as_uint(from[j])) : float_to_float16(from[j]);
  if (n == 8 && aligned16(to)) {
    *reinterpret_cast<uint4*>(to) =
        make_uint4(x[0] | x[1] << 16, x[2] | x[3] << 16, x[4] | x[5] << 16, x[6] | x[7] << 16);
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (j < n) to[j] = uint16_t(x[j]);
  }
}

}  // namespace merge3
