// Convolutions with few output channels, several columns at a time. A vector of 16 lanes would hold 8 outputs and nothing else;
// but neighbouring columns of a channels-last map lie side by side, so that G columns of C channels are one column of G * C
// channels: the convolution with stride G and a kernel wider by G - 1, whose weight is the same taps, shifted by one for each
// column, among zeros. Three quarters of the products are real for two columns of a 3x3 kernel.
#pragma once
#include "winograd_choice.h"

namespace lp {

// Columns taken together; 1: nothing is gained, or the map does not allow it.
inline int64_t columns_together(const ConvShape& s, Algorithm algorithm, const View& out, int64_t lanes, int64_t cols) {
  const bool plain = s.groups == 1 && s.stride_h == 1 && s.stride_w == 1 && s.dil_w == 1 && s.kw > 1 && lanes > 0 &&
                     algorithm == Algorithm::automatic && out.c == 1 && out.w == lanes;
  if (!plain) return 1;
  int64_t together = 1;
  while (together < 4 && cols % (2 * together) == 0 && 2 * together * lanes <= level().lanes) together *= 2;
  return together;
}

// values repeated for every column; nullptr stays nullptr.
inline const float* repeated(const Env& env, const void* values, int64_t count, int64_t together) {
  if (!values) return nullptr;
  float* found = scratch<float>(env, count * together);
  for (int64_t g = 0; g < together; ++g) std::memcpy(found + g * count, values, size_t(count) * sizeof(float));
  return found;
}

// The same problem over groups of columns: each is an output of its own.
template <class Problem>
void group_columns(Problem& p, int64_t together) {
  p.shape.outputs *= together;
  p.shape.kw += together - 1;
  p.shape.stride_w = together;
  p.shape.out_w /= together;
  p.live_out = IndexList{nullptr, p.shape.outputs};
  p.live_in = IndexList{nullptr, p.shape.channels};
  p.compact_maps = false;
  p.algorithm = Algorithm::direct;
}

// Runs run(problem of grouped columns) and returns true, or false.
template <class Run>
bool forward_by_columns(const MaskedForward& f, const Env& env, Run&& run) {
  const ConvShape& s = f.shape;
  if (f.dtype != DType::f32 || f.live_in.count != s.channels || f.live_out.count != s.outputs || s.channels == 0) return false;
  if (winograd_tile(f.algorithm, f.dtype, s, s.channels, s.outputs, s.out_h, s.out_w, f.x.c == 1 && f.y.c == 1) > 0)
    return false;
  const int64_t together = columns_together(s, f.algorithm, f.y, s.outputs, s.out_w);
  if (together == 1) return false;
  MaskedForward p = f;
  group_columns(p, together);
  p.y.w = f.y.w * together;
  p.bias = repeated(env, f.bias, s.outputs, together);
  p.gate = repeated(env, f.gate, s.outputs, together);
  const int64_t taps = s.kh * p.shape.kw, size = p.shape.outputs * taps * s.channels;
  float* weight = scratch<float>(env, size);
  std::memset(weight, 0, size_t(size) * sizeof(float));
  p.weight = View{weight, taps * s.channels, 1, p.shape.kw * s.channels, s.channels};
  for (int64_t g = 0; g < together; ++g)
    for (int64_t o = 0; o < s.outputs; ++o)
      for (int64_t kh = 0; kh < s.kh; ++kh)
        for (int64_t kw = 0; kw < s.kw; ++kw) {
          const float* from = static_cast<const float*>(f.weight.data) + o * f.weight.n + kh * f.weight.h + kw * f.weight.w;
          float* to = weight + (g * s.outputs + o) * p.weight.n + kh * p.weight.h + (kw + g) * p.weight.w;
          for (int64_t c = 0; c < s.channels; ++c) to[c] = from[c * f.weight.c];
        }
  run(p);
  return true;
}

// The input gradient at stride 1 is the convolution of the output's gradient with the mirrored weight.
template <class Run>
bool input_grad_by_columns(const MaskedBackward& f, const View& grad, const Env& env, Run&& run) {
  const ConvShape& s = f.shape;
  if (s.stride_h != 1 || s.stride_w != 1 || s.groups != 1) return false;
  MaskedForward p{};
  p.shape = s;
  p.dtype = f.dtype;
  p.shape.channels = s.outputs;
  p.shape.outputs = s.channels;
  p.shape.height = s.out_h;
  p.shape.width = s.out_w;
  p.shape.out_h = s.height;
  p.shape.out_w = s.width;
  p.shape.pad_h = s.dil_h * (s.kh - 1) - s.pad_h;
  p.shape.pad_w = s.dil_w * (s.kw - 1) - s.pad_w;
  p.x = grad;
  p.y = f.grad_x;
  const View& w = f.weight;
  float* last = static_cast<float*>(w.data) + (s.kh - 1) * w.h + (s.kw - 1) * w.w;
  p.weight = View{last, w.c, w.n, -w.h, -w.w};
  p.gate = f.in_gate;
  p.in_gate = f.gate;
  p.live_in = f.live_out;
  p.live_out = f.live_in;
  p.act = Act::none;
  p.algorithm = f.algorithm;
  return forward_by_columns(p, env, run);
}

// Runs run(problem, gradient of grouped columns) and adds up what the columns have of each weight.
template <class Run>
bool weight_grad_by_columns(const MaskedBackward& f, const View& grad, const Env& env, Run&& run) {
  const ConvShape& s = f.shape;
  if (f.dtype != DType::f32 || f.live_in.count != s.channels || f.live_out.count != s.outputs || s.channels == 0) return false;
  if (winograd_tile(f.algorithm, f.dtype, s, s.channels, s.outputs, s.out_h, s.out_w, f.x.c == 1 && grad.c == 1) > 0)
    return false;
  const int64_t together = columns_together(s, f.algorithm, grad, s.outputs, s.out_w);
  if (together == 1) return false;
  MaskedBackward p = f;
  group_columns(p, together);
  p.bias = p.gate = p.in_gate = nullptr;
  p.grad_gate = p.grad_in_gate = nullptr;
  const bool wants_sums = f.grad_bias || f.grad_gate;
  const int64_t taps = s.kh * p.shape.kw, size = p.shape.outputs * taps * s.channels;
  float* raw = scratch<float>(env, size);
  float* sums = scratch<float>(env, p.shape.outputs);
  std::memset(raw, 0, size_t(size) * sizeof(float));
  std::memset(sums, 0, size_t(p.shape.outputs) * sizeof(float));
  const int64_t steps[4] = {taps * s.channels, 1, p.shape.kw * s.channels, s.channels};
  p.grad_weight = raw;
  std::copy(steps, steps + 4, p.grad_weight_strides);
  p.grad_bias = wants_sums ? sums : nullptr;
  View columns = grad;
  columns.w = grad.w * together;
  run(p, columns);
  const float *gate = static_cast<const float*>(f.gate), *in_gate = static_cast<const float*>(f.in_gate);
  const int64_t* step = f.grad_weight_strides;
  for (int64_t o = 0; o < s.outputs; ++o) {
    const float scale = gate ? gate[o] : 1.0f;
    float sum = 0, products = 0;
    for (int64_t g = 0; g < together; ++g) sum += sums[g * s.outputs + o];
    for (int64_t kh = 0; kh < s.kh; ++kh)
      for (int64_t kw = 0; kw < s.kw; ++kw)
        for (int64_t c = 0; c < s.channels; ++c) {
          float value = 0;
          for (int64_t g = 0; g < together; ++g)
            value += raw[(g * s.outputs + o) * steps[0] + kh * steps[2] + (kw + g) * steps[3] + c];
          const float in_scale = in_gate ? in_gate[c] : 1.0f;
          const View& w = f.weight;
          const float product = value * static_cast<const float*>(w.data)[o * w.n + c * w.c + kh * w.h + kw * w.w];
          products += product * in_scale;
          if (f.grad_in_gate) static_cast<float*>(f.grad_in_gate)[c] += product * scale;
          if (f.grad_weight)
            static_cast<float*>(f.grad_weight)[o * step[0] + c * step[1] + kh * step[2] + kw * step[3]] =
                value * scale * in_scale;
        }
    if (f.grad_bias) static_cast<float*>(f.grad_bias)[o] = scale * sum;
    if (f.grad_gate)
      static_cast<float*>(f.grad_gate)[o] = products + (f.bias ? static_cast<const float*>(f.bias)[o] * sum : 0.0f);
  }
  return true;
}

}  // namespace lp
