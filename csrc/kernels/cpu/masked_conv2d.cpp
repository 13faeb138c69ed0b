// Masked convolution on the CPU: restricts channel lists and packed weights to live channels, then runs the tap kernels.
#include "column_groups.h"
#include "driver.h"
#include "live_weight.h"
#include "small_map_cases.h"
#include "winograd_choice.h"

namespace lp {
namespace {

template <class T>
T weight_at(const View& w, int64_t o, int64_t c, int64_t kh, int64_t kw) {
  return static_cast<const T*>(w.data)[o * w.n + c * w.c + kh * w.h + kw * w.w];
}

TapConv forward_geometry(const ConvShape& s, const View& x, const Taps& taps) {
  TapConv p{};
  p.x = x;
  p.n = s.n;
  p.height = s.height;
  p.width = s.width;
  p.taps = taps.count;
  p.tap_h = taps.h;
  p.tap_w = taps.w;
  p.rows = s.out_h;
  p.cols = s.out_w;
  p.step_h = s.stride_h;
  p.step_w = s.stride_w;
  return p;
}

void use_lists(TapConv& p, const ChannelLists& in, const ChannelLists& out) {
  p.groups = out.groups;
  p.in_channel = in.ids;
  p.in_begin = in.begin;
  p.out_channel = out.ids;
  p.out_begin = out.begin;
}

const uint8_t* live_mask(const Env& env, const IndexList& live, int64_t channels) {
  uint8_t* mask = scratch<uint8_t>(env, channels);
  std::memset(mask, 0, size_t(channels));
  for (int64_t i = 0; i < live.count; ++i) mask[live[i]] = 1;
  return mask;
}

// The same lists as places in a map: the channels themselves, or their ranks among the live ones.
ChannelLists places(const Env& env, const ChannelLists& l, const int64_t* place) {
  if (!place) return l;
  ChannelLists found{scratch<int64_t>(env, l.count()), l.begin, l.groups};
  for (int64_t i = 0; i < l.count(); ++i) found.ids[i] = place[l.ids[i]];
  return found;
}

// place[c]: where channel c lies in a map of live channels only; nullptr: maps hold all channels.
const int64_t* ranks(const Env& env, const IndexList& live, int64_t channels, bool compact) {
  if (!compact || live.count == channels) return nullptr;
  int64_t* place = scratch<int64_t>(env, channels);
  for (int64_t i = 0; i < live.count; ++i) place[live[i]] = i;
  return place;
}

// Depthwise outputs whose input channel is alive, as chunks, with that input beside each; `rest` are the others.
struct DepthwiseLists {
  ChannelLists in, out, rest;
};

DepthwiseLists depthwise_lists(const Env& env, const ConvShape& s, const IndexList& live_in, const IndexList& live_out) {
  const uint8_t* alive = live_mask(env, live_in, s.channels);
  const int64_t multiplier = s.outputs / s.groups;
  int64_t count = 0, rest = 0;
  for (int64_t i = 0; i < live_out.count; ++i) (alive[live_out[i] / multiplier] ? count : rest) += 1;
  const int groups = int((count + kDepthwiseChunk - 1) / kDepthwiseChunk);
  DepthwiseLists d{make_lists(env, count, groups), make_lists(env, count, groups), make_lists(env, rest, 1)};
  int64_t a = 0, b = 0;
  for (int64_t i = 0; i < live_out.count; ++i) {
    const int64_t o = live_out[i];
    if (alive[o / multiplier]) {
      d.in.ids[a] = o / multiplier;
      d.out.ids[a++] = o;
    } else {
      d.rest.ids[b++] = o;
    }
  }
  cut_chunks(d.in, count, kDepthwiseChunk);
  cut_chunks(d.out, count, kDepthwiseChunk);
  d.rest.begin[1] = rest;
  return d;
}

template <class T>
struct Affine {
  T* scale = nullptr;
  T* shift = nullptr;
};

template <class T>
Affine<T> make_affine(const Env& env, const void* bias, const void* gate, const int64_t* ids, int64_t count) {
  Affine<T> a;
  if (gate) a.scale = scratch<T>(env, count);
  if (bias) a.shift = scratch<T>(env, count);
  for (int64_t i = 0; i < count; ++i) {
    const T g = gate ? static_cast<const T*>(gate)[ids[i]] : T(1);
    if (gate) a.scale[i] = g;
    if (bias) a.shift[i] = g * static_cast<const T*>(bias)[ids[i]];
  }
  return a;
}

// Depthwise weights for chunked lists: per chunk (tap, channel padded to a panel); optional scale per output.
template <class T>
void pack_depthwise(TapConv& p, const Env& env, const View& w, const Taps& taps, const ChannelLists& ins,
                    const ChannelLists& outs, const T* gate, const T* in_gate) {
  int64_t* begin = scratch<int64_t>(env, outs.groups + 1);
  begin[0] = 0;
  for (int g = 0; g < outs.groups; ++g) begin[g + 1] = begin[g] + (outs.size(g) + kPanel - 1) / kPanel * kPanel * taps.count;
  T* packed = scratch<T>(env, begin[outs.groups]);
  std::memset(packed, 0, size_t(begin[outs.groups]) * sizeof(T));
  for (int g = 0; g < outs.groups; ++g) {
    const int64_t width = (outs.size(g) + kPanel - 1) / kPanel * kPanel;
    for (int t = 0; t < taps.count; ++t)
      for (int64_t i = 0; i < outs.size(g); ++i) {
        const int64_t o = outs.ids[outs.begin[g] + i];
        const T scale = (gate ? gate[o] : T(1)) * (in_gate ? in_gate[ins.ids[ins.begin[g] + i]] : T(1));
        packed[begin[g] + t * width + i] = weight_at<T>(w, o, 0, taps.kh[t], taps.kw[t]) * scale;
      }
  }
  p.weight = packed;
  p.weight_begin = begin;
  p.depthwise = true;
}

const int64_t* tap_offsets(const Env& env, const View& w, const Taps& taps) {
  int64_t* at = scratch<int64_t>(env, taps.count);
  for (int t = 0; t < taps.count; ++t) at[t] = taps.kh[t] * w.h + taps.kw[t] * w.w;
  return at;
}

// values[ids[i]] for all i; nullptr stays nullptr.
template <class T>
const T* picked(const Env& env, const void* values, const ChannelLists& l) {
  if (!values) return nullptr;
  T* found = scratch<T>(env, l.count());
  for (int64_t i = 0; i < l.count(); ++i) found[i] = static_cast<const T*>(values)[l.ids[i]];
  return found;
}

// The whole weight as lanes and reduced channels: lanes are outputs (forward) or inputs (`flip`, the input gradient, scaled by
// the output's gate too). Without its destination.
template <class T>
PanelSource<T> panel_source(const Env& env, const ConvShape& s, const View& w, const Taps& taps, const ChannelLists& ins,
                            const ChannelLists& outs, bool flip, const void* gate, const void* in_gate) {
  const int64_t in_per_group = s.channels / s.groups;
  int64_t* in_at = scratch<int64_t>(env, ins.count());
  int64_t* out_at = scratch<int64_t>(env, outs.count());
  for (int64_t i = 0; i < ins.count(); ++i) in_at[i] = ins.ids[i] % in_per_group * w.c;
  for (int64_t i = 0; i < outs.count(); ++i) out_at[i] = outs.ids[i] * w.n;
  const T* in_scale = picked<T>(env, in_gate, ins);
  const T* out_scale = flip ? picked<T>(env, gate, outs) : nullptr;
  PanelSource<T> source{};
  source.weight = static_cast<const T*>(w.data);
  source.lane_at = flip ? in_at : out_at;
  source.lanes = (flip ? ins : outs).count();
  source.red_at = flip ? out_at : in_at;
  source.reds = (flip ? outs : ins).count();
  source.red_scale = flip ? out_scale : in_scale;
  source.lane_scale = flip ? in_scale : nullptr;
  source.tap_at = tap_offsets(env, w, taps);
  return source;
}

// Panels per group.
template <class T>
void pack_panels(TapConv& p, const Env& env, const ConvShape& s, const View& w, const Taps& taps, const ChannelLists& ins,
                 const ChannelLists& outs, bool flip, const void* gate, const void* in_gate) {
  const ChannelLists &lanes = flip ? ins : outs, &reds = flip ? outs : ins;
  const PanelSource<T> whole = panel_source<T>(env, s, w, taps, ins, outs, flip, gate, in_gate);
  int64_t* begin = scratch<int64_t>(env, outs.groups + 1);
  PanelPack<T>* packs = scratch<PanelPack<T>>(env, outs.groups);
  begin[0] = 0;
  for (int g = 0; g < outs.groups; ++g) {
    const int64_t lane = lanes.begin[g], red = reds.begin[g];
    PanelPack<T> pack{whole, taps.count};
    pack.lane_at += lane;
    pack.lanes = lanes.size(g);
    pack.red_at += red;
    pack.reds = reds.size(g);
    if (pack.red_scale) pack.red_scale += red;
    if (pack.lane_scale) pack.lane_scale += lane;
    packs[g] = pack;
    begin[g + 1] = begin[g] + packed_width(pack.lanes) * pack.reds * taps.count;
  }
  T* packed = scratch<T>(env, begin[outs.groups]);
  for (int g = 0; g < outs.groups; ++g) packs[g].out = packed + begin[g];
  pack_all(packs, outs.groups, env);
  p.weight = packed;
  p.weight_begin = begin;
}

// As pack_panels, but transformed; one group.
void pack_transformed(TapConv& p, const Env& env, const ConvShape& s, const View& w, const Taps& taps, const ChannelLists& ins,
                      const ChannelLists& outs, bool flip, const void* gate, const void* in_gate, int tile) {
  PanelSource<float> source = panel_source<float>(env, s, w, taps, ins, outs, flip, gate, in_gate);
  source.out = scratch<float>(env, packed_width(source.lanes) * source.reds * (tile + 2) * (tile + 2));
  level().winograd_weight(source, tile, env);
  p.weight = source.out;
}

template <class T>
void forward(const MaskedForward& f, const Env& env) {
  if (small_map_forward(f, env) || plane_forward(f, env)) return;
  if (forward_by_columns(f, env, [&](const MaskedForward& p) { forward<T>(p, env); })) return;
  const Taps taps = forward_taps(env, f.shape);
  TapConv p = forward_geometry(f.shape, f.x, taps);
  p.out = f.y;
  p.act = f.act;
  const int64_t* in_place = ranks(env, f.live_in, f.shape.channels, f.compact_maps);
  const int64_t* out_place = ranks(env, f.live_out, f.shape.outputs, f.compact_maps);
  if (is_depthwise(f.shape)) {
    const DepthwiseLists d = depthwise_lists(env, f.shape, f.live_in, f.live_out);
    const Affine<T> rest = make_affine<T>(env, f.bias, f.gate, d.rest.ids, d.rest.count());
    fill_channels(p, places(env, d.rest, out_place), rest.scale, rest.shift, f.dtype, env);
    if (d.out.count() == 0) return;
    const Affine<T> a = make_affine<T>(env, f.bias, f.gate, d.out.ids, d.out.count());
    p.scale = a.scale;
    p.shift = a.shift;
    use_lists(p, places(env, d.in, in_place), places(env, d.out, out_place));
    pack_depthwise<T>(p, env, f.weight, taps, d.in, d.out, nullptr, static_cast<const T*>(f.in_gate));
    run_conv(f.dtype, p, env);
    return;
  }
  const ChannelLists ins = split_groups(env, f.live_in, f.shape.channels, int(f.shape.groups));
  const ChannelLists outs = split_groups(env, f.live_out, f.shape.outputs, int(f.shape.groups));
  if (outs.count() == 0) return;
  const Affine<T> a = make_affine<T>(env, f.bias, f.gate, outs.ids, outs.count());
  p.scale = a.scale;
  p.shift = a.shift;
  use_lists(p, places(env, ins, in_place), places(env, outs, out_place));
  if constexpr (std::is_same_v<T, float>) {
    const bool dense = f.x.c == 1 && f.y.c == 1 && ins.count() == f.shape.channels && outs.count() == f.shape.outputs;
    const int tile = winograd_tile(f.algorithm, f.dtype, f.shape, ins.count(), outs.count(), p.rows, p.cols, dense);
    if (tile > 0) {
      pack_transformed(p, env, f.shape, f.weight, taps, ins, outs, false, nullptr, f.in_gate, tile);
      return level().winograd(p, tile, env);
    }
  }
  pack_panels<T>(p, env, f.shape, f.weight, taps, ins, outs, false, nullptr, f.in_gate);
  run_conv(f.dtype, p, env);
}

int64_t floor_div_exact(int64_t a, int64_t b, bool& exact) {
  exact = a % b == 0;
  return a / b;
}

// Live channels of a backward call: as indices of the weight, and as places in the maps.
struct Lists {
  ChannelLists ins, outs;  // in the weight
  ChannelLists x, grad_y;  // in x and its gradient; in the output's gradient
};

// The input gradient is, for each residue of the input position modulo the stride, a stride-1 convolution of the output
// gradient with the taps that reach that residue: no zero insertion, no scatter.
template <class T>
void input_grad(const MaskedBackward& f, const View& grad, const Lists& live, bool depthwise, const Env& env) {
  const ConvShape& s = f.shape;
  const ChannelLists &ins = live.ins, &outs = live.outs;
  for (int64_t a = 0; a < std::min(s.stride_h, s.height); ++a)
    for (int64_t b = 0; b < std::min(s.stride_w, s.width); ++b) {
      Taps taps = make_taps(env, s.kh * s.kw);
      for (int64_t kh = s.kh - 1; kh >= 0; --kh)
        for (int64_t kw = s.kw - 1; kw >= 0; --kw) {
          bool exact_h, exact_w;
          const int64_t h = floor_div_exact(a + s.pad_h - kh * s.dil_h, s.stride_h, exact_h);
          const int64_t w = floor_div_exact(b + s.pad_w - kw * s.dil_w, s.stride_w, exact_w);
          if (!exact_h || !exact_w) continue;
          taps.h[taps.count] = h;
          taps.w[taps.count] = w;
          taps.kh[taps.count] = kh;
          taps.kw[taps.count++] = kw;
        }
      TapConv p{};
      p.x = grad;
      p.n = s.n;
      p.height = s.out_h;
      p.width = s.out_w;
      p.taps = taps.count;
      p.tap_h = taps.h;
      p.tap_w = taps.w;
      p.rows = (s.height - a + s.stride_h - 1) / s.stride_h;
      p.cols = (s.width - b + s.stride_w - 1) / s.stride_w;
      p.step_h = p.step_w = 1;
      const View& gx = f.grad_x;
      p.out = View{static_cast<T*>(gx.data) + a * gx.h + b * gx.w, gx.n, gx.c, gx.h * s.stride_h, gx.w * s.stride_w};
      if (taps.count == 0) continue;  // grad_x is already zero
      use_lists(p, live.grad_y, live.x);
      if constexpr (std::is_same_v<T, float>) {
        const bool dense = grad.c == 1 && gx.c == 1 && ins.count() == s.channels && outs.count() == s.outputs;
        const int tile = winograd_tile(f.algorithm, f.dtype, s, ins.count(), outs.count(), p.rows, p.cols, dense);
        if (tile > 0 && !depthwise) {
          pack_transformed(p, env, s, f.weight, taps, ins, outs, true, f.gate, f.in_gate, tile);
          level().winograd(p, tile, env);
          continue;
        }
      }
      if (depthwise)
        pack_depthwise<T>(p, env, f.weight, taps, ins, outs, static_cast<const T*>(f.gate), static_cast<const T*>(f.in_gate));
      else
        pack_panels<T>(p, env, s, f.weight, taps, ins, outs, true, f.gate, f.in_gate);
      run_conv(f.dtype, p, env);
    }
}

// One panel of the weight gradient: sums the threads' partial results in a fixed order, applies the gates and scatters into
// the full-size gradients. `in_sums` gets what the panel adds to the gradient of in_gate, per input.
template <class T>
void finish_panel(const MaskedBackward& f, const TapWeightGrad& w, const ChannelLists& ins, const ChannelLists& outs, int g,
                  int64_t panel, T* in_sums) {
  const ConvShape& s = f.shape;
  const bool depthwise = w.conv.depthwise;
  const int64_t in_per_group = s.channels / s.groups, taps = s.kh * s.kw, inputs = depthwise ? 1 : ins.size(g);
  const int64_t first = panel * kPanel, count = std::min(kPanel, outs.size(g) - first), *id = outs.ids + outs.begin[g] + first;
  const T *gate = static_cast<const T*>(f.gate), *in_gate = static_cast<const T*>(f.in_gate);
  const T* partial = static_cast<const T*>(w.partial);
  const bool wants_products = f.grad_gate || f.grad_in_gate;
  const int64_t* step = f.grad_weight_strides;
  const auto total = [&](int64_t at, T* sum) {
    for (int64_t i = 0; i < kPanel; ++i) sum[i] = partial[at + i];
    for (int part = 1; part < w.parts; ++part)
      for (int64_t i = 0; i < kPanel; ++i) sum[i] += partial[part * w.partial_size + at + i];
  };
  T scale[kPanel], sums[kPanel], products[kPanel] = {};
  for (int64_t i = 0; i < count; ++i) scale[i] = gate ? gate[id[i]] : T(1);
  const int64_t base = w.partial_begin[g] + first * inputs * taps;
  for (int64_t t = 0; t < taps; ++t)
    for (int64_t c = 0; c < inputs; ++c) {
      T raw[kPanel];
      total(base + (t * inputs + c) * kPanel, raw);
      const int64_t channel = depthwise ? 0 : ins.ids[ins.begin[g] + c], local = channel % in_per_group;
      const T in_scale = in_gate && !depthwise ? in_gate[channel] : T(1);
      if (wants_products) {
        T in_sum = 0;
        for (int64_t i = 0; i < count; ++i) {
          const T own = in_gate && depthwise ? in_gate[ins.ids[ins.begin[g] + first + i]] : in_scale;
          const T product = raw[i] * weight_at<T>(f.weight, id[i], local, t / s.kw, t % s.kw);
          products[i] += product * own;
          in_sum += product * scale[i];
          if (f.grad_in_gate && depthwise)
            static_cast<T*>(f.grad_in_gate)[ins.ids[ins.begin[g] + first + i]] += product * scale[i];
        }
        if (in_sums && !depthwise) in_sums[c] += in_sum;
      }
      if (!f.grad_weight) continue;
      T* to = static_cast<T*>(f.grad_weight) + local * step[1] + t / s.kw * step[2] + t % s.kw * step[3];
      for (int64_t i = 0; i < count; ++i) {
        const T own = in_gate && depthwise ? in_gate[ins.ids[ins.begin[g] + first + i]] : in_scale;
        to[id[i] * step[0]] = raw[i] * scale[i] * own;
      }
    }
  if (!f.grad_bias && !f.grad_gate) return;
  total(w.sum_begin[g] + first, sums);
  for (int64_t i = 0; i < count; ++i) {
    if (f.grad_bias) static_cast<T*>(f.grad_bias)[id[i]] = scale[i] * sums[i];
    if (f.grad_gate)
      static_cast<T*>(f.grad_gate)[id[i]] = products[i] + (f.bias ? static_cast<const T*>(f.bias)[id[i]] * sums[i] : T(0));
  }
}

template <class T>
void finish_weight_grad(const MaskedBackward& f, const TapWeightGrad& w, const ChannelLists& ins, const ChannelLists& outs,
                        const Env& env) {
  int64_t panels = 0, most = 1;
  for (int g = 0; g < outs.groups; ++g) {
    panels += (outs.size(g) + kPanel - 1) / kPanel;
    if (ins.groups == outs.groups) most = std::max(most, ins.size(g));
  }
  const bool wants_in = f.grad_in_gate && !w.conv.depthwise;
  T* in_sums = wants_in ? scratch<T>(env, panels * most) : nullptr;
  if (wants_in) std::memset(in_sums, 0, size_t(panels * most) * sizeof(T));
  struct Context {
    const MaskedBackward& f;
    const TapWeightGrad& w;
    const ChannelLists &ins, &outs;
    T* in_sums;
    int64_t most;
  } context{f, w, ins, outs, in_sums, most};
  const auto body = [](int64_t begin, int64_t end, void* ctx) {
    const Context& c = *static_cast<Context*>(ctx);
    int64_t at = 0;
    for (int g = 0; g < c.outs.groups && at < end; ++g) {
      const int64_t n = (c.outs.size(g) + kPanel - 1) / kPanel;
      for (int64_t p = std::max<int64_t>(0, begin - at); p < n && at + p < end; ++p)
        finish_panel<T>(c.f, c.w, c.ins, c.outs, g, p, c.in_sums ? c.in_sums + (at + p) * c.most : nullptr);
      at += n;
    }
  };
  if (w.conv.depthwise)  // outputs of several panels may share an input
    body(0, panels, &context);
  else
    env.parallel(panels, body, &context);
  if (!wants_in) return;
  int64_t at = 0;
  for (int g = 0; g < outs.groups; ++g)
    for (int64_t p = 0; p < (outs.size(g) + kPanel - 1) / kPanel; ++p, ++at)
      for (int64_t c = 0; c < ins.size(g); ++c)
        static_cast<T*>(f.grad_in_gate)[ins.ids[ins.begin[g] + c]] += in_sums[at * most + c];
}

template <class T>
void weight_grad(const MaskedBackward& f, const View& grad, const Lists& live, bool depthwise, const Env& env) {
  const ChannelLists &ins = live.ins, &outs = live.outs;
  if (outs.count() == 0) return;
  const Taps taps = forward_taps(env, f.shape);
  TapWeightGrad w{};
  w.conv = forward_geometry(f.shape, f.x, taps);
  use_lists(w.conv, live.x, live.grad_y);
  w.conv.depthwise = depthwise;
  w.grad = grad;
  int64_t* begin = scratch<int64_t>(env, outs.groups + 1);
  int64_t* sums = scratch<int64_t>(env, outs.groups + 1);
  int64_t at = 0;
  for (int g = 0; g < outs.groups; ++g) {
    begin[g] = at;
    at += (outs.size(g) + kPanel - 1) / kPanel * kPanel * (depthwise ? 1 : ins.size(g)) * taps.count;
  }
  for (int g = 0; g < outs.groups; ++g) {
    sums[g] = at;
    at += (outs.size(g) + kPanel - 1) / kPanel * kPanel;
  }
  w.partial_begin = begin;
  w.wants_sums = f.grad_bias || f.grad_gate;
  w.sum_begin = sums;
  w.partial_size = at;
  const bool dense = f.x.c == 1 && grad.c == 1 && ins.count() == f.shape.channels && outs.count() == f.shape.outputs;
  const int tile = std::is_same_v<T, float> ? winograd_tile(f.algorithm, f.dtype, f.shape, ins.count(), outs.count(),
                                                            f.shape.out_h, f.shape.out_w, dense)
                                            : 0;
  if (tile > 0 && !depthwise) {
    w.parts = 1;
    w.partial = scratch<T>(env, at);
    level().winograd_weight_grad(w, tile, env);
    if (!w.wants_sums) std::memset(static_cast<T*>(w.partial) + sums[0], 0, size_t(at - sums[0]) * sizeof(T));
    return finish_weight_grad<T>(f, w, ins, outs, env);
  }
  const int64_t limit = (int64_t(256) << 20) / int64_t(sizeof(T));  // bounds the partial sums on many-core machines
  w.parts = int(std::max<int64_t>(1, std::min<int64_t>(env.threads, limit / at)));
  w.partial = scratch<T>(env, at * w.parts);
  // The kernel returns early on an empty problem; the sums must still read as zero.
  std::memset(w.partial, 0, f.shape.n * f.shape.out_h * f.shape.out_w == 0 ? size_t(at * w.parts) * sizeof(T) : 0);
  level().weight_grad[f.dtype == DType::f64](w, env);
  finish_weight_grad<T>(f, w, ins, outs, env);
}

template <class T>
void backward(const MaskedBackward& f, const Env& env) {
  const ConvShape& s = f.shape;
  View grad = f.grad_y;
  const int64_t live = f.live_out.count;
  const bool wants_weight = f.grad_weight || f.grad_bias || f.grad_gate || f.grad_in_gate;
  const int64_t* in_place = ranks(env, f.live_in, s.channels, f.compact_maps);
  const int64_t* out_place = ranks(env, f.live_out, s.outputs, f.compact_maps);
  if (f.act != Act::none && live > 0) {
    int64_t* ids = scratch<int64_t>(env, live);
    for (int64_t i = 0; i < live; ++i) ids[i] = out_place ? i : f.live_out[i];
    grad = View{scratch<T>(env, s.n * s.out_h * s.out_w * live), s.out_h * s.out_w * live, 1, s.out_w * live, live};
    const ActGrad a{f.grad_y, f.saved, s.n, s.out_h, s.out_w, ids, live, grad.data, f.act};
    level().act_grad[f.dtype == DType::f64](a, env);
    out_place = ranks(env, f.live_out, s.outputs, true);
  }
  const auto lists = [&](const ChannelLists& ins, const ChannelLists& outs) {
    return Lists{ins, outs, places(env, ins, in_place), places(env, outs, out_place)};
  };
  if (is_depthwise(s)) {
    const DepthwiseLists d = depthwise_lists(env, s, f.live_in, f.live_out);
    if (wants_weight) {
      weight_grad<T>(f, grad, lists(d.in, d.out), true, env);
      if (d.rest.count() > 0) {  // their input is dead: only bias and gate are left
        ChannelLists none = make_lists(env, 0, 1);
        none.begin[1] = 0;
        weight_grad<T>(f, grad, lists(none, d.rest), false, env);
      }
    }
    if (f.grad_x.data && s.outputs == s.groups && d.out.count() > 0) input_grad<T>(f, grad, lists(d.in, d.out), true, env);
    if (s.outputs == s.groups) return;
  }
  const ChannelLists ins = split_groups(env, f.live_in, s.channels, int(s.groups));
  const Lists all = lists(ins, split_groups(env, f.live_out, s.outputs, int(s.groups)));
  const auto few = [&](const MaskedForward& p) { forward<T>(p, env); };
  if (f.grad_x.data && ins.count() > 0 && all.outs.count() > 0 && !small_map_input_grad(f, grad, env) &&
      !plane_input_grad(f, grad, env) && !input_grad_by_columns(f, grad, env, few) &&
      !strided_input_grad_by_columns(f, grad, env, few))
    input_grad<T>(f, grad, all, false, env);
  const auto few_grads = [&](const MaskedBackward& p, const View& columns) {
    const ChannelLists own = split_groups(env, p.live_in, p.shape.channels, 1);
    const ChannelLists lanes = split_groups(env, p.live_out, p.shape.outputs, 1);
    weight_grad<T>(p, columns, Lists{own, lanes, own, lanes}, false, env);
  };
  if (wants_weight && !is_depthwise(s) && !small_map_weight_grad(f, grad, env) && !plane_weight_grad(f, grad, env) &&
      !weight_grad_by_columns(f, grad, env, few_grads))
    weight_grad<T>(f, grad, all, false, env);
}

}  // namespace

template <class T>
void masked_forward(const MaskedForward& f, const Env& env) {
  f.compact_maps&& f.shape.groups == 1 ? forward<T>(live_problem<T>(env, f), env) : forward<T>(f, env);
}

template <class T>
void masked_backward(const MaskedBackward& f, const Env& env) {
  if (!f.compact_maps || f.shape.groups > 1) return backward<T>(f, env);
  live_backward<T>(f, env, [&](const MaskedBackward& live) { backward<T>(live, env); });
}

void masked_forward_cpu(const MaskedForward& f, const Env& env) {
  f.dtype == DType::f64 ? masked_forward<double>(f, env) : masked_forward<float>(f, env);
}

void masked_backward_cpu(const MaskedBackward& f, const Env& env) {
  f.dtype == DType::f64 ? masked_backward<double>(f, env) : masked_backward<float>(f, env);
}

void live_block_cpu(DType dtype, const ConvShape& s, const View& weight, const View& block, const IndexList& ins,
                    const IndexList& outs, const Env& env) {
  dtype == DType::f64 ? gather_weight<double>(env, s, weight, block, ins, outs)
                      : gather_weight<float>(env, s, weight, block, ins, outs);
}

void spread_block_cpu(DType dtype, const ConvShape& s, const View& block, void* out, const int64_t* step, const IndexList& ins,
                      const IndexList& outs, bool clear, const Env& env) {
  dtype == DType::f64 ? spread_weight<double>(env, s, block, ins, outs, static_cast<double*>(out), step, clear)
                      : spread_weight<float>(env, s, block, ins, outs, static_cast<float*>(out), step, clear);
}

}  // namespace lp
