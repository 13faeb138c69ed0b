// Weight packing and compact inference convolution on the CPU.
#include <cmath>

#include "driver.h"
#include "step_scratch.h"

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

// The rows of a tile's transform of a kernel's rows (or columns).
struct WeightTransform {
  int rows;            // with stride 2: those of the even taps, then those of the odd ones, which have none at infinity
  int points, phases;  // per row of a tile; phases that are taps of a point, not channels
  double g[12][7];     // [row][tap]
};

// A row of G: the powers of its point over the product of the distances to the others; for infinity the last tap.
WeightTransform weight_transform(int kernel, int64_t channels, int tile) {
  static const double at[3][5] = {
      {0, 1, -1},
      {0.5, -0.5, 1.25, -1.25},
      {0, 0.70710678118654752440, -0.70710678118654752440, 1.41421356237309504880, -1.41421356237309504880}};
  const int step = tile < kStridedTile ? 1 : 2;
  WeightTransform t{};
  t.points = tile % kStridedTile + (kernel - 1) / step;
  const bool united = step == 2 && unites_phases(kernel, channels);
  t.phases = united ? 1 : step;
  t.rows = step * t.points - (step == 2 && !united);
  const double* point = at[t.points - 4];
  const int last = t.points - 1;
  for (int i = 0; i < last; ++i) {
    double norm = 1;
    for (int j = 0; j < last; ++j)
      if (j != i) norm *= point[i] - point[j];
    if (point[i] == 0) norm = std::abs(norm);  // the transform of the input leaves the sign of this row out
    for (int phase = 0; phase < step; ++phase) {
      double power = 1;
      for (int k = phase; k < kernel; k += step, power *= point[i]) t.g[phase * t.points + i][k] = power / norm;
    }
  }
  t.g[last][kernel - 1] = 1;
  return t;
}

// G g G^T of every (output, channel), in double and rounded once, with the points of kernels/cpu/winograd_transforms.h.
void pack_transformed(const View& w, int64_t outputs, int64_t channels, int kernel, int tile, float* packed, const Env& env) {
  struct Context {
    const View& w;
    int64_t outputs, channels;
    int kernel;
    bool united;
    int64_t taps;
    WeightTransform t;
    float* packed;

    // Where the product of rows r and s is: its channel and its tap.
    void place(int r, int s, int64_t& channel, int64_t& tap) const {
      const int n = t.points, i = r % n, j = s % n, row_phase = r / n, col_phase = s / n;
      tap = i * n + j;
      if (united) channel += (2 * row_phase + col_phase) * channels;
      if (t.phases == 1) return;
      const int in_row = i < n - 1 ? 2 : 1, in_col = j < n - 1 ? 2 : 1;  // phases of the point; TileDomain has the same order
      tap = int64_t(2) * (2 * n - 1) * i + 2 * in_row * j + in_col * row_phase + col_phase;
    }
  } context{w,
            outputs,
            channels,
            kernel,
            tile >= kStridedTile && unites_phases(kernel, channels),
            0,
            weight_transform(kernel, channels, tile),
            packed};
  context.taps = winograd_products(kernel, channels, tile) / (context.united ? 4 : 1);
  std::memset(packed, 0, size_t(transformed_size(outputs, channels, kernel, tile)) * sizeof(float));
  env.parallel(
      outputs,
      [](int64_t begin, int64_t end, void* ctx) {
        const Context& c = *static_cast<Context*>(ctx);
        const int n = c.t.rows;
        const int64_t all = c.united ? 4 * c.channels : c.channels;
        for (int64_t o = begin; o < end; ++o)
          for (int64_t k = 0; k < c.channels; ++k) {
            double half[12][7] = {};
            const float* src = static_cast<const float*>(c.w.data) + o * c.w.n + k * c.w.c;
            for (int i = 0; i < n; ++i)
              for (int j = 0; j < c.kernel; ++j)
                for (int t = 0; t < c.kernel; ++t) half[i][j] += c.t.g[i][t] * double(src[t * c.w.h + j * c.w.w]);
            for (int i = 0; i < n; ++i)
              for (int j = 0; j < n; ++j) {
                double sum = 0;
                for (int t = 0; t < c.kernel; ++t) sum += half[i][t] * c.t.g[j][t];
                int64_t channel = k, tap;
                c.place(i, j, channel, tap);
                c.packed[packed_offset(o, channel, tap, c.outputs, all, c.taps, 1)] = float(sum);
              }
          }
      },
      &context);
}

// Seven sums of the quarters of every unit, in double and rounded once; kernels/cpu/strassen.h multiplies in this order. With
// an odd number of channels the one in the middle is in both halves, with a weight of zero in the second.
void pack_strassen(const View& w, int64_t outputs, int64_t channels, float* packed, const Env& env) {
  struct Context {
    const View& w;
    int64_t outputs, channels;
    float* packed;
  } context{w, outputs, channels, packed};
  env.parallel(
      strassen_units(outputs) * kStrassenHalf,
      [](int64_t begin, int64_t end, void* ctx) {
        const Context& c = *static_cast<Context*>(ctx);
        const int64_t depth = (c.channels + 1) / 2, lanes = strassen_units(c.outputs) * kStrassenHalf;
        const auto at = [&](int64_t output, int64_t channel) {
          return output < c.outputs ? double(static_cast<const float*>(c.w.data)[output * c.w.n + channel * c.w.c]) : 0.0;
        };
        for (int64_t lane = begin; lane < end; ++lane)
          for (int64_t k = 0; k < depth; ++k) {
            const int64_t left = lane / kStrassenHalf * kStrassenHalf + lane, right = left + kStrassenHalf;
            const int64_t second = c.channels - depth + k;
            const double b11 = at(left, k), b12 = at(right, k);
            const double b21 = second < depth ? 0 : at(left, second), b22 = second < depth ? 0 : at(right, second);
            const double t1 = b12 - b11, t2 = b22 - t1;
            const double product[7] = {b11, b21, t2, b22 - b12, b21 - t2, t1, b22};
            for (int i = 0; i < 7; ++i) c.packed[packed_offset(lane, k, i, lanes, depth, 7, 1)] = float(product[i]);
          }
      },
      &context);
}

// Pixels from which Strassen's products pay: they read 1.75 times the weights.
constexpr int64_t kStrassenPixels = 48;
// And outputs that go to memory, of so few inputs that writing them takes as long as computing them: rows in order are faster.
constexpr int64_t kStrassenMostOutputs = 4 << 20, kStrassenFewInputs = 96;

bool use_strassen(const ConvShape& s, int64_t images) {
  const int64_t pixels = images * s.out_h * s.out_w;
  return pixels >= kStrassenPixels && (s.channels >= kStrassenFewInputs || pixels * s.outputs <= kStrassenMostOutputs);
}

// Multiplications that every weight which a transform for stride 2 adds must save: it may come from memory.
constexpr int64_t kSavedPerWeight = 12;

// Whether to compute with the transformed weight. Winograd pays from a few tiles up: fewer read its many weights for too little
// work. And its tiles must not be mostly empty.
bool use_transform(const CompactForward& f, int64_t images) {
  const ConvShape& s = f.shape;
  if (f.tile == 0 || f.dtype == DType::f64 || s.groups != 1 || s.channels == 0) return false;
  if (f.tile == kStrassenTile) return use_strassen(s, images);
  const int stride = f.tile < kStridedTile ? 1 : 2, side = f.tile % kStridedTile;
  if (s.stride_h != stride || s.stride_w != stride) return false;
  if (stride == 2 && (s.dil_h != 1 || s.dil_w != 1)) return false;
  const auto tiles_along = [&](int64_t size, int64_t dilation) {
    const int64_t pixels = (size + dilation - 1) / dilation;
    return dilation * ((pixels + side - 1) / side);
  };
  const int64_t tiles = images * tiles_along(s.out_h, s.dil_h) * tiles_along(s.out_w, s.dil_w);
  const int64_t products = winograd_products(s.kh, s.channels, f.tile);
  const int64_t before = images * s.out_h * s.out_w * s.kh * s.kw, after = tiles * products;
  if (after * 5 > before * 4) return false;
  // winograd.py has the same rules.
  return stride == 1 ? tiles >= 4 : before - after >= kSavedPerWeight * (products - s.kh * s.kw);
}

// One channel to one output is depthwise too, where that kernel takes it; its weight lies in a panel.
bool is_single(const CompactForward& f) {
  const ConvShape& s = f.shape;
  const bool side = s.kh == s.kw && (s.kh == 3 || s.kh == 5 || s.kh == 7);
  return f.dtype == DType::f32 && s.channels == 1 && s.outputs == 1 && side && s.stride_h == s.stride_w && s.stride_h <= 2 &&
         s.dil_h == 1 && s.dil_w == 1 && f.x.c == 1 && f.y.c == 1;
}
const void* taps_of_panel(const CompactForward& f, const Env& env) {
  const int64_t taps = f.shape.kh * f.shape.kw;
  float* weight = scratch<float>(env, taps);
  for (int64_t t = 0; t < taps; ++t)
    weight[t] = static_cast<const float*>(f.packed)[packed_offset(0, 0, t, 1, 1, taps, f.shape.groups)];
  return weight;
}

template <class T>
void compact(const CompactForward& f, bool transformed, const Env& env) {
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
  p.x_room = f.x_has_room;
  p.out_room = f.y_has_room && (!f.residual.data || f.residual_has_room);

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

  const bool single = is_single(f), depthwise = single || is_depthwise(s);
  const int groups = depthwise ? int((s.outputs + kDepthwiseChunk - 1) / kDepthwiseChunk) : int(s.groups);
  ChannelLists ins = make_lists(env, depthwise ? s.outputs : s.channels, groups);
  ChannelLists outs = make_lists(env, s.outputs, groups);
  int64_t* begin = scratch<int64_t>(env, groups + 1);
  for (int64_t i = 0; i < s.outputs; ++i) outs.ids[i] = f.out_index[i];
  p.weight = single ? taps_of_panel(f, env) : f.packed;
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
          weight[begin[g] + t * width + i] = i < size ? static_cast<const T*>(p.weight)[t * s.outputs + first + i] : T(0);
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
  if (transformed && f.tile == kStrassenTile) {
    if (level().strassen(p, env)) return;
  } else if (transformed) {
    p.weight = static_cast<const float*>(f.packed) + packed_size(s.outputs, s.channels, taps.count, 1);
    level().winograd(p, f.tile, env);
    return;
  }
  run_conv(f.dtype, p, env);
}

// The part of a half weight that is used, where it would lie in a float32 one: the direct layout, or the transform behind it.
const float* widened_weight(const CompactForward& f, bool transformed, const Env& env) {
  const ConvShape& s = f.shape;
  const int64_t direct = packed_size(s.outputs, s.channels / s.groups, s.kh * s.kw, s.groups);
  const int64_t begin = transformed ? direct : 0;
  const int64_t count = transformed ? transformed_size(s.outputs, s.channels, s.kh, f.tile) : direct;
  float* copy = scratch<float>(env, begin + count);
  constexpr int64_t row = 4096;
  const auto widen = [&](int64_t at, int64_t rows, int64_t size) {
    const auto* half = static_cast<const uint16_t*>(f.packed) + begin + at;
    const View view{const_cast<uint16_t*>(half), 0, 1, size, size};
    level().widen(HalfMap{view, f.dtype, 1, size, rows, 1, copy + begin + at}, env);
  };
  if (count >= row) widen(0, count / row, row);
  if (count % row > 0) widen(count / row * row, 1, count % row);
  return copy;
}

// Half types are storage: a few images at a time become float32 maps, small enough to stay in the cache, go through the
// float32 kernels, and are rounded once on the way back.
void compact_half(const CompactForward& f, const Env& env) {
  const ConvShape& s = f.shape;
  const int64_t x_size = f.x_channels * s.height * s.width, y_size = f.y_channels * s.out_h * s.out_w;
  const bool residual = f.residual.data != nullptr;
  const int64_t size = x_size + (residual ? 2 : 1) * y_size, budget = int64_t(512) * 1024;
  const int64_t slice = std::max<int64_t>(1, std::min(s.n, budget / std::max<int64_t>(1, size)));
  float* x = scratch<float>(env, slice * x_size);
  float* y = scratch<float>(env, slice * y_size);
  float* r = residual ? scratch<float>(env, slice * y_size) : nullptr;
  const auto dense = [](float* data, int64_t c, int64_t h, int64_t w) { return View{data, c * h * w, 1, w * c, c}; };
  StepScratch& memory = StepScratch::of_thread();
  const Env inner = memory.env(env.threads, env.parallel);
  const bool transformed = use_transform(f, slice);
  const void* packed = f.packed_is_half ? widened_weight(f, transformed, env) : f.packed;
  for (int64_t first = 0; first < s.n; first += slice) {
    const int64_t n = std::min(slice, s.n - first);
    const auto part = [&](const View& v, int64_t c, int64_t h, int64_t w, float* copy) {
      HalfMap m{v, f.dtype, n, c, h, w, copy};
      m.half.data = static_cast<uint16_t*>(v.data) + first * v.n;
      return m;
    };
    level().widen(part(f.x, f.x_channels, s.height, s.width, x), inner);
    if (residual) level().widen(part(f.residual, f.y_channels, s.out_h, s.out_w, r), inner);
    CompactForward g = f;
    g.dtype = DType::f32;
    g.packed = packed;
    g.shape.n = n;
    g.x = dense(x, f.x_channels, s.height, s.width);
    g.y = dense(y, f.y_channels, s.out_h, s.out_w);
    if (residual) g.residual = dense(r, f.y_channels, s.out_h, s.out_w);
    compact<float>(g, transformed, inner);
    level().narrow(part(f.y, f.y_channels, s.out_h, s.out_w, y), inner);
    memory.reset();
  }
  memory.trim();
}

}  // namespace

void pack_cpu(const View& weight, DType dtype, int64_t outputs, int64_t channels_per_group, int64_t kh, int64_t kw,
              int64_t groups, void* packed, const Env&) {
  dtype == DType::f64 ? pack(weight, outputs, channels_per_group, kh, kw, groups, static_cast<double*>(packed))
                      : pack(weight, outputs, channels_per_group, kh, kw, groups, static_cast<float*>(packed));
}

void pack_winograd_cpu(const View& weight, int64_t outputs, int64_t channels, int kernel, int tile, float* packed,
                       const Env& env) {
  pack_transformed(weight, outputs, channels, kernel, tile, packed, env);
}

void pack_strassen_cpu(const View& weight, int64_t outputs, int64_t channels, float* packed, const Env& env) {
  pack_strassen(weight, outputs, channels, packed, env);
}

void compact_forward_cpu(const CompactForward& f, const Env& env) {
  if (f.dtype != DType::f32 && f.dtype != DType::f64) return compact_half(f, env);
  // A single channel lies channels-last in every memory format.
  CompactForward g = f;
  if (f.x_channels == 1) g.x.c = 1;
  if (f.y_channels == 1) g.y.c = g.residual.c = 1;
  if (f.dtype == DType::f64) return compact<double>(g, false, env);
  compact<float>(g, use_transform(g, g.shape.n), env);
}

}  // namespace lp
