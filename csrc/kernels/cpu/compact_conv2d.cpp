// Weight packing and compact inference convolution on the CPU.
#include "driver.h"

namespace lp {
namespace {

template <class S>
void pack(const View& w, int64_t outputs, int64_t channels_per_group, int64_t kh, int64_t kw, int64_t groups, S* packed) {
  const int64_t taps = kh * kw;
  std::memset(static_cast<void*>(packed), 0, size_t(packed_size(outputs, channels_per_group, taps, groups)) * sizeof(S));
  for (int64_t o = 0; o < outputs; ++o)
    for (int64_t c = 0; c < channels_per_group; ++c)
      for (int64_t t = 0; t < taps; ++t)
        packed[packed_offset(o, c, t, outputs, channels_per_group, taps, groups)] =
            static_cast<const S*>(w.data)[o * w.n + c * w.c + t / kw * w.h + t % kw * w.w];
}

// Transformed in double and rounded once: G g G^T, with the points of kernels/cpu/winograd.h.
void pack_transformed(const View& w, int64_t outputs, int64_t channels, int tile, float* packed, const Env& env) {
  static const double g2[4][3] = {{1, 0, 0}, {.5, .5, .5}, {.5, -.5, .5}, {0, 0, 1}};
  static const double a = 0.70710678118654752440, b = 1.41421356237309504880;
  static const double g4[6][3] = {{1, 0, 0},
                                  {-1 / 1.5, -a / 1.5, -.5 / 1.5},
                                  {-1 / 1.5, a / 1.5, -.5 / 1.5},
                                  {1 / 6., b / 6., 2 / 6.},
                                  {1 / 6., -b / 6., 2 / 6.},
                                  {0, 0, 1}};
  struct Context {
    const View& w;
    int64_t outputs, channels;
    int points;
    const double (*g)[3];
    float* packed;
  } context{w, outputs, channels, tile + 2, tile == 2 ? g2 : g4, packed};
  std::memset(packed, 0, size_t(packed_size(outputs, channels, context.points * context.points, 1)) * sizeof(float));
  env.parallel(
      outputs,
      [](int64_t begin, int64_t end, void* ctx) {
        const Context& c = *static_cast<Context*>(ctx);
        const int n = c.points;
        for (int64_t o = begin; o < end; ++o)
          for (int64_t k = 0; k < c.channels; ++k) {
            const float* src = static_cast<const float*>(c.w.data) + o * c.w.n + k * c.w.c;
            double half[6][3];
            for (int i = 0; i < n; ++i)
              for (int j = 0; j < 3; ++j) {
                half[i][j] = 0;
                for (int t = 0; t < 3; ++t) half[i][j] += c.g[i][t] * double(src[t * c.w.h + j * c.w.w]);
              }
            for (int i = 0; i < n; ++i)
              for (int j = 0; j < n; ++j) {
                double sum = 0;
                for (int t = 0; t < 3; ++t) sum += half[i][t] * c.g[j][t];
                c.packed[packed_offset(o, k, i * n + j, c.outputs, c.channels, n * n, 1)] = float(sum);
              }
          }
      },
      &context);
}

// Winograd pays from a few tiles up: fewer read its many weights for too little work.
bool use_winograd(const CompactForward& f) {
  const ConvShape& s = f.shape;
  if (f.tile == 0 || f.dtype != DType::f32 || s.groups != 1) return false;
  const int64_t tiles = s.n * ((s.out_h + f.tile - 1) / f.tile) * ((s.out_w + f.tile - 1) / f.tile);
  return tiles >= 4 && s.kh == 3 && s.kw == 3 && s.stride_h == 1 && s.stride_w == 1 && s.dil_h == 1 && s.dil_w == 1 &&
         s.channels > 0;
}

template <class T>
void compact(const CompactForward& f, const Env& env) {
  const ConvShape& s = f.shape;
  const Taps taps = forward_taps(env, s);
  TapConv p{};
  p.x = f.x;
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
  p.out = f.y;
  p.residual = f.residual;
  p.act = f.act;

  // Channels of y that no output adds to: act(residual). Whole pixels, where that is possible: the outputs follow.
  const bool filled = f.y_channels > s.outputs && f.dtype == DType::f32 && level().residual_rows(p, f.y_channels, env);
  uint8_t* touched = scratch<uint8_t>(env, f.y_channels);
  std::memset(touched, 0, size_t(f.y_channels));
  for (int64_t i = 0; i < s.outputs; ++i) touched[f.out_index[i]] = 1;
  ChannelLists rest = make_lists(env, f.y_channels, 1);
  int64_t count = 0;
  for (int64_t c = 0; c < f.y_channels; ++c)
    if (!touched[c]) rest.ids[count++] = c;
  rest.begin[1] = count;
  if (!filled) fill_channels(p, rest, nullptr, nullptr, f.dtype, env);
  if (s.outputs == 0) return;

  const bool depthwise = is_depthwise(s);
  const int groups = depthwise ? int((s.outputs + kDepthwiseChunk - 1) / kDepthwiseChunk) : int(s.groups);
  ChannelLists ins = make_lists(env, depthwise ? s.outputs : s.channels, groups);
  ChannelLists outs = make_lists(env, s.outputs, groups);
  int64_t* begin = scratch<int64_t>(env, groups + 1);
  for (int64_t i = 0; i < s.outputs; ++i) outs.ids[i] = f.out_index[i];
  p.weight = f.packed;
  p.shift = f.bias;
  if (depthwise) {
    const int64_t multiplier = s.outputs / s.groups;
    for (int64_t i = 0; i < s.outputs; ++i) ins.ids[i] = f.in_index[i / multiplier];
    int64_t all[2] = {0, s.outputs};
    p.groups = 1;
    p.in_channel = ins.ids;
    p.out_channel = outs.ids;
    p.in_begin = p.out_begin = all;
    if (f.dtype == DType::f32 && multiplier == 1 && level().depthwise(p, env)) return;
    cut_chunks(ins, s.outputs, kDepthwiseChunk);
    cut_chunks(outs, s.outputs, kDepthwiseChunk);
    T* weight = scratch<T>(env, (s.outputs + kPanel) * taps.count);
    for (int g = 0; g < groups; ++g) {
      const int64_t first = outs.begin[g], size = outs.size(g), width = (size + kPanel - 1) / kPanel * kPanel;
      begin[g] = first * taps.count;  // all chunks but the last are whole panels
      for (int t = 0; t < taps.count; ++t)
        for (int64_t i = 0; i < width; ++i)
          weight[begin[g] + t * width + i] = i < size ? static_cast<const T*>(f.packed)[t * s.outputs + first + i] : T(0);
    }
    p.weight = weight;
  } else {
    const int64_t in_per_group = s.channels / s.groups, out_per_group = s.outputs / s.groups;
    for (int64_t i = 0; i < s.channels; ++i) ins.ids[i] = f.in_index[i];
    for (int g = 0; g < groups; ++g) {
      ins.begin[g + 1] = (g + 1) * in_per_group;
      outs.begin[g + 1] = (g + 1) * out_per_group;
      begin[g] = g * packed_width(out_per_group) * in_per_group * taps.count;
    }
  }
  p.groups = groups;
  p.in_channel = ins.ids;
  p.in_begin = ins.begin;
  p.out_channel = outs.ids;
  p.out_begin = outs.begin;
  p.weight_begin = begin;
  p.depthwise = depthwise;
  if (use_winograd(f)) {
    p.weight = static_cast<const float*>(f.packed) + packed_size(s.outputs, s.channels, 9, 1);
    level().winograd(p, f.tile, env);
    return;
  }
  run_conv(f.dtype, p, env);
}

}  // namespace

void pack_cpu(const View& weight, DType dtype, int64_t outputs, int64_t channels_per_group, int64_t kh, int64_t kw,
              int64_t groups, void* packed, const Env&) {
  dtype == DType::f64 ? pack(weight, outputs, channels_per_group, kh, kw, groups, static_cast<double*>(packed))
                      : pack(weight, outputs, channels_per_group, kh, kw, groups, static_cast<float*>(packed));
}

void pack_winograd_cpu(const View& weight, int64_t outputs, int64_t channels, int tile, float* packed, const Env& env) {
  pack_transformed(weight, outputs, channels, tile, packed, env);
}

void compact_forward_cpu(const CompactForward& f, const Env& env) {
  f.dtype == DType::f64 ? compact<double>(f, env) : compact<float>(f, env);
}

}  // namespace lp
