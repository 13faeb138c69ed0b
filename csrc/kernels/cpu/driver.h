// Helpers shared by the drivers: scratch arrays, channel lists, weight packing.
#pragma once
#include <algorithm>
#include <cstring>

#include "tap_conv.h"

namespace lp {

template <class T>
T* scratch(const Env& env, int64_t count) {
  return static_cast<T*>(env.alloc(env.owner, size_t(std::max<int64_t>(1, count)) * sizeof(T)));
}

// Channel ids cut into groups: ids[begin[g]] .. ids[begin[g + 1] - 1].
struct ChannelLists {
  int64_t* ids;
  int64_t* begin;
  int groups;
  int64_t size(int g) const { return begin[g + 1] - begin[g]; }
  int64_t count() const { return begin[groups]; }
};

inline ChannelLists make_lists(const Env& env, int64_t count, int groups) {
  ChannelLists l{scratch<int64_t>(env, count), scratch<int64_t>(env, groups + 1), groups};
  l.begin[0] = 0;
  return l;
}

// A sorted index list over `channels` channels, split at the group borders.
inline ChannelLists split_groups(const Env& env, const IndexList& list, int64_t channels, int groups) {
  ChannelLists l = make_lists(env, list.count, groups);
  const int64_t per_group = channels / groups;
  int64_t i = 0;
  for (int g = 0; g < groups; ++g) {
    for (; i < list.count && list[i] < (g + 1) * per_group; ++i) l.ids[i] = list[i];
    l.begin[g + 1] = i;
  }
  return l;
}

// Consecutive chunks of a plain list; depthwise kernels take them as tasks.
inline void cut_chunks(ChannelLists& l, int64_t count, int64_t chunk) {
  for (int g = 0; g < l.groups; ++g) l.begin[g + 1] = std::min(count, (g + 1) * chunk);
}

struct Taps {
  int count;
  int64_t *h, *w;    // offsets from the pixel's origin
  int64_t *kh, *kw;  // position in the weight
};

inline Taps make_taps(const Env& env, int64_t count) {
  return Taps{0, scratch<int64_t>(env, count), scratch<int64_t>(env, count), scratch<int64_t>(env, count),
              scratch<int64_t>(env, count)};
}

inline Taps forward_taps(const Env& env, const ConvShape& s) {
  Taps t = make_taps(env, s.kh * s.kw);
  for (int64_t kh = 0; kh < s.kh; ++kh)
    for (int64_t kw = 0; kw < s.kw; ++kw, ++t.count) {
      t.h[t.count] = kh * s.dil_h - s.pad_h;
      t.w[t.count] = kw * s.dil_w - s.pad_w;
      t.kh[t.count] = kh;
      t.kw[t.count] = kw;
    }
  return t;
}

// Packs without a transform.
template <class T>
struct PanelPack : PanelSource<T> {
  int taps;
  using PanelSource<T>::lanes, PanelSource<T>::reds;

  int64_t panels() const { return (lanes + kPanel - 1) / kPanel; }
  void panel(int64_t p) const {
    const int64_t width = packed_width(lanes), first = p * kPanel, count = std::min(kPanel, lanes - first);
    const int64_t step = width - first < kPanel ? 8 : kPanel;
    T* dst = this->out + first * reds * taps;
    for (int t = 0; t < taps; ++t)
      for (int64_t r = 0; r < reds; ++r, dst += step) {
        const T* src = this->weight + this->red_at[r] + this->tap_at[t];
        const T scale = this->red_scale ? this->red_scale[r] : T(1);
        for (int64_t i = 0; i < count; ++i)
          dst[i] = src[this->lane_at[first + i]] * (this->lane_scale ? scale * this->lane_scale[first + i] : scale);
        for (int64_t i = count; i < step; ++i) dst[i] = T(0);
      }
  }
};

template <class T>
void pack_all(const PanelPack<T>* packs, int count, const Env& env) {
  struct Context {
    const PanelPack<T>* packs;
    int count;
  } context{packs, count};
  int64_t panels = 0;
  for (int i = 0; i < count; ++i) panels += packs[i].panels();
  env.parallel(
      panels,
      [](int64_t begin, int64_t end, void* ctx) {
        const Context& c = *static_cast<Context*>(ctx);
        int64_t at = 0;
        for (int i = 0; i < c.count && at < end; ++i) {
          const int64_t n = c.packs[i].panels();
          for (int64_t p = std::max<int64_t>(0, begin - at); p < n && at + p < end; ++p) c.packs[i].panel(p);
          at += n;
        }
      },
      &context);
}

inline bool is_depthwise(const ConvShape& s) { return s.channels == s.groups && s.groups > 1; }
constexpr int64_t kDepthwiseChunk = 64;

inline CpuKernels const& level() { return cpu_kernels(); }
inline void run_conv(DType dtype, const TapConv& p, const Env& env) { level().conv[int(dtype)](p, env); }

// A tap-less convolution: writes act(shift + residual) to the listed channels.
inline void fill_channels(TapConv p, const ChannelLists& outs, const void* scale, const void* shift, DType dtype,
                          const Env& env) {
  if (outs.count() == 0) return;
  int64_t* none = scratch<int64_t>(env, 2);
  none[0] = none[1] = 0;
  int64_t* all = scratch<int64_t>(env, 2);
  all[0] = 0;
  all[1] = outs.count();
  p.groups = 1;
  p.taps = 0;
  p.in_channel = none;
  p.in_begin = none;
  p.out_channel = outs.ids;
  p.out_begin = all;
  p.weight_begin = none;
  p.weight = none;
  p.scale = scale;
  p.shift = shift;
  p.depthwise = false;
  run_conv(dtype, p, env);
}

}  // namespace lp
