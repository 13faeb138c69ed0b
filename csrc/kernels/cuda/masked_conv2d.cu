// Masked convolution on CUDA: forward, input gradient, weight, bias and gate gradients.
#include "gemm.cuh"

namespace lp {
namespace cuda {
namespace {

template <class T>
void forward(const MaskedForward& f, cudaStream_t stream) {
  const ConvShape& s = f.shape;
  if (f.live_out.count == 0) return;
  run_pixels<T>(MaskedForwardProblem<T>{f}, s.n * s.out_h * s.out_w, s.outputs / s.groups, s.groups, stream, "masked_conv2d");
}

// One block per live output: sums of its gradient, its bias and gate gradients, and the gated weight gradient.
template <class T>
__global__ void __launch_bounds__(kThreads) finish_kernel(const FinishGrad<T> p) {
  const int64_t o = p.f.live_out[blockIdx.x];
  if (!valid(o, p.f.shape.outputs)) return;
  const int64_t pixels = p.f.shape.n * p.f.shape.out_h * p.f.shape.out_w;
  T grad = T(0), gate = T(0);
  for (int64_t k = threadIdx.x; k < pixels; k += kThreads) {
    const Row r = pixel_of(k, p.f.shape.out_h, p.f.shape.out_w);
    grad += p.output(r, blockIdx.x);
  }
  for (int64_t i = threadIdx.x; i < p.per_output(); i += kThreads) gate += p.weight(o, i);
  grad = block_sum(grad);
  gate = block_sum(gate);
  if (threadIdx.x == 0) p.finish(o, grad, gate);
}

// One block per live input.
template <class T>
__global__ void __launch_bounds__(kThreads) in_gate_kernel(const FinishGrad<T> p) {
  const int64_t c = p.f.live_in[blockIdx.x];
  if (!valid(c, p.f.shape.channels)) return;
  T sum = T(0);
  for (int64_t i = threadIdx.x; i < p.per_input(); i += kThreads) sum += p.input(c, i);
  sum = block_sum(sum);
  if (threadIdx.x == 0) static_cast<T*>(p.f.grad_in_gate)[c] = sum;
}

template <class T>
void backward(const MaskedBackward& f, const Env& env, cudaStream_t stream) {
  const ConvShape& s = f.shape;
  const int64_t in_per = s.channels / s.groups, out_per = s.outputs / s.groups, taps = s.kh * s.kw;
  if (f.grad_x.data && f.live_in.count > 0)
    run_pixels<T>(InputGradProblem<T>{f}, s.n * s.height * s.width, in_per, s.groups, stream, "masked_conv2d input gradient");
  if (!(f.grad_weight || f.grad_bias || f.grad_gate || f.grad_in_gate) || f.live_out.count == 0) return;
  const size_t bytes = size_t(s.outputs * in_per * taps) * sizeof(T);
  T* raw = static_cast<T*>(env.alloc(env.owner, bytes + sizeof(T)));
  cudaMemsetAsync(raw, 0, bytes, stream);
  const WeightGradProblem<T> p{f, raw};
  if (in_per * taps > 0) {
    if (out_per <= 8)
      reduce_kernel<T><<<dim3(unsigned(in_per * taps), unsigned(out_per), unsigned(s.groups)), kThreads, 0, stream>>>(p);
    else
      tiled_kernel<T>
          <<<dim3(blocks(out_per, kTile), blocks(in_per * taps, kTile), unsigned(s.groups)), kThreads, 0, stream>>>(p);
    check_launch("masked_conv2d weight gradient");
  }
  finish_kernel<T><<<unsigned(f.live_out.count), kThreads, 0, stream>>>(FinishGrad<T>{f, raw});
  check_launch("masked_conv2d bias and gate gradient");
  if (f.grad_in_gate && f.live_in.count > 0) {
    in_gate_kernel<T><<<unsigned(f.live_in.count), kThreads, 0, stream>>>(FinishGrad<T>{f, raw});
    check_launch("masked_conv2d gradient of the inputs' gate");
  }
}

}  // namespace
}  // namespace cuda

void masked_forward_cuda(const MaskedForward& f, const Env&, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  f.dtype == DType::f64 ? cuda::forward<double>(f, s) : cuda::forward<float>(f, s);
}

void masked_backward_cuda(const MaskedBackward& f, const Env& env, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  f.dtype == DType::f64 ? cuda::backward<double>(f, env, s) : cuda::backward<float>(f, env, s);
}

}  // namespace lp
