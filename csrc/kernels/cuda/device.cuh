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

// An attribute that is never 0, remembered.
template <cudaDeviceAttr ATTRIBUTE>
int attribute() {
  static std::atomic<int> known[64];
  const int device = current_device();
  int value = device < 64 ? known[device].load() : 0;
  if (value == 0) {
    cudaDeviceGetAttribute(&value, ATTRIBUTE, device);
    if (device < 64) known[device] = value;
  }
  return value;
}

inline int processors() { return std::max(attribute<cudaDevAttrMultiProcessorCount>(), 1); }

// Code for sm_90a runs on 9.0 and nothing else.
inline bool has_warp_groups() { return attribute<cudaDevAttrComputeCapabilityMajor>() == 9; }

}  // namespace cuda
}  // namespace lp
