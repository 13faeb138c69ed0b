// Runs the batch normalisation kernels' source on the host, block by block (simt_emulation.h).
#define LP_SIMT_EMULATION "simt_emulation.h"
#include "kernels/cuda/batch_norm.cuh"

namespace {
using namespace lp;
using namespace lp::cuda;

struct Setting {
  int processors, reverse, single;  // single: elements one by one, as maps at odd addresses are read
};

template <class F>
void run_grid(int blocks, int bytes, bool reverse, F&& kernel) {
  for (int i = 0; i < blocks; ++i) {
    simt::machine.bx = reverse ? blocks - 1 - i : i;
    simt::run_block(kNormThreads, bytes, reverse, kernel);
  }
}

template <class S, int V, bool LAST, NormAct ACT>
void run(const BatchNorm& p, const Setting& s, bool forward, int64_t* used) {
  using A = typename NormSum<S>::type;
  const NormPlan l = norm_plan(p, V, s.processors);
  const int blocks = l.parts * l.slabs, combining = int(share_of(l.channels, kCombineChannels));
  const int sums = norm_sums_bytes(l, V, sizeof(A), LAST);
  used[0] = l.parts, used[1] = l.slabs, used[2] = l.width, used[3] = l.repeat, used[4] = V;
  // As on the device: what a kernel does not write would be seen.
  std::vector<A> partial(size_t(2 * l.places * l.parts), A(std::nan(""))), slopes(size_t(2 * l.channels), A(std::nan("")));
  if (forward) {
    if (p.training) {
      run_grid(blocks, sums, s.reverse, [&] { norm_moments<S, V, LAST>(p, l, partial.data()); });
      run_grid(combining, kCombineBytes, s.reverse, [&] { norm_combine<S, V, LAST, true>(p, l, partial.data(), nullptr); });
    }
    run_grid(blocks, norm_apply_bytes(l, V, sizeof(A), LAST, false), s.reverse, [&] { norm_apply<S, V, LAST, ACT>(p, l); });
    return;
  }
  if (p.training || p.grad_weight || p.grad_bias || p.grad_gate) {
    run_grid(blocks, sums, s.reverse, [&] { norm_backward<S, V, LAST, ACT, false>(p, l, nullptr, partial.data()); });
    run_grid(combining, kCombineBytes, s.reverse,
             [&] { norm_combine<S, V, LAST, false>(p, l, partial.data(), slopes.data()); });
  } else {
    std::fill(slopes.begin(), slopes.end(), A(0));
  }
  if (p.grad_x || p.grad_residual)
    run_grid(blocks, norm_apply_bytes(l, V, sizeof(A), LAST, true), s.reverse,
             [&] { norm_backward<S, V, LAST, ACT, true>(p, l, slopes.data(), nullptr); });
}

template <class S, int V, bool LAST>
void run_act(const BatchNorm& p, const Setting& s, bool forward, int64_t* used) {
  if (V > 1 && p.act == Act::none) return run<S, V, LAST, NormAct::none>(p, s, forward, used);
  if (V > 1 && p.act == Act::relu) return run<S, V, LAST, NormAct::relu>(p, s, forward, used);
  run<S, V, LAST, NormAct::any>(p, s, forward, used);
}

template <class S>
void run_type(const BatchNorm& p, const Setting& s, bool forward, int64_t* used) {
  constexpr int V = S::kLanes;
  const bool vectors = !s.single && norm_takes_vectors(p, V);
  if (p.channels_last)
    vectors ? run_act<S, V, true>(p, s, forward, used) : run_act<S, 1, true>(p, s, forward, used);
  else
    vectors ? run_act<S, V, false>(p, s, forward, used) : run_act<S, 1, false>(p, s, forward, used);
}
}  // namespace

// lines, columns, width, rows, slabs, parts, lines per part, shared memory of the sums and of the backward pass in bytes.
extern "C" void norm_plan_of(int64_t pixels, int64_t channels, int last, int lanes, int bytes, int processors, int64_t* out) {
  BatchNorm p{};
  p.n = 1, p.pixels = pixels, p.channels = channels, p.channels_last = last != 0;
  const NormPlan l = norm_plan(p, lanes, processors);
  const int64_t found[] = {l.lines,
                           l.columns,
                           l.width,
                           l.rows,
                           l.slabs,
                           l.parts,
                           l.lines_per_part,
                           norm_sums_bytes(l, lanes, bytes, last),
                           norm_apply_bytes(l, lanes, bytes, last, true)};
  std::copy(std::begin(found), std::end(found), out);
}

// sizes: n, channels, pixels, channels_last, length of the vectors, live count (-1: all), length of place (0: none).
// maps: x, residual, y, grad_y, grad_x, grad_residual. vectors: weight, bias, gate, mean, var, their gradients (3).
// used: parts, slabs, width, repeat, lanes.
extern "C" void emulate_norm(const int64_t* sizes, int dtype, void* const* maps, void* const* vectors, const int64_t* live,
                             int training, double eps, int act, int forward, const int* setting, int64_t* used) {
  BatchNorm p{};
  p.n = sizes[0], p.channels = sizes[1], p.pixels = sizes[2], p.channels_last = sizes[3] != 0, p.vector_channels = sizes[4];
  p.dtype = DType(dtype);
  p.x = maps[0], p.residual = maps[1], p.y = maps[2], p.grad_y = maps[3], p.grad_x = maps[4], p.grad_residual = maps[5];
  p.weight = vectors[0], p.bias = vectors[1], p.gate = vectors[2], p.mean = vectors[3], p.var = vectors[4];
  p.grad_weight = vectors[5], p.grad_bias = vectors[6], p.grad_gate = vectors[7];
  p.live = sizes[5] < 0 ? IndexList{nullptr, p.channels} : IndexList{live, sizes[5]};
  p.place = sizes[6] ? live : nullptr;
  p.training = training, p.eps = eps, p.act = Act(act);
  const Setting s{setting[0], setting[1], setting[2]};
  if (p.dtype == DType::f64) return run_type<F64>(p, s, forward, used);
  if (p.dtype == DType::bf16) return run_type<Bf16>(p, s, forward, used);
  if (p.dtype == DType::f16) return run_type<F16>(p, s, forward, used);
  run_type<F32>(p, s, forward, used);
}
