// Convolution of a few planes, the colours of an image, into a channels-last map: sums over vectors of neighbouring pixels, one
// per output, which cost the same whatever the number of outputs; turned into pixels of channels before they are stored. With
// stride 2 the columns of a staged row are parted into even and odd ones. Included once per instruction set (see simd.h).

#if defined(__AVX512F__)

constexpr int64_t kPlanes = 4, kPlaneInputs = 64;  // most channels, and channels times taps
constexpr int64_t kPlanePixels = 32;               // per tile: two vectors
constexpr int kPlaneOutputs = 13;                  // with two vectors each as many as the registers hold

static bool is_planes(const TapConv& p) {
  const int64_t channels = p.in_begin[1];
  if (p.depthwise || p.groups != 1 || p.taps == 0 || p.scale || p.residual.data || p.x.w != 1 || p.out.c != 1) return false;
  if (channels < 1 || channels > kPlanes || channels * p.taps > kPlaneInputs || p.step_w > 2 || p.cols < 16) return false;
  // Elsewhere the tiles of panels win: they need not turn what they summed.
  const int64_t outputs = p.out_begin[1];
  if (outputs > 4 && (outputs <= kPanel || outputs > kPanel + 4 || p.taps == 1)) return false;
  return is_run(p.out_channel, outputs);
}

// Output and vector of pixels: to[output][pixel] = sum over the inputs k of weight[k][output] * x[at[k] + pixel].
template <int Outputs, int Vectors, int... I>
static inline __attribute__((always_inline)) void plane_sums(const float* x, const int64_t* at, int64_t inputs,
                                                             const float* weight, int64_t step, float* to,
                                                             std::integer_sequence<int, I...>) {
  using V = typename Simd<float, 64>::reg;
  V acc[Outputs * Vectors] = {};
  for (int64_t k = 0; k < inputs; ++k, weight += step) {
    V v[Vectors];
    for (int i = 0; i < Vectors; ++i) v[i] = load<V>(x + at[k] + i * 16);
    ((acc[I] += v[I % Vectors] * weight[I / Vectors]), ...);
  }
  (store<V>(to + I / Vectors * kPlanePixels + I % Vectors * 16, acc[I]), ...);
}
using PlaneSums = void (*)(const float* x, const int64_t* at, int64_t inputs, const float* weight, int64_t step, float* to);

template <int Outputs, int Vectors>
static void plane_tile(const float* x, const int64_t* at, int64_t inputs, const float* weight, int64_t step, float* to) {
  plane_sums<Outputs, Vectors>(x, at, inputs, weight, step, to, std::make_integer_sequence<int, Outputs * Vectors>());
}

struct PlaneTiles {
  PlaneSums fn[kPlaneOutputs + 1][2];  // of so many outputs, with one and two vectors
};
template <int... N>
static PlaneTiles plane_tiles_of(std::integer_sequence<int, N...>) {
  return PlaneTiles{{{nullptr, nullptr}, {plane_tile<N + 1, 1>, plane_tile<N + 1, 2>}...}};
}
static const PlaneTiles& plane_tiles() {
  static const PlaneTiles tiles = plane_tiles_of(std::make_integer_sequence<int, kPlaneOutputs>());
  return tiles;
}

// Four outputs of 16 pixels: vector j has pixels j, j + 4, j + 8 and j + 12, four channels each.
template <class V>
static inline __attribute__((always_inline)) void quads(const float* from, int64_t count, V* to) {
  typedef int Lanes __attribute__((vector_size(64)));
  constexpr Lanes low = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29};
  constexpr Lanes high = {2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31};
  constexpr Lanes left = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
  constexpr Lanes right = {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31};
  const auto row = [&](int i) { return i < count ? load<V>(from + i * kPlanePixels) : V{}; };
  const V a = row(0), b = row(1), c = row(2), d = row(3);
  const V ab = __builtin_shuffle(a, b, low), cd = __builtin_shuffle(c, d, low);
  const V ab2 = __builtin_shuffle(a, b, high), cd2 = __builtin_shuffle(c, d, high);
  to[0] = __builtin_shuffle(ab, cd, left);
  to[1] = __builtin_shuffle(ab, cd, right);
  to[2] = __builtin_shuffle(ab2, cd2, left);
  to[3] = __builtin_shuffle(ab2, cd2, right);
}

// 16 pixels of sums[output][pixel] to y, with bounds and shift (whole quads); `room`: lanes behind the outputs that may be
// overwritten.
static void store_pixels(const float* sums, const float* shift, int64_t outputs, int64_t room, Clamp bounds, float* y,
                         int64_t ldy) {
  using V = typename Simd<float, 64>::reg;
  using Quad = typename Simd<float, 16>::reg;
  typedef int Lanes __attribute__((vector_size(64)));
  constexpr Lanes halves = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
  constexpr Lanes others = {4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31};
  int64_t first = 0;
  for (; first + 16 <= outputs; first += 16) {
    V quad[4][4];
    for (int i = 0; i < 4; ++i) quads(sums + (first + 4 * i) * kPlanePixels, 4, quad[i]);
    const V add = load<V>(shift + first);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      // Quads of pixels j and j + 8, then of j + 4 and j + 12: of outputs 0 to 7, and of 8 to 15.
      const V even = __builtin_shuffle(quad[0][j], quad[1][j], halves), odd = __builtin_shuffle(quad[0][j], quad[1][j], others);
      const V even2 = __builtin_shuffle(quad[2][j], quad[3][j], halves),
              odd2 = __builtin_shuffle(quad[2][j], quad[3][j], others);
      float* to = y + j * ldy + first;
      store<V>(to, clamp(__builtin_shuffle(even, even2, halves) + add, bounds.low, bounds.high));
      store<V>(to + 4 * ldy, clamp(__builtin_shuffle(odd, odd2, halves) + add, bounds.low, bounds.high));
      store<V>(to + 8 * ldy, clamp(__builtin_shuffle(even, even2, others) + add, bounds.low, bounds.high));
      store<V>(to + 12 * ldy, clamp(__builtin_shuffle(odd, odd2, others) + add, bounds.low, bounds.high));
    }
  }
  for (; first < outputs; first += 4) {
    V quad[4];
    quads(sums + first * kPlanePixels, outputs - first, quad);
    const V add = V(_mm512_maskz_broadcast_f32x4(0xffff, __m128(load<Quad>(shift + first))));  // GCC 12 warns of the plain one
    alignas(64) float part[4][16];
    for (int j = 0; j < 4; ++j) store<V>(part[j], clamp(quad[j] + add, bounds.low, bounds.high));
    if (first + 4 <= outputs + room)
      for (int i = 0; i < 16; ++i) store<Quad>(y + i * ldy + first, load<Quad>(part[i % 4] + i / 4 * 4));
    else
      for (int i = 0; i < 16; ++i)
        for (int64_t o = first; o < outputs; ++o) y[i * ldy + o] = part[i % 4][i / 4 * 4 + o - first];
  }
}

// One row of a plane: columns [first, first + step * needed) with zeros outside of the map, the odd ones `length` behind the
// even ones.
static void stage_plane(const float* row, int64_t width, int64_t first, int64_t step, int64_t needed, int64_t length,
                        float* to) {
  const auto inside = [&](int64_t column) { return column >= 0 && column < width ? row[column] : 0.0f; };
  const auto part = [&](int64_t begin, int64_t end) {
    for (int64_t s = 0; s < step; ++s)
      for (int64_t i = begin; i < end; ++i) to[s * length + i] = inside(first + i * step + s);
  };
  // All columns of [lo, hi) lie inside.
  const int64_t lo = std::min(needed, std::max<int64_t>(0, (step - 1 - first) / step));
  const int64_t hi = std::max(lo, std::min(needed, (width - first) / step));
  using V = typename Simd<float, 64>::reg;
  typedef int Lanes __attribute__((vector_size(64)));
  constexpr Lanes even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  part(0, lo);
  int64_t done = lo;
  if (hi - lo >= 16)
    for (; done < hi; done += 16) {
      done = std::min(done, hi - 16);
      const float* from = row + first + step * done;
      if (step == 1) {
        store<V>(to + done, load<V>(from));
        continue;
      }
      const V a = load<V>(from), b = load<V>(from + 16);
      store<V>(to + done, __builtin_shuffle(a, b, even));
      store<V>(to + length + done, __builtin_shuffle(a, b, even + 1));
    }
  part(done, needed);
}

static void planes(const TapConv& p, const Env& env) {
  const int64_t channels = p.in_begin[1], outputs = p.out_begin[1], inputs = channels * p.taps;
  int64_t min_w = p.tap_w[0], max_w = p.tap_w[0];
  for (int t = 1; t < p.taps; ++t) {
    min_w = std::min(min_w, p.tap_w[t]);
    max_w = std::max(max_w, p.tap_w[t]);
  }
  const int64_t min_h = p.tap_h[0], reach = p.tap_h[p.taps - 1] - min_h + 1;
  const int64_t needed = p.cols + (max_w - min_w) / p.step_w, length = round_up(needed, 16),
                row_floats = channels * p.step_w * length;
  // Where each input begins in the staged band, and the weights, outputs side by side.
  int64_t* at = static_cast<int64_t*>(env.alloc(env.owner, size_t(inputs) * 8));
  float* weight = static_cast<float*>(env.alloc(env.owner, size_t(inputs * outputs) * 4));
  for (int t = 0; t < p.taps; ++t)
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t k = t * channels + c, column = p.tap_w[t] - min_w;
      at[k] = (p.tap_h[t] - min_h) * row_floats + (c * p.step_w + column % p.step_w) * length + column / p.step_w;
      for (int64_t o = 0; o < outputs; ++o)
        weight[k * outputs + o] = static_cast<const float*>(p.weight)[packed_offset(o, c, t, outputs, channels, p.taps, 1)];
    }
  float* shift = static_cast<float*>(env.alloc(env.owner, size_t(round_up(outputs, 4)) * 4));
  memset(shift, 0, size_t(round_up(outputs, 4)) * 4);
  if (p.shift) memcpy(shift, p.shift, size_t(outputs) * 4);
  // A band of rows stays in L1.
  const int64_t held = 10 * 1024 / row_floats, most = std::max<int64_t>(1, (held - reach) / p.step_h + 1);
  const int64_t bands = std::min(p.rows, round_up((p.rows + most - 1) / most, env.threads));
  const int64_t rows = (p.rows + bands - 1) / bands, band_floats = ((rows - 1) * p.step_h + reach) * row_floats;
  const int64_t tile_floats = outputs * kPlanePixels, slot_floats = band_floats + tile_floats;
  const int64_t tasks = p.n * bands, slots = task_slots(env, tasks);
  float* scratch = static_cast<float*>(env.alloc(env.owner, size_t(slots * slot_floats) * 4));
  const Clamp bounds = clamp_of(p.act);
  const int64_t room = p.out_room ? round_up(outputs, 8) - outputs : 0;
  const int64_t blocks = (outputs + kPlaneOutputs - 1) / kPlaneOutputs;
  const PlaneTiles& tiles = plane_tiles();
  run_tasks(env, tasks, [&](int slot, int64_t index) {
    float *band = scratch + slot * slot_floats, *sums = band + band_floats;
    const int64_t n = index / bands, begin = p.rows * (index % bands) / bands, end = p.rows * (index % bands + 1) / bands;
    const float* image = static_cast<const float*>(p.x.data) + n * p.x.n;
    const int64_t top = begin * p.step_h + min_h, staged = (end - begin - 1) * p.step_h + reach;
    for (int64_t h = 0; h < staged; ++h)
      for (int64_t c = 0; c < channels; ++c) {
        float* to = band + h * row_floats + c * p.step_w * length;
        if (top + h < 0 || top + h >= p.height)
          memset(to, 0, size_t(p.step_w * length) * 4);
        else
          stage_plane(image + (top + h) * p.x.h + p.in_channel[c] * p.x.c, p.width, min_w, p.step_w, needed, length, to);
      }
    for (int64_t row = begin; row < end; ++row) {
      float* y = static_cast<float*>(p.out.data) + n * p.out.n + row * p.out.h + p.out_channel[0];
      for (int64_t done = 0; done < p.cols;) {
        // The last tile may overlap the one before it.
        const int64_t left = p.cols - done, vectors = left > 16 && p.cols >= 32 ? 2 : 1;
        const int64_t col = std::min(done, p.cols - 16 * vectors);
        const float* x = band + (row - begin) * p.step_h * row_floats + col;
        for (int64_t b = 0; b < blocks; ++b) {
          const int64_t first = outputs * b / blocks, count = outputs * (b + 1) / blocks - first;
          tiles.fn[count][vectors - 1](x, at, inputs, weight + first, outputs, sums + first * kPlanePixels);
        }
        for (int64_t v = 0; v < vectors; ++v)
          store_pixels(sums + 16 * v, shift, outputs, room, bounds, y + (col + 16 * v) * p.out.w, p.out.w);
        done = col + 16 * vectors;
      }
      if (!bounds.complete) activate_rows(p.act, y, p.out.w, p.cols, outputs);
    }
  });
}

#else
static bool is_planes(const TapConv&) { return false; }
static void planes(const TapConv&, const Env&) {}
#endif
