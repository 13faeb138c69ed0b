// Launches of one storage type: copy of inputs that do not lie in rows of channels, convolution, sum of a split depth.
#pragma once
#include <cstdlib>

#include "depthwise.cuh"
#include "gemm.cuh"
#include "tensor_plan.h"

namespace lp {
namespace cuda {

template <class T>
__global__ void __launch_bounds__(T::kThreads) tensor_conv_kernel(const __grid_constant__ TensorConv p) {
#if !defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if constexpr (T::kGroup)
    return;  // never launched there
  else
#endif
    TensorConvKernel<T>(p, simt::shared()).run();
}

template <class S>
__global__ void __launch_bounds__(kThreads) add_parts_kernel(const __grid_constant__ TensorConv p) {
  add_parts<S>(p, int64_t(blockIdx.x) * kThreads + threadIdx.x);
}

template <class S, int KW, int STRIDE>
__global__ void __launch_bounds__(kThreads) depthwise_kernel(const __grid_constant__ TensorConv p) {
  depthwise_unit_of<S, KW, STRIDE>(p, int64_t(blockIdx.x) * kThreads + threadIdx.x);
}

// Gathers the input channels into rows with spare lanes of zeros; one thread per eight channels of a pixel.
template <class S>
__global__ void __launch_bounds__(kThreads)
    stage_kernel(const __grid_constant__ CompactForward f, const View to, int64_t units) {
  using E = typename S::Element;
  const int64_t unit = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (unit >= units) return;
  const ConvShape& s = f.shape;
  const int64_t chunks = round_up(s.channels, 8) / 8, pixels = units / chunks;
  const bool pixels_first = f.x.w < f.x.c;
  const int64_t m = pixels_first ? unit % pixels : unit / chunks, c0 = (pixels_first ? unit / pixels : unit % chunks) * 8;
  const Row r = pixel_of(m, s.height, s.width);
  const E* x = static_cast<const E*>(f.x.data) + at(f.x, r.n, 0, r.h, r.w);
  float v[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int64_t c = c0 + i < s.channels ? f.in_index[c0 + i] : -1;
    v[i] = valid(c, f.x_channels) ? S::load(x[c * f.x.c]) : 0.f;
  }
  E* y = static_cast<E*>(to.data) + at(to, r.n, c0, r.h, r.w);
#pragma unroll
  for (int i = 0; i < 8 / S::kLanes; ++i) simt::store16(y + i * S::kLanes, pack<S>(v + i * S::kLanes));
}

template <class T>
void launch_tile(const TensorConv& p, const Launch& launch, cudaStream_t stream) {
  static std::atomic<bool> ready[64];
  const int device = current_device();
  if (device >= 64 || !ready[device].load()) {
    cudaFuncSetAttribute(tensor_conv_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kShared);
    if (device < 64) ready[device] = true;
  }
  const dim3 grid(unsigned(launch.blocks_m) * unsigned(launch.blocks_n), unsigned(launch.splits));
  tensor_conv_kernel<T><<<grid, T::kThreads, T::shared_bytes(p.steps_per_split), stream>>>(p);
}

template <class S, int I = 0>
void launch_conv(const TensorConv& p, const Launch& launch, cudaStream_t stream) {
  if constexpr (I < kTileCount) {
    if constexpr (has_tile<S>(I))
      if (launch.tile == I) return launch_tile<TileAt<S, I>>(p, launch, stream);
    launch_conv<S, I + 1>(p, launch, stream);
  }
}

template <class S>
struct LaunchDepthwise {
  const TensorConv& p;
  cudaStream_t stream;
  template <int KW, int STRIDE>
  void operator()() const {
    depthwise_kernel<S, KW, STRIDE><<<blocks(depthwise_units(p), kThreads), kThreads, 0, stream>>>(p);
  }
};

// LIGHTNING_PRUNE_CUDA_TILE=tile[:splits] fixes what choose_launch would choose, LIGHTNING_PRUNE_CUDA_GROUPS=1 lets it choose
// tiles of warp groups; for measuring.
template <class S>
Launch planned(const CompactForward& f, int64_t pixels, int64_t columns) {
  int tile = -1, splits = 0;
  if (const char* text = std::getenv("LIGHTNING_PRUNE_CUDA_TILE")) {
    char* rest = nullptr;
    tile = int(std::strtol(text, &rest, 10));
    if (*rest == ':') splits = std::max(0, int(std::strtol(rest + 1, nullptr, 10)));
    if (tile < 0 || tile >= kTileCount || !has_tile<S>(tile) || (kTiles[tile].group && !has_warp_groups())) tile = -1;
  }
  const char* wanted = std::getenv("LIGHTNING_PRUNE_CUDA_GROUPS");
  const bool groups = S::kLanes == 8 && wanted && *wanted == '1' && has_warp_groups();
  const int64_t depth = f.shape.kh * f.shape.kw * (round_up(f.shape.channels, 8) / f.lanes);
  return choose_launch(pixels, columns, depth, processors(), groups, tile, splits);
}

template <class S>
void tensor_forward(const CompactForward& f, const Env& env, cudaStream_t stream) {
  const ConvShape& s = f.shape;
  const int64_t pixels = s.n * s.out_h * s.out_w, columns = round_up(s.outputs, 8);
  if (pixels == 0 || s.outputs == 0) return;
  View x = f.x;
  if (!reads_in_place(f)) {
    x = staged_view(f, env.alloc(env.owner, size_t(staged_elements(f)) * sizeof(typename S::Element) + 16));
    const int64_t units = staged_elements(f) / 8;
    stage_kernel<S><<<blocks(units, kThreads), kThreads, 0, stream>>>(f, x, units);
    check_launch("compact_conv2d staging");
  }
  if (s.groups > 1) {
    const TensorConv p = tensor_params(f, x, Launch{0, 1, 0, 0}, nullptr);
    with_depthwise_variant(p, LaunchDepthwise<S>{p, stream});
    return check_launch("compact_conv2d depthwise");
  }
  const Launch launch = planned<S>(f, pixels, columns);
  float* partial = nullptr;
  if (launch.splits > 1)
    partial = static_cast<float*>(env.alloc(env.owner, size_t(launch.splits * pixels * columns) * sizeof(float)));
  const TensorConv p = tensor_params(f, x, launch, partial);
  launch_conv<S>(p, launch, stream);
  check_launch("compact_conv2d on tensor cores");
  if (partial) {
    add_parts_kernel<S><<<blocks(pixels * columns / 8, kThreads), kThreads, 0, stream>>>(p);
    check_launch("compact_conv2d sum of parts");
  }
}

}  // namespace cuda
}  // namespace lp
