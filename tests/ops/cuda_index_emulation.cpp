// Runs the CUDA kernels' index arithmetic (conv_problems.h) on the host, in float64: same functors, plain loops.
#include <vector>

#include "kernels/cuda/conv_problems.h"

namespace {

template <class P>
void run(const P& p, int64_t groups) {
  for (int64_t z = 0; z < groups; ++z) {
    const lp::cuda::Group g = p.group(z);
    for (int64_t m = 0; m < p.rows(g); ++m)
      for (int64_t col = 0; col < p.cols(g); ++col) {
        const lp::cuda::Row r = p.row(g, m);
        double sum = 0;
        for (int64_t k = 0; k < p.depth(g); ++k) {
          const lp::cuda::Depth d = p.at_depth(g, k);
          sum += p.a(g, r, d) * p.b(g, d, col);
        }
        p.store(g, r, col, sum);
      }
  }
}

lp::View view(double* data, const int64_t* strides) { return {data, strides[0], strides[1], strides[2], strides[3]}; }

}  // namespace

// shape: the 17 fields of ConvShape in order. Strides: four numbers per tensor. Null pointers mean None.
extern "C" void emulate_forward(const int64_t* shape, double* x, const int64_t* xs, double* w, const int64_t* ws, double* y,
                                const int64_t* ys, const double* bias, const double* gate, const int64_t* live_in, int64_t ins,
                                const int64_t* live_out, int64_t outs, int act, const double* in_gate, int compact_maps) {
  lp::MaskedForward f{};
  f.shape = *reinterpret_cast<const lp::ConvShape*>(shape);
  f.dtype = lp::DType::f64;
  f.x = view(x, xs);
  f.y = view(y, ys);
  f.weight = view(w, ws);
  f.bias = bias;
  f.gate = gate;
  f.live_in = {live_in, ins};
  f.live_out = {live_out, outs};
  f.act = lp::Act(act);
  f.in_gate = in_gate;
  f.compact_maps = compact_maps;
  run(lp::cuda::MaskedForwardProblem<double>{f}, f.shape.groups);
}

extern "C" void emulate_backward(const int64_t* shape, double* gy, const int64_t* gys, double* saved, double* x,
                                 const int64_t* xs, double* w, const int64_t* ws, const double* bias, const double* gate,
                                 const int64_t* live_in, int64_t ins, const int64_t* live_out, int64_t outs, int act,
                                 double* gx, double* gw, double* gb, double* gg, const double* in_gate, int compact_maps,
                                 double* gig) {
  lp::MaskedBackward f{};
  f.shape = *reinterpret_cast<const lp::ConvShape*>(shape);
  f.dtype = lp::DType::f64;
  f.grad_y = view(gy, gys);
  f.saved = view(saved, gys);
  f.x = view(x, xs);
  f.weight = view(w, ws);
  f.bias = bias;
  f.gate = gate;
  f.live_in = {live_in, ins};
  f.live_out = {live_out, outs};
  f.act = lp::Act(act);
  f.grad_x = view(gx, xs);
  f.grad_weight = gw;
  f.grad_bias = bias ? gb : nullptr;
  f.grad_gate = gate ? gg : nullptr;
  f.in_gate = in_gate;
  f.compact_maps = compact_maps;
  run(lp::cuda::InputGradProblem<double>{f}, f.shape.groups);
  std::vector<double> raw(size_t(f.shape.outputs * (f.shape.channels / f.shape.groups) * f.shape.kh * f.shape.kw));
  run(lp::cuda::WeightGradProblem<double>{f, raw.data()}, f.shape.groups);
  const lp::cuda::FinishGrad<double> finish{f, raw.data()};
  for (int64_t i = 0; i < outs; ++i) {
    const int64_t o = f.live_out[i];
    double grad = 0, gate_sum = 0;
    for (int64_t k = 0; k < f.shape.n * f.shape.out_h * f.shape.out_w; ++k) {
      const lp::cuda::Row r = lp::cuda::pixel_of(k, f.shape.out_h, f.shape.out_w);
      grad += finish.output(r, i);
    }
    for (int64_t j = 0; j < finish.per_output(); ++j) gate_sum += finish.weight(o, j);
    finish.finish(o, grad, gate_sum);
  }
  for (int64_t i = 0; in_gate && i < ins; ++i)
    for (int64_t j = 0; j < finish.per_input(); ++j) gig[f.live_in[i]] += finish.input(f.live_in[i], j);
}

extern "C" void emulate_compact(const int64_t* shape, double* x, const int64_t* xs, const double* packed, const double* bias,
                                double* residual, double* y, const int64_t* ys, const int64_t* in_index, int64_t ins,
                                const int64_t* out_index, int64_t outs, int64_t x_channels, int64_t y_channels, int act) {
  lp::CompactForward f{};
  f.shape = *reinterpret_cast<const lp::ConvShape*>(shape);
  f.dtype = lp::DType::f64;
  f.x = view(x, xs);
  if (residual) f.residual = view(residual, ys);
  f.y = view(y, ys);
  f.packed = packed;
  f.bias = bias;
  f.in_index = {in_index, ins};
  f.out_index = {out_index, outs};
  f.x_channels = x_channels;
  f.y_channels = y_channels;
  f.act = lp::Act(act);
  run(lp::cuda::CompactProblem<double, double>{f}, f.shape.groups);
}
