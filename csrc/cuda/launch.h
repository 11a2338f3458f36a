// What api.cpp calls on a CUDA device. Each returns a cudaError_t as int, 0 for success; host arrays
// in, host arrays out, work ordered on `stream`.
#pragma once
#include "../cpu/merge_cpu.h"

namespace merge3 {

const char* cuda_message(int code);

// One GPU is this thread's current device as long as this lives: kernels are launched there, whatever device their
// pointers and their stream belong to. status: 0, or why it could not become the current one.
class DeviceScope {
 public:
  explicit DeviceScope(int index);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

  int status;

 private:
  int index_, previous_;
};

// Whether a CUDA graph is recording what this stream is given.
int find_capture(void* stream, bool* capturing);

int merge_cuda(const merge3_modes& modes, int64_t tensors, const merge3_tensor* table,
               const merge3_coefficient* coefficients, const float* lambda, void* stream);
// The same, every array but the plan already on the device: launches and nothing else.
int merge_resident_cuda(const merge3_modes& modes, const merge3_plan& plan, const merge3_tensor* table,
                        const merge3_block* blocks, const merge3_coefficient* coefficients, const float* lambda,
                        void* stream);
// partial: [chunks, 2 K + 1], host memory.
int backward_cuda(const merge3_modes& modes, int64_t tensors, const merge3_tensor* table,
                  const merge3_coefficient* coefficients, const float* lambda, double* partial, void* stream);
// partial: [chunks, K, 2], host memory.
int pack_cuda(int32_t packing, int32_t experts, int64_t tensors, const merge3_tensor* table, double* partial, void* stream);
int elementwise_cuda(int32_t rule, int32_t experts, int64_t tensors, const merge3_tensor* table,
                     const float* scalars, const float* per_expert, void* stream);
int gram_cuda(int32_t experts, int64_t tensors, const merge3_tensor* table, double* partial, void* stream);
int order_statistics_cuda(const OrderStatistics& call, int64_t tensors, void* stream);
int rank_tables_cuda(int32_t experts, int64_t tensors, const merge3_tensor* table, double* bin_l1,
                     void* stream);

}  // namespace merge3
