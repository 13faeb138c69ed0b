// Which training convolutions are those of few channels, computed plane by plane (plane_training.h), and their description.
#pragma once
#include "winograd_choice.h"

namespace lp {

constexpr int64_t kMostPlaneInputs = 4, kLeastPlaneCols = 12;

// Most outputs: beyond, others fill their vectors with them. Winograd's tiles pay from fewer, and so do sums over pixels, whose
// planes of outputs are read again for every tap.
inline int64_t most_plane_outputs(const ConvShape& s, bool by_tiles, bool sums) {
  if (s.kh * s.kw == 1 && s.stride_h * s.stride_w == 1) return 4;
  if (sums) return by_tiles ? 4 : 8;
  return by_tiles ? 8 : 32;
}

// Fills `p` with all but what is computed from; false: not such a convolution, of any number of channels. `y` is the map of its
// outputs, `x` that of its inputs.
template <class Problem>
bool plane_conv(const Problem& f, const View& x, const View& y, PlaneConv& p) {
  const ConvShape& s = f.shape;
  const bool plain = f.dtype == DType::f32 && s.groups == 1 && s.dil_h == 1 && s.dil_w == 1 && f.act == Act::none &&
                     f.algorithm == Algorithm::automatic && f.live_in.count == s.channels && f.live_out.count == s.outputs;
  const bool fits = s.channels >= 1 && s.outputs >= 1 && s.kh <= 3 && s.kw <= 3 && s.stride_h <= 2 && s.stride_w <= 2 &&
                    s.pad_h >= 0 && s.pad_w >= 0 && s.out_w >= kLeastPlaneCols;
  if (!plain || !fits || x.c != 1 || x.w != s.channels || y.c != 1 || s.n * s.out_h == 0) return false;
  p.n = s.n;
  p.inputs = s.channels;
  p.outputs = s.outputs;
  p.height = s.height;
  p.width = s.width;
  p.rows = s.out_h;
  p.cols = s.out_w;
  p.kh = s.kh;
  p.kw = s.kw;
  p.stride_h = s.stride_h;
  p.stride_w = s.stride_w;
  p.pad_h = s.pad_h;
  p.pad_w = s.pad_w;
  p.x = static_cast<const float*>(x.data);
  p.x_image = x.n;
  p.x_row = x.h;
  p.y = static_cast<float*>(y.data);
  p.y_image = y.n;
  p.y_row = y.h;
  p.y_pixel = y.w;
  return true;
}

// The same of few channels; `sums`: over the map of its outputs.
template <class Problem>
bool few_planes(const Problem& f, const View& y, bool sums, PlaneConv& p) {
  const ConvShape& s = f.shape;
  if (s.channels > kMostPlaneInputs || !plane_conv(f, f.x, y, p)) return false;
  const int tile = winograd_tile(f.algorithm, f.dtype, s, s.channels, s.outputs, s.out_h, s.out_w, true);
  return s.outputs <= most_plane_outputs(s, tile > 0, sums);
}

// Each returns false without having done anything where the channels are not few.
inline bool plane_forward(const MaskedForward& f, const Env& env) {
  PlaneConv p{};
  if (!level().plane[0] || !few_planes(f, f.y, false, p)) return false;
  const ConvShape& s = f.shape;
  const int64_t depth = s.kh * s.kw * s.channels, padded = (s.outputs + 3) / 4 * 4;
  float *weight = scratch<float>(env, depth * padded), *shift = scratch<float>(env, padded);
  const float *gate = static_cast<const float*>(f.gate), *in_gate = static_cast<const float*>(f.in_gate),
              *bias = static_cast<const float*>(f.bias);
  for (int64_t o = 0; o < padded; ++o) {
    const float scale = o >= s.outputs ? 0.0f : gate ? gate[o] : 1.0f;
    shift[o] = bias && o < s.outputs ? bias[o] * scale : 0.0f;
    float* to = weight + o / 4 * 4 * depth + o % 4;
    for (int64_t kh = 0; kh < s.kh; ++kh)
      for (int64_t kw = 0; kw < s.kw; ++kw)
        for (int64_t c = 0; c < s.channels; ++c, to += 4) {
          const int64_t at = o * f.weight.n + c * f.weight.c + kh * f.weight.h + kw * f.weight.w;
          *to = o >= s.outputs ? 0.0f : static_cast<const float*>(f.weight.data)[at] * scale * (in_gate ? in_gate[c] : 1.0f);
        }
  }
  p.weight = weight;
  p.shift = shift;
  level().plane[0](p, env);
  return true;
}

// Of stride 2.
inline bool plane_input_grad(const MaskedBackward& f, const View& grad, const Env& env) {
  PlaneGrad g{};
  const ConvShape& s = f.shape;
  const bool few =
      s.stride_h == 2 && s.stride_w == 2 && s.channels <= (s.kh * s.kw == 1 ? 8 : 16) && s.outputs <= PlaneGrad::limit;
  if (!level().plane_grad || !few || !plane_conv(f, f.grad_x, grad, g.conv)) return false;
  const float *gate = static_cast<const float*>(f.gate), *in_gate = static_cast<const float*>(f.in_gate);
  const int64_t padded = (s.channels + 3) / 4 * 4;
  for (int64_t a = 0; a < 2; ++a)
    for (int64_t b = 0; b < 2; ++b) {
      PlaneGrad::Phase& phase = g.phase[a][b];
      int64_t taps[4];
      for (int64_t kh = 0; kh < s.kh; ++kh)
        for (int64_t kw = 0; kw < s.kw; ++kw) {
          const int64_t h = a + s.pad_h - kh, w = b + s.pad_w - kw;
          if (h % 2 != 0 || w % 2 != 0) continue;
          phase.h[phase.taps] = h / 2;
          phase.w[phase.taps] = w / 2;
          taps[phase.taps++] = kh * f.weight.h + kw * f.weight.w;
        }
      float* to = scratch<float>(env, padded * phase.taps * s.outputs);
      phase.weight = to;
      for (int64_t block = 0; block < padded; block += 4)
        for (int64_t t = 0; t < phase.taps; ++t)
          for (int64_t o = 0; o < s.outputs; ++o)
            for (int64_t c = block; c < block + 4; ++c, ++to) {
              const float value =
                  c < s.channels ? static_cast<const float*>(f.weight.data)[taps[t] + o * f.weight.n + c * f.weight.c] : 0.0f;
              *to = value * (gate ? gate[o] : 1.0f) * (in_gate && c < s.channels ? in_gate[c] : 1.0f);
            }
    }
  g.grad_x = static_cast<float*>(f.grad_x.data);
  level().plane_grad(g, env);
  return true;
}

// Gradients of weight, bias and gates from the sums of products raw(o, kh, kw, c) and of the output's gradient, sum(o).
template <class Raw, class Sum>
void finish_sums(const MaskedBackward& f, Raw&& raw, Sum&& sum) {
  const ConvShape& s = f.shape;
  const float *gate = static_cast<const float*>(f.gate), *in_gate = static_cast<const float*>(f.in_gate);
  const int64_t* step = f.grad_weight_strides;
  for (int64_t o = 0; o < s.outputs; ++o) {
    const float scale = gate ? gate[o] : 1.0f;
    float products = 0;
    for (int64_t kh = 0; kh < s.kh; ++kh)
      for (int64_t kw = 0; kw < s.kw; ++kw)
        for (int64_t c = 0; c < s.channels; ++c) {
          const float value = raw(o, kh, kw, c), in_scale = in_gate ? in_gate[c] : 1.0f;
          const View& w = f.weight;
          const float product = value * static_cast<const float*>(w.data)[o * w.n + c * w.c + kh * w.h + kw * w.w];
          products += product * in_scale;
          if (f.grad_in_gate) static_cast<float*>(f.grad_in_gate)[c] += product * scale;
          if (f.grad_weight)
            static_cast<float*>(f.grad_weight)[o * step[0] + c * step[1] + kh * step[2] + kw * step[3]] =
                value * scale * in_scale;
        }
    if (!f.grad_bias && !f.grad_gate) continue;
    const float total = sum(o);
    if (f.grad_bias) static_cast<float*>(f.grad_bias)[o] = scale * total;
    if (f.grad_gate)
      static_cast<float*>(f.grad_gate)[o] = products + (f.bias ? static_cast<const float*>(f.bias)[o] * total : 0.0f);
  }
}

inline bool plane_weight_grad(const MaskedBackward& f, const View& grad, const Env& env) {
  PlaneConv p{};
  if (!level().plane[1] || !few_planes(f, grad, true, p)) return false;
  const ConvShape& s = f.shape;
  const int64_t depth = s.kh * s.kw * s.channels;
  p.grad_weight = scratch<float>(env, depth * s.outputs);
  p.grad_shift = scratch<float>(env, s.outputs);
  level().plane[1](p, env);
  finish_sums(
      f,
      [&](int64_t o, int64_t kh, int64_t kw, int64_t c) {
        return p.grad_weight[o * depth + (kh * s.kw + kw) * s.channels + c];
      },
      [&](int64_t o) { return p.grad_shift[o]; });
  return true;
}

}  // namespace lp
