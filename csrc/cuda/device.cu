// Which GPU is the current one, whether a graph records its work, what is copied to it, and what went wrong there, in
// words that say what to do.
#include <stdio.h>
#include <string.h>

#include <mutex>

#include "launch.cuh"

#if !defined(MERGE3_ARCHITECTURES)
#define MERGE3_ARCHITECTURES "?"
#endif

namespace merge3 {

DeviceScope::DeviceScope(int index) : index_(index), previous_(index) {
  status = cudaGetDevice(&previous_);
  if (status == cudaSuccess && previous_ != index) status = cudaSetDevice(index);
  if (status != cudaSuccess) previous_ = index;  // nothing to put back
}

DeviceScope::~DeviceScope() {
  if (previous_ != index_) cudaSetDevice(previous_);
}

// Pinned memory that copies to the devices are made from. A piece serves one copy at a time, and the next when the
// event behind that copy has passed; there are as many as there are copies under way.
namespace {
struct Pinned {
  void* data;
  size_t bytes;
  int device;  // of the event
  cudaEvent_t done;
  bool taken;
};
std::mutex pinned_lock;
std::vector<Pinned*>& all_pinned() {
  static auto* all = new std::vector<Pinned*>;  // never destroyed: at exit the runtime may be gone before it
  return *all;
}

cudaError_t take_pinned(size_t bytes, Pinned** found) {
  int device = 0;
  MERGE3_TRY(cudaGetDevice(&device));
  const std::lock_guard<std::mutex> hold(pinned_lock);
  for (Pinned* piece : all_pinned())
    if (!piece->taken && piece->device == device && piece->bytes >= bytes && cudaEventQuery(piece->done) == cudaSuccess) {
      piece->taken = true;
      *found = piece;
      return cudaSuccess;
    }
  cudaGetLastError();  // "not ready" is no error of the launch that follows
  size_t size = size_t(256) << 10;
  while (size < bytes) size *= 2;
  Pinned piece{nullptr, size, device, nullptr, true};
  MERGE3_TRY(cudaMallocHost(&piece.data, size));
  if (const cudaError_t status = cudaEventCreateWithFlags(&piece.done, cudaEventDisableTiming)) return cudaFreeHost(piece.data), status;
  all_pinned().push_back(*found = new Pinned(piece));
  return cudaSuccess;
}

void give_pinned(Pinned* piece) {
  const std::lock_guard<std::mutex> hold(pinned_lock);
  piece->taken = false;
}
}  // namespace

cudaError_t Upload::send() {
  if (!size_) return cudaSuccess;
  Pinned* piece = nullptr;
  MERGE3_TRY(take_pinned(size_, &piece));
  for (const Source& source : sources_)
    if (source.bytes) memcpy(static_cast<char*>(piece->data) + source.offset, source.host, source.bytes);
  cudaError_t status = cudaMallocAsync(reinterpret_cast<void**>(&data_), size_, stream_);
  if (!status) status = cudaMemcpyAsync(data_, piece->data, size_, cudaMemcpyHostToDevice, stream_);
  const cudaError_t recorded = cudaEventRecord(piece->done, stream_);
  give_pinned(piece);
  return status ? status : recorded;
}

int find_capture(void* stream, bool* capturing) {
  cudaStreamCaptureStatus found = cudaStreamCaptureStatusNone;
  const cudaError_t code = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &found);
  // Implicit: the default stream was asked while one that waits for it is recorded.
  *capturing = code == cudaErrorStreamCaptureImplicit || (code == cudaSuccess && found != cudaStreamCaptureStatusNone);
  if (code != cudaSuccess) cudaGetLastError();  // it is reported here, and must not be found after the next launch
  return *capturing ? cudaSuccess : code;
}

const char* cuda_message(int code) {
  static thread_local char text[256];
  int device = 0, major = 0, minor = 0, driver = 0, runtime = 0;
  switch (code) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
      cudaGetDevice(&device);
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
      snprintf(text, sizeof text, "built for compute capabilities %s, this GPU has %d%d: build again with MERGE3_ARCHITECTURES=%d%d",
               MERGE3_ARCHITECTURES, major, minor, major, minor);
      return text;
    case cudaErrorInsufficientDriver:
      cudaDriverGetVersion(&driver);
      cudaRuntimeGetVersion(&runtime);
      snprintf(text, sizeof text, "the driver serves CUDA %d.%d, this build needs %d.%d: update the driver, or build with an older nvcc",
               driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
      return text;
    default: return cudaGetErrorString(cudaError_t(code));
  }
}

}  // namespace merge3
