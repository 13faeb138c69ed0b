// Launches of batch normalisation for one storage type.
#pragma once
#include "batch_norm.cuh"
#include "device.cuh"

namespace lp {
namespace cuda {

template <class S, int V, bool LAST>
__global__ void __launch_bounds__(kNormThreads)
    norm_moments_kernel(const __grid_constant__ BatchNorm p, const __grid_constant__ NormPlan l,
                        typename NormSum<S>::type* partial) {
  norm_moments<S, V, LAST>(p, l, partial);
}

template <class S, int V, bool LAST, bool FORWARD>
__global__ void __launch_bounds__(kNormThreads)
    norm_combine_kernel(const __grid_constant__ BatchNorm p, const __grid_constant__ NormPlan l,
                        const typename NormSum<S>::type* partial, typename NormSum<S>::type* slopes) {
  norm_combine<S, V, LAST, FORWARD>(p, l, partial, slopes);
}

template <class S, int V, bool LAST, NormAct ACT>
__global__ void __launch_bounds__(kNormThreads)
    norm_apply_kernel(const __grid_constant__ BatchNorm p, const __grid_constant__ NormPlan l) {
  norm_apply<S, V, LAST, ACT>(p, l);
}

template <class S, int V, bool LAST, NormAct ACT, bool WRITE>
__global__ void __launch_bounds__(kNormThreads)
    norm_backward_kernel(const __grid_constant__ BatchNorm p, const __grid_constant__ NormPlan l,
                         const typename NormSum<S>::type* slopes, typename NormSum<S>::type* partial) {
  norm_backward<S, V, LAST, ACT, WRITE>(p, l, slopes, partial);
}

// Calls `with` with the activation as a constant. Single elements are rare: one variant serves them.
template <int V, class F>
void with_norm_act(Act act, F&& with) {
  if constexpr (V > 1) {
    if (act == Act::none) return with(std::integral_constant<NormAct, NormAct::none>());
    if (act == Act::relu) return with(std::integral_constant<NormAct, NormAct::relu>());
  }
  with(std::integral_constant<NormAct, NormAct::any>());
}

template <class S, int V, bool LAST>
struct NormLaunch {
  using A = typename NormSum<S>::type;
  const BatchNorm& p;
  const Env& env;
  cudaStream_t stream;
  NormPlan l;
  unsigned blocks, combining;
  int sums_bytes;
  A* partial;

  NormLaunch(const BatchNorm& p, const Env& env, cudaStream_t stream)
      : p(p),
        env(env),
        stream(stream),
        l(norm_plan(p, V, processors())),
        blocks(unsigned(l.parts) * unsigned(l.slabs)),
        combining(unsigned(share_of(l.channels, kCombineChannels))),
        sums_bytes(norm_sums_bytes(l, V, sizeof(A), LAST)),
        partial(nullptr) {}

  A* allocate(int64_t count) { return static_cast<A*>(env.alloc(env.owner, size_t(count) * sizeof(A))); }

  void forward() {
    if (p.training) {
      partial = allocate(2 * l.places * l.parts);
      norm_moments_kernel<S, V, LAST><<<blocks, kNormThreads, sums_bytes, stream>>>(p, l, partial);
      norm_combine_kernel<S, V, LAST, true><<<combining, kNormThreads, kCombineBytes, stream>>>(p, l, partial, nullptr);
      check_launch("masked_batch_norm_act statistics");
    }
    with_norm_act<V>(p.act, [&](auto act) {
      const int bytes = norm_apply_bytes(l, V, sizeof(A), LAST, false);
      norm_apply_kernel<S, V, LAST, decltype(act)::value><<<blocks, kNormThreads, bytes, stream>>>(p, l);
    });
    check_launch("masked_batch_norm_act");
  }

  void backward() {
    A* slopes = allocate(2 * l.channels);
    with_norm_act<V>(p.act, [&](auto act) {
      constexpr NormAct ACT = decltype(act)::value;
      if (p.training || p.grad_weight || p.grad_bias || p.grad_gate) {
        partial = allocate(2 * l.places * l.parts);
        norm_backward_kernel<S, V, LAST, ACT, false><<<blocks, kNormThreads, sums_bytes, stream>>>(p, l, nullptr, partial);
        norm_combine_kernel<S, V, LAST, false><<<combining, kNormThreads, kCombineBytes, stream>>>(p, l, partial, slopes);
        check_launch("masked_batch_norm_act gradient sums");
      } else {
        cudaMemsetAsync(slopes, 0, size_t(2 * l.channels) * sizeof(A), stream);
      }
      if (p.grad_x || p.grad_residual) {
        const int bytes = norm_apply_bytes(l, V, sizeof(A), LAST, true);
        norm_backward_kernel<S, V, LAST, ACT, true><<<blocks, kNormThreads, bytes, stream>>>(p, l, slopes, nullptr);
        check_launch("masked_batch_norm_act gradient");
      }
    });
  }

  void run(bool is_forward) { is_forward ? forward() : backward(); }
};

template <class S>
void norm_run(const BatchNorm& p, const Env& env, cudaStream_t stream, bool is_forward) {
  if (p.n * p.pixels * p.channels == 0) return;
  constexpr int V = S::kLanes;
  const bool vectors = norm_takes_vectors(p, V);
  if (p.channels_last)
    vectors ? NormLaunch<S, V, true>(p, env, stream).run(is_forward) : NormLaunch<S, 1, true>(p, env, stream).run(is_forward);
  else
    vectors ? NormLaunch<S, V, false>(p, env, stream).run(is_forward) : NormLaunch<S, 1, false>(p, env, stream).run(is_forward);
}

}  // namespace cuda
}  // namespace lp
