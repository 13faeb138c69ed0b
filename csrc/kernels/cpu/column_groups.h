// Convolutions with few output channels, several columns at a time. A vector of 16 lanes would hold 8 outputs and nothing else;
// but neighbouring columns of a channels-last map lie side by side, so that G columns of C channels are one column of G * C
// channels: the convolution with stride G and a kernel wider by G - 1, whose weight is the same taps, shifted by one for each
// column, among zeros. Three quarters of the products are real for two columns of a 3x3 kernel.
#pragma once
#include "plane_cases.h"

namespace lp {

// Columns of an output's gradient from which on two vectors of results are taken together too.
constexpr int64_t kStridedCols = 12;

// Columns taken together; 1: nothing is gained, or the map does not allow it.
inline int64_t columns_together(const ConvShape& s, Algorithm algorithm, const View& out, int64_t lanes, int64_t cols) {
  const bool plain = s.groups == 1 && s.stride_h == 1 && s.stride_w == 1 && s.dil_w == 1 && s.kw > 1 && lanes > 0 &&
                     algorithm == Algorithm::automatic && out.c == 1 && out.w == lanes;
  if (!plain) return 1;
  int64_t together = 1;
  while (together < 4 && cols % (2 * together) == 0 && 2 * together * lanes <= level().lanes) together *= 2;
  return together;
}

// values, times gate where there is one, repeated for every column; nullptr stays nullptr.
inline const float* repeated(const Env& env, const void* values, const void* gate, int64_t count, int64_t together) {
  if (!values) return nullptr;
  float* found = scratch<float>(env, count * together);
  for (int64_t i = 0; i < count * together; ++i)
    found[i] = static_cast<const float*>(values)[i % count] * (gate ? static_cast<const float*>(gate)[i % count] : 1.0f);
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
  p.bias = repeated(env, f.bias, f.gate, s.outputs, together);
  p.gate = nullptr;  // goes into the weight: results without a factor are stored from registers
  const int64_t taps = s.kh * p.shape.kw, size = p.shape.outputs * taps * s.channels;
  float* weight = scratch<float>(env, size);
  std::memset(weight, 0, size_t(size) * sizeof(float));
  p.weight = View{weight, taps * s.channels, 1, p.shape.kw * s.channels, s.channels};
  for (int64_t g = 0; g < together; ++g)
    for (int64_t o = 0; o < s.outputs; ++o) {
      const float scale = f.gate ? static_cast<const float*>(f.gate)[o] : 1.0f;
      for (int64_t kh = 0; kh < s.kh; ++kh)
        for (int64_t kw = 0; kw < s.kw; ++kw) {
          const float* from = static_cast<const float*>(f.weight.data) + o * f.weight.n + kh * f.weight.h + kw * f.weight.w;
          float* to = weight + (g * s.outputs + o) * p.weight.n + kh * p.weight.h + (kw + g) * p.weight.w;
          for (int64_t c = 0; c < s.channels; ++c) to[c] = from[c * f.weight.c] * scale;
        }
    }
  run(p);
  return true;
}

// The input gradient at stride 1 is the convolution of the output's gradient with the mirrored weight.
inline MaskedForward mirrored(const MaskedBackward& f, const View& grad) {
  const ConvShape& s = f.shape;
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
  return p;
}

template <class Run>
bool input_grad_by_columns(const MaskedBackward& f, const View& grad, const Env& env, Run&& run) {
  const ConvShape& s = f.shape;
  if (f.dtype != DType::f32 || s.stride_h != 1 || s.stride_w != 1 || s.groups != 1) return false;
  const MaskedForward p = mirrored(f, grad);
  return plane_forward(p, env) || forward_by_columns(p, env, run);
}

// The input gradient of 3x3 at stride 2: two neighbouring columns of it are one column of twice the channels, and one of the
// output's gradient lies beside each. So even rows are a 1x2 convolution of that gradient, odd ones 2x2, a quarter of whose
// weights are zero.
template <class Run>
bool strided_input_grad_by_columns(const MaskedBackward& f, const View& grad, const Env& env, Run&& run) {
  const ConvShape& s = f.shape;
  const bool fits = f.dtype == DType::f32 && s.groups == 1 && s.kh == 3 && s.kw == 3 && s.stride_h == 2 && s.stride_w == 2 &&
                    s.pad_h == 1 && s.pad_w == 1 && s.dil_h == 1 && s.dil_w == 1 && s.height % 2 == 0 && s.width % 2 == 0 &&
                    f.algorithm == Algorithm::automatic && f.live_in.count == s.channels && f.live_out.count == s.outputs &&
                    f.grad_x.c == 1 && f.grad_x.w == s.channels && s.outputs > 0 && s.channels > 0 &&
                    s.channels <= (s.out_w >= kStridedCols ? level().lanes : level().lanes / 2);
  if (!fits) return false;
  MaskedForward p{};
  p.shape = s;
  p.dtype = f.dtype;
  p.shape.channels = s.outputs;
  p.shape.outputs = 2 * s.channels;
  p.shape.height = p.shape.out_h = s.out_h;
  p.shape.width = p.shape.out_w = s.out_w;
  p.shape.stride_h = p.shape.stride_w = 1;
  p.shape.pad_h = p.shape.pad_w = 0;
  p.shape.kw = 2;
  p.x = grad;
  p.in_gate = f.gate;
  p.live_in = IndexList{nullptr, p.shape.channels};
  p.live_out = IndexList{nullptr, p.shape.outputs};
  p.act = Act::none;
  p.algorithm = f.algorithm;
  constexpr int64_t kRow[2][2] = {{1, -1}, {2, 0}};  // parity of the position, offset in the output's gradient -> tap, -1: none
  for (int64_t row = 0; row < 2; ++row) {
    p.shape.kh = 1 + row;
    const int64_t taps = p.shape.kh * 2, size = p.shape.outputs * taps * s.outputs;
    float* weight = scratch<float>(env, size);
    std::memset(weight, 0, size_t(size) * sizeof(float));
    p.weight = View{weight, taps * s.outputs, 1, 2 * s.outputs, s.outputs};
    for (int64_t column = 0; column < 2; ++column)
      for (int64_t h = 0; h <= row; ++h)
        for (int64_t w = 0; w <= column; ++w) {
          const View& from = f.weight;
          const float* tap = static_cast<const float*>(from.data) + kRow[row][h] * from.h + kRow[column][w] * from.w;
          float* to = weight + column * s.channels * p.weight.n + h * p.weight.h + w * p.weight.w;
          for (int64_t c = 0; c < s.channels; ++c) {
            const float scale = f.in_gate ? static_cast<const float*>(f.in_gate)[c] : 1.0f;
            for (int64_t o = 0; o < s.outputs; ++o) to[c * p.weight.n + o] = tap[o * from.n + c * from.c] * scale;
          }
        }
    const View& gx = f.grad_x;
    p.y = View{static_cast<float*>(gx.data) + row * gx.h, gx.n, 1, 2 * gx.h, 2 * gx.w};
    run(p);
  }
  return true;
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
  const auto over_columns = [&](auto&& value) {
    float sum = 0;
    for (int64_t g = 0; g < together; ++g) sum += value(g);
    return sum;
  };
  finish_sums(
      f,
      [&](int64_t o, int64_t kh, int64_t kw, int64_t c) {
        return over_columns(
            [&](int64_t g) { return raw[(g * s.outputs + o) * steps[0] + kh * steps[2] + (kw + g) * steps[3] + c]; });
      },
      [&](int64_t o) { return over_columns([&](int64_t g) { return sums[g * s.outputs + o]; }); });
  return true;
}

}  // namespace lp
