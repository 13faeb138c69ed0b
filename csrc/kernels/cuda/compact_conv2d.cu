// Weight packing and compact inference convolution on CUDA.
#include "gemm.cuh"
#include "tensor_plan.h"

namespace lp {
namespace cuda {

void tensor_forward_bf16(const CompactForward&, const Env&, cudaStream_t);
void tensor_forward_f16(const CompactForward&, const Env&, cudaStream_t);
void tensor_forward_tf32(const CompactForward&, const Env&, cudaStream_t);

namespace {

// With out_index most channels of y may receive no output: all of y starts as act(residual).
template <class S, class T>
__global__ void __launch_bounds__(kThreads) residual_kernel(const CompactForward f, int64_t total) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= total) return;
  const Row r = pixel_of(i % (f.shape.out_h * f.shape.out_w), f.shape.out_h, f.shape.out_w);
  const int64_t plane = i / (f.shape.out_h * f.shape.out_w), n = plane / f.y_channels, c = plane % f.y_channels;
  const T v = load(static_cast<const S*>(f.residual.data) + at(f.residual, n, c, r.h, r.w));
  save(static_cast<S*>(f.y.data) + at(f.y, n, c, r.h, r.w), activate(f.act, v));
}

template <class S, class T>
void compact(const CompactForward& f, const Env& env, cudaStream_t stream) {
  const ConvShape& s = f.shape;
  const int64_t pixels = s.n * s.out_h * s.out_w;
  if (f.out_index.index && pixels * f.y_channels > 0) {
    residual_kernel<S, T><<<blocks(pixels * f.y_channels, kThreads), kThreads, 0, stream>>>(f, pixels * f.y_channels);
    check_launch("compact_conv2d residual");
  }
  if (tensor_cores_take(f)) {
    if (f.dtype == DType::bf16) return tensor_forward_bf16(f, env, stream);
    return f.dtype == DType::f16 ? tensor_forward_f16(f, env, stream) : tensor_forward_tf32(f, env, stream);
  }
  run_pixels<T>(CompactProblem<S, T>{f}, pixels, s.outputs / s.groups, s.groups, stream, "compact_conv2d");
}

// The second layout of a packed weight, see tensor_layout.h.
template <class T>
__global__ void __launch_bounds__(kThreads) pack_tensor_kernel(const View w, int64_t outputs, int64_t channels, int64_t kh,
                                                               int64_t kw, int lanes, bool depthwise, T* packed) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x, taps = kh * kw;
  if (i >= outputs * channels * taps) return;
  const int64_t o = i / (channels * taps), c = i / taps % channels, tap = i % taps;
  packed[tensor_weight_offset(o, c, tap, outputs, channels, lanes, depthwise)] =
      static_cast<const T*>(w.data)[at(w, o, c, tap / kw, tap % kw)];
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const View w, int64_t outputs, int64_t channels, int64_t kh, int64_t kw, int64_t groups, T* packed) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x, taps = kh * kw;
  if (i >= outputs * channels * taps) return;
  const int64_t o = i / (channels * taps), c = i / taps % channels, tap = i % taps;
  packed[packed_offset(o, c, tap, outputs, channels, taps, groups)] =
      static_cast<const T*>(w.data)[at(w, o, c, tap / kw, tap % kw)];
}

template <class T>
void pack(const View& w, int64_t outputs, int64_t channels, int64_t kh, int64_t kw, int64_t groups, void* packed,
          cudaStream_t stream) {
  const int64_t count = outputs * channels * kh * kw;
  cudaMemsetAsync(packed, 0, size_t(packed_size(outputs, channels, kh * kw, groups)) * sizeof(T), stream);
  if (count > 0)
    pack_kernel<T>
        <<<blocks(count, kThreads), kThreads, 0, stream>>>(w, outputs, channels, kh, kw, groups, static_cast<T*>(packed));
  check_launch("pack_conv2d_weight");
}

}  // namespace
}  // namespace cuda

void compact_forward_cuda(const CompactForward& f, const Env& env, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  switch (f.dtype) {
    case DType::f64:
      return cuda::compact<double, double>(f, env, s);
    case DType::bf16:
      return cuda::compact<__nv_bfloat16, float>(f, env, s);
    case DType::f16:
      return cuda::compact<__half, float>(f, env, s);
    default:
      return cuda::compact<float, float>(f, env, s);
  }
}

void pack_cuda(const View& weight, DType dtype, int64_t outputs, int64_t channels_per_group, int64_t kh, int64_t kw,
               int64_t groups, void* packed, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (dtype == DType::f64)
    cuda::pack<double>(weight, outputs, channels_per_group, kh, kw, groups, packed, s);
  else
    cuda::pack<float>(weight, outputs, channels_per_group, kh, kw, groups, packed, s);
}

void pack_tensor_cuda(const View& weight, int64_t outputs, int64_t channels_per_group, int64_t kh, int64_t kw, int lanes,
                      bool depthwise, float* packed, int64_t gap, int64_t size, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const int64_t count = outputs * channels_per_group * kh * kw;
  cudaMemsetAsync(packed, 0, size_t(size) * sizeof(float), s);
  if (count > 0)
    cuda::pack_tensor_kernel<float><<<cuda::blocks(count, cuda::kThreads), cuda::kThreads, 0, s>>>(
        weight, outputs, channels_per_group, kh, kw, lanes, depthwise, packed + gap);
  cuda::check_launch("pack_conv2d_weight for tensor cores");
}

}  // namespace lp
