// The device at launch: its size, and whether a launch went through.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

namespace lp {
namespace cuda {

inline void check_launch(const char* what) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("lightning_prune: launching ") + what + " failed: " + cudaGetErrorString(error));
}

inline int current_device() {
  int device = 0;
  cudaGetDevice(&device);
  return device;
}

inline int processors() {
  static std::atomic<int> known[64];
  const int device = current_device();
  int count = device < 64 ? known[device].load() : 0;
  if (count == 0) {
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    if (device < 64) known[device] = count;
  }
  return std::max(count, 1);
}

}  // namespace cuda
}  // namespace lp
