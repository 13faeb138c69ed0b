// Which convolutions are those of small maps, and their description for the kernels of small_maps.h.
#pragma once
#include "driver.h"

namespace lp {

constexpr int64_t kLeastSmallMapChannels = 16, kLeastSmallMapImages = 16, kMostSites = 4;

// Fills `p` with all but pointers to maps and gradients; false: not such a convolution.
template <class Problem>
bool small_map(const Problem& f, SmallMap& p) {
  const ConvShape& s = f.shape;
  const int64_t taps = s.kh * s.kw;
  p.n = s.n;
  p.inputs = s.channels;
  p.outputs = s.outputs;
  p.places = s.height * s.width;
  p.sites = s.out_h * s.out_w;
  p.taps = taps;
  const bool plain = f.dtype == DType::f32 && s.groups == 1 && f.act == Act::none && !f.gate && f.weight.c == 1 &&
                     f.algorithm == Algorithm::automatic && f.live_in.count == s.channels && f.live_out.count == s.outputs;
  const bool small = p.sites > 0 && p.sites <= kMostSites && p.places > 0 && p.places <= SmallMap::limit && taps > 1 &&
                     taps <= SmallMap::limit && s.n >= kLeastSmallMapImages;
  if (!plain || !small || std::min(s.channels, s.outputs) < kLeastSmallMapChannels) return false;
  for (int64_t place = 0; place < p.places; ++place)
    for (int64_t site = 0; site < p.sites; ++site) {
      const int64_t h = place / s.width - (site / s.out_w * s.stride_h - s.pad_h);
      const int64_t w = place % s.width - (site % s.out_w * s.stride_w - s.pad_w);
      const bool joined = h >= 0 && w >= 0 && h % s.dil_h == 0 && w % s.dil_w == 0 && h / s.dil_h < s.kh && w / s.dil_w < s.kw;
      p.joins[place][site] = joined ? int8_t(h / s.dil_h * s.kw + w / s.dil_w) : int8_t(-1);
    }
  p.weight = static_cast<const float*>(f.weight.data);
  p.weight_row = f.weight.n;
  for (int64_t t = 0; t < taps; ++t) p.tap_at[t] = t / s.kw * f.weight.h + t % s.kw * f.weight.w;
  p.in_scale = static_cast<const float*>(f.in_gate);
  return true;
}

inline void small_map_x(SmallMap& p, const ConvShape& s, const View& x) {
  p.x = static_cast<float*>(x.data);
  p.x_image = x.n;
  for (int64_t i = 0; i < p.places; ++i) p.x_at[i] = i / s.width * x.h + i % s.width * x.w;
}

inline void small_map_y(SmallMap& p, const ConvShape& s, const View& y) {
  p.y = static_cast<float*>(y.data);
  p.y_image = y.n;
  for (int64_t i = 0; i < p.sites; ++i) p.y_at[i] = i / s.out_w * y.h + i % s.out_w * y.w;
}

// Each returns false without having done anything where the maps are not small.
inline bool small_map_forward(const MaskedForward& f, const Env& env) {
  SmallMap p{};
  if (f.x.c != 1 || f.y.c != 1 || !small_map(f, p)) return false;
  small_map_x(p, f.shape, f.x);
  small_map_y(p, f.shape, f.y);
  p.shift = static_cast<const float*>(f.bias);
  level().small_map[0](p, env);
  return true;
}

inline bool small_map_input_grad(const MaskedBackward& f, const View& grad, const Env& env) {
  SmallMap p{};
  if (f.grad_x.c != 1 || grad.c != 1 || !small_map(f, p)) return false;
  small_map_x(p, f.shape, f.grad_x);
  small_map_y(p, f.shape, grad);
  level().small_map[1](p, env);
  return true;
}

inline bool small_map_weight_grad(const MaskedBackward& f, const View& grad, const Env& env) {
  SmallMap p{};
  if (f.x.c != 1 || grad.c != 1 || f.grad_gate || (f.grad_weight && f.grad_weight_strides[1] != 1) || !small_map(f, p))
    return false;
  small_map_x(p, f.shape, f.x);
  small_map_y(p, f.shape, grad);
  p.grad_weight = static_cast<float*>(f.grad_weight);
  p.grad_row = f.grad_weight_strides[0];
  for (int64_t t = 0; t < p.taps; ++t)
    p.grad_tap_at[t] = t / f.shape.kw * f.grad_weight_strides[2] + t % f.shape.kw * f.grad_weight_strides[3];
  p.in_sums = static_cast<float*>(f.grad_in_gate);
  if (p.grad_weight || p.in_sums) level().small_map[2](p, env);
  for (int64_t o = 0; f.grad_bias && o < p.outputs; ++o) {
    double sum = 0;
    for (int64_t i = 0; i < p.n; ++i)
      for (int64_t site = 0; site < p.sites; ++site) sum += p.y[i * p.y_image + p.y_at[site] + o];
    static_cast<float*>(f.grad_bias)[o] = float(sum);
  }
  return true;
}

}  // namespace lp
