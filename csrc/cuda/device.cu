// Which GPU is the current one, whether a graph records its work, and what went wrong there, in words that say
// what to do.
#include <stdio.h>

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
