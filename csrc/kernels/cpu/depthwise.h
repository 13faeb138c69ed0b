// Depthwise 3x3, 5x5 and 7x7, stride 1 and 2, on channels-last tensors, where depthwise_flat.h does not take them: four output
// columns of two rows (AVX-512) or one at a time, the weights of one vector of channels in registers, nothing staged. Included
// once per instruction set (see simd.h).

// The first lanes of a vector, at least one: one masked move with AVX-512.
template <class V>
static inline __attribute__((always_inline)) V load_lanes(const float* p, [[maybe_unused]] int64_t count) {
#if defined(__AVX512F__)
  const unsigned mask = (1u << count) - 1;
  if constexpr (sizeof(V) == 64) return V(_mm512_maskz_loadu_ps(__mmask16(mask), p));
  if constexpr (sizeof(V) == 32) return V(_mm256_maskz_loadu_ps(__mmask8(mask), p));
  if constexpr (sizeof(V) == 16) return V(_mm_maskz_loadu_ps(__mmask8(mask), p));
#endif
  return load_part<V>(p, count);
}
template <class V>
static inline __attribute__((always_inline)) void store_lanes(float* p, V v, int64_t count) {
#if defined(__AVX512F__)
  const unsigned mask = (1u << count) - 1;
  if constexpr (sizeof(V) == 64) return _mm512_mask_storeu_ps(p, __mmask16(mask), __m512(v));
  if constexpr (sizeof(V) == 32) return _mm256_mask_storeu_ps(p, __mmask8(mask), __m256(v));
  if constexpr (sizeof(V) == 16) return _mm_mask_storeu_ps(p, __mmask8(mask), __m128(v));
#endif
  store_part<V>(p, v, count);
}

// What is fetched ahead: rows lie too far apart for the hardware to guess. The input costs little where it is in L2 already
// (3 %) and saves a third of the time where it is not; it stays in L2, as L1 would not hold it until it is read. The output
// pays only where the maps come from memory.
enum class Ahead { none, input, both };
constexpr int64_t kAheadInput = int64_t(512) << 10, kAheadBoth = int64_t(8) << 20;  // bytes of both maps

// Rows of the output that are computed together: each input row that is loaded serves all of them.
constexpr int kDepthwiseRows = LP_REGISTERS == 32 ? 2 : 1;
// Vectors share cache lines, where they are narrower than a line or the channels ragged. Rows that do not stay in the L1 cache
// go through in strips of columns, if these are not too narrow: floats of all that is read and written together.
constexpr int64_t kRowFloats = 10 << 10, kStripFloats = 8 << 10, kStripColumns = 12;

struct DepthwiseRow {
  const float* in[2 * kDepthwiseRows + kDepthwiseSide - 2];  // at the first input column; a row of the padding is all zeros
  int64_t step, pad, width, cols;
  int64_t begin, end;  // columns to compute
  const float *weight, *shift, *residual;
  int64_t tap_stride, residual_step, residual_row;
  float* out;
  int64_t out_step, out_row;
  int64_t part;  // channels, where they are fewer than a vector holds and masks are cheap
  // What the next rows read and write, where the maps are larger than the cache.
  const float* ahead_in;
  const float* ahead_out;
  int64_t ahead_in_step, ahead_in_row;
  Clamp bounds;
};

// The channels of a vector, or `r.part` of them.
template <bool Part, class V, class Row>
static inline __attribute__((always_inline)) V depthwise_load(const Row& r, const float* p) {
  if constexpr (Part) return load_lanes<V>(p, r.part);
  return load<V>(p);
}

template <bool Part, class V, class Row>
static inline __attribute__((always_inline)) void depthwise_store(const Row& r, float* p, V v) {
  if constexpr (Part)
    store_lanes<V>(p, v, r.part);
  else
    store<V>(p, v);
}

template <class V, int K, int Stride, int Rows, int Cols, Ahead A, bool Part>
static inline __attribute__((always_inline)) void depthwise_columns(const DepthwiseRow& r, const V* w, V shift, int64_t channel,
                                                                    int64_t col) {
  V acc[Rows * Cols];
#pragma GCC unroll 8
  for (int c = 0; c < Rows * Cols; ++c) acc[c] = shift;
  if constexpr (A != Ahead::none) {
#pragma GCC unroll 4
    for (int row = 0; row < Rows * Stride; ++row) {
      const float* in = r.ahead_in + row * r.ahead_in_row + channel + col * Stride * r.ahead_in_step;
#pragma GCC unroll 8
      for (int c = 0; c < Cols * Stride; ++c) __builtin_prefetch(in + c * r.ahead_in_step, 0, 2);
    }
  }
  if constexpr (A == Ahead::both) {
#pragma GCC unroll 2
    for (int row = 0; row < Rows; ++row)
#pragma GCC unroll 4
      for (int c = 0; c < Cols; ++c) __builtin_prefetch(r.ahead_out + row * r.out_row + channel + (col + c) * r.out_step, 1);
  }
  const int64_t step = r.step, at = channel + (col * Stride - r.pad) * step;
#pragma GCC unroll 9
  for (int h = 0; h < (Rows - 1) * Stride + K; ++h) {
    const float* in = r.in[h] + at;
#pragma GCC unroll 13
    for (int i = 0; i < (Cols - 1) * Stride + K; ++i) {
      const V v = in_register(depthwise_load<Part, V>(r, in + i * step));
#pragma GCC unroll 2
      for (int row = 0; row < Rows; ++row)
#pragma GCC unroll 4
        for (int c = 0; c < Cols; ++c)
          if (h - row * Stride >= 0 && h - row * Stride < K && i - c * Stride >= 0 && i - c * Stride < K)
            acc[row * Cols + c] += v * w[(h - row * Stride) * K + i - c * Stride];
    }
  }
  // Read before the stores, which may alias anything behind a reference.
  float* out = r.out + channel + col * r.out_step;
  const float* residual = r.residual;
  const int64_t out_step = r.out_step, out_row = r.out_row;
  const V low = V{} + r.bounds.low, high = V{} + r.bounds.high;
  if (residual) {
    residual += channel + col * r.residual_step;
#pragma GCC unroll 2
    for (int row = 0; row < Rows; ++row)
#pragma GCC unroll 4
      for (int c = 0; c < Cols; ++c)
        acc[row * Cols + c] += depthwise_load<Part, V>(r, residual + row * r.residual_row + c * r.residual_step);
  }
#pragma GCC unroll 2
  for (int row = 0; row < Rows; ++row)
#pragma GCC unroll 4
    for (int c = 0; c < Cols; ++c)
      depthwise_store<Part, V>(r, out + row * out_row + c * out_step, clamp(acc[row * Cols + c], low, high));
}

// A column whose window reaches into the padding.
template <class V, int K, int Stride, bool Part>
static inline __attribute__((always_inline)) void depthwise_edge(const DepthwiseRow& r, const V* w, V shift, int64_t channel,
                                                                 int64_t col, int row) {
  const int64_t first = col * Stride - r.pad;
  V acc[K] = {shift};
  for (int k = 0; k < K; ++k) {
    if (first + k < 0 || first + k >= r.width) continue;
#pragma GCC unroll 7
    for (int kh = 0; kh < K; ++kh) {
      const int h = row * Stride + kh;
      acc[kh] += depthwise_load<Part, V>(r, r.in[h] + channel + (first + k) * r.step) * w[kh * K + k];
    }
  }
  V sum = acc[0];
  for (int kh = 1; kh < K; ++kh) sum += acc[kh];
  if (r.residual) sum += depthwise_load<Part, V>(r, r.residual + row * r.residual_row + channel + col * r.residual_step);
  depthwise_store<Part, V>(r, r.out + row * r.out_row + channel + col * r.out_step, clamp(sum, r.bounds.low, r.bounds.high));
}

// Rows output rows, one vector of channels.
template <class V, int K, int Stride, int Rows, Ahead A, bool Part>
static __attribute__((noinline)) void depthwise_vector(const DepthwiseRow& r, int64_t channel) {
  const int64_t room = r.width - K + r.pad;
  const int64_t lo = std::clamp((r.pad + Stride - 1) / Stride, r.begin, r.end);
  const int64_t hi = std::clamp(room < 0 ? 0 : room / Stride + 1, lo, r.end);
  V w[K * K];
#pragma GCC unroll 49
  for (int k = 0; k < K * K; ++k) w[k] = depthwise_load<Part, V>(r, r.weight + k * r.tap_stride + channel);
  const V shift = r.shift ? depthwise_load<Part, V>(r, r.shift + channel) : V{};
  for (int row = 0; row < Rows; ++row)
    for (int64_t c = r.begin; c < lo; ++c) depthwise_edge<V, K, Stride, Part>(r, w, shift, channel, c, row);
  int64_t c = lo;
  if (hi - lo >= 4)
    for (; c < hi; c += 4) depthwise_columns<V, K, Stride, Rows, 4, A, Part>(r, w, shift, channel, std::min(c, hi - 4));
  for (; c < hi; ++c) depthwise_columns<V, K, Stride, Rows, 1, Ahead::none, Part>(r, w, shift, channel, c);
  for (int row = 0; row < Rows; ++row)
    for (c = hi; c < r.end; ++c) depthwise_edge<V, K, Stride, Part>(r, w, shift, channel, c, row);
}

// All channels: whole vectors, then the narrowest one that holds the rest and overlaps the one before.
template <int Bytes, int K, int Stride, int Rows, Ahead A>
static void depthwise_strip(const DepthwiseRow& r, int64_t channels) {
  using V = typename Simd<float, Bytes>::reg;
  constexpr int64_t L = Bytes / 4;
  int64_t channel = 0;
  for (; channel + L <= channels; channel += L)
    if (L < kPanel && channel % kPanel != 0)  // its lines have been fetched for the vector before
      depthwise_vector<V, K, Stride, Rows, Ahead::none, false>(r, channel);
    else
      depthwise_vector<V, K, Stride, Rows, A, false>(r, channel);
  const int64_t rest = channels - channel;
  if (rest == 0) return;
  if constexpr (Bytes > 16) {
    // Before the first whole vector there is nothing to overlap: masks, where they are cheap.
    constexpr bool masks = LP_VECTOR_BYTES == 64;
    using Half = typename Simd<float, Bytes / 2>::reg;
    if (channel == 0 && !masks) return depthwise_strip<Bytes / 2, K, Stride, Rows, A>(r, channels);
    if (rest * 2 <= L) {
      if (channel == 0) return depthwise_strip<Bytes / 2, K, Stride, Rows, A>(r, channels);
      return depthwise_vector<Half, K, Stride, Rows, A, false>(r, channels - L / 2);
    }
    if (channel == 0) return depthwise_vector<V, K, Stride, Rows, A, masks>(r, 0);
    return depthwise_vector<V, K, Stride, Rows, A, false>(r, channels - L);
  } else {
    if (channel > 0) return depthwise_vector<V, K, Stride, Rows, A, false>(r, channels - L);
    if (LP_VECTOR_BYTES == 64) return depthwise_vector<V, K, Stride, Rows, A, LP_VECTOR_BYTES == 64>(r, 0);
    for (; channel < channels; ++channel) depthwise_vector<Simd<float, 4>::reg, K, Stride, Rows, A, false>(r, channel);
  }
}

// What depthwise() takes; p.weight is (tap, channel) without padding.
static bool is_depthwise_rows(const TapConv& p) {
  const int64_t channels = p.out_begin[1];
  if (p.groups != 1 || p.step_h != p.step_w || p.step_h > 2 || p.scale || channels < 1) return false;
  const int64_t side = p.tap_h[p.taps - 1] - p.tap_h[0] + 1;
  if ((side != 3 && side != 5 && side != kDepthwiseSide) || p.taps != side * side) return false;
  if (p.tap_w[p.taps - 1] - p.tap_w[0] != side - 1 || p.tap_w[1] - p.tap_w[0] != 1) return false;
  if (p.x.c != 1 || p.out.c != 1 || (p.residual.data && p.residual.c != 1)) return false;
  return is_run(p.in_channel, channels) && is_run(p.out_channel, channels);
}

// Weights (tap, channel) and shift; with `channels` beyond `exact` a copy where the spare lanes are zero.
struct DepthwiseWeights {
  const float *weight, *shift;
};
static DepthwiseWeights depthwise_weights(const Env& env, const float* weight, const float* shift, int64_t taps, int64_t exact,
                                          int64_t channels) {
  if (channels == exact) return {weight, shift};
  float* padded = static_cast<float*>(env.alloc(env.owner, size_t((taps + 1) * channels) * 4));
  memset(padded, 0, size_t((taps + 1) * channels) * 4);
  for (int64_t tap = 0; tap < taps; ++tap) memcpy(padded + tap * channels, weight + tap * exact, size_t(exact) * 4);
  if (shift) memcpy(padded + taps * channels, shift, size_t(exact) * 4);
  return {padded, padded + taps * channels};
}

// `rows` rows, at most kDepthwiseRows; r says what `ahead` fetches.
static void depthwise_rows(DepthwiseRow r, int64_t side, int64_t stride, int rows, int64_t channels, Ahead ahead) {
  const auto run = [&](auto k, auto s, auto a) {
    constexpr int K = decltype(k)::value, Stride = decltype(s)::value;
    constexpr Ahead A = decltype(a)::value;
    const int64_t floats = r.step * (Stride * ((rows - 1) * Stride + K) + rows), columns = kStripFloats / floats / 4 * 4;
    const bool shared = LP_VECTOR_BYTES < 64 || r.step % kPanel != 0;
    const bool strips = shared && columns >= kStripColumns && floats * r.cols > kRowFloats;
    for (r.begin = 0; r.begin < r.cols; r.begin = r.end) {
      r.end = r.begin + columns + (r.begin == 0 ? (r.pad + Stride - 1) / Stride : 0);
      if (!strips || r.end + 4 > r.cols) r.end = r.cols;
      rows == 1 ? depthwise_strip<LP_VECTOR_BYTES, K, Stride, 1, A>(r, channels)
                : depthwise_strip<LP_VECTOR_BYTES, K, Stride, kDepthwiseRows, A>(r, channels);
    }
  };
  const auto fetching = [&](auto k, auto s) {
    // large kernels have more to compute than to fetch: one way for all
    if constexpr (decltype(k)::value > 3) return run(k, s, std::integral_constant<Ahead, Ahead::input>());
    if (ahead == Ahead::none) return run(k, s, std::integral_constant<Ahead, Ahead::none>());
    if (ahead == Ahead::input) return run(k, s, std::integral_constant<Ahead, Ahead::input>());
    run(k, s, std::integral_constant<Ahead, Ahead::both>());
  };
  const auto striding = [&](auto k) {
    stride == 1 ? fetching(k, std::integral_constant<int, 1>()) : fetching(k, std::integral_constant<int, 2>());
  };
  if (side == 3) return striding(std::integral_constant<int, 3>());
  if (side == 5) return striding(std::integral_constant<int, 5>());
  striding(std::integral_constant<int, kDepthwiseSide>());
}

static bool depthwise(const TapConv& p, const Env& env) {
  if (!is_depthwise_rows(p)) return false;
  const int64_t exact = p.out_begin[1], side = p.tap_h[p.taps - 1] - p.tap_h[0] + 1;
  // Spare lanes are computed with weights of zero: whole vectors on whole cache lines, in maps of one layout without a gap.
  const bool alike = p.x.w == p.out.w && (!p.residual.data || p.residual.w == p.x.w);
  const int64_t channels = !p.x_room || !p.out_room ? exact : alike ? p.x.w : round_up(exact, 8);
  const DepthwiseWeights w =
      depthwise_weights(env, static_cast<const float*>(p.weight), static_cast<const float*>(p.shift), p.taps, exact, channels);
  if (const FlatPlan plan = flat_plan(p, channels, env.threads); plan.bands > 0) {
    depthwise_flat(p, w.weight, w.shift, channels, plan, env);
    return true;
  }
  const int64_t row_floats = (p.width - 1) * p.x.w + channels;
  float* zeros = static_cast<float*>(env.alloc(env.owner, size_t(row_floats) * 4));
  memset(zeros, 0, size_t(row_floats) * 4);
  const int64_t wanted = env.threads > 1 ? 4 * env.threads : 1;
  const int64_t bands = std::min(p.rows, std::max<int64_t>(1, (wanted + p.n - 1) / std::max<int64_t>(1, p.n)));
  const Clamp bounds = clamp_of(p.act);
  const int64_t bytes = p.n * (p.height * p.width + p.rows * p.cols) * channels * 4;
  const Ahead ahead = bytes <= kAheadInput ? Ahead::none : bytes <= kAheadBoth ? Ahead::input : Ahead::both;
  run_tasks(env, p.n * bands, [&](int, int64_t index) {
    const int64_t n = index / bands, band = index % bands;
    DepthwiseRow r{};
    r.pad = -p.tap_w[0];
    r.width = p.width;
    r.step = p.x.w;
    r.cols = p.cols;
    r.weight = w.weight;
    r.tap_stride = channels;
    r.shift = w.shift;
    r.residual_step = p.residual.w;
    r.residual_row = p.residual.h;
    r.out_step = p.out.w;
    r.out_row = p.out.h;
    r.bounds = bounds;
    r.part = channels;
    const int64_t end = p.rows * (band + 1) / bands;
    for (int64_t row = p.rows * band / bands; row < end;) {
      const int rows = row + kDepthwiseRows <= end ? kDepthwiseRows : 1;
      for (int i = 0; i < (rows - 1) * p.step_h + side; ++i) {
        const int64_t h = row * p.step_h + p.tap_h[0] + i;
        const bool inside = h >= 0 && h < p.height;
        r.in[i] = inside ? static_cast<const float*>(p.x.data) + n * p.x.n + h * p.x.h + p.in_channel[0] : zeros;
      }
      r.out = static_cast<float*>(p.out.data) + n * p.out.n + row * p.out.h + p.out_channel[0];
      if (p.residual.data)
        r.residual = static_cast<const float*>(p.residual.data) + n * p.residual.n + row * p.residual.h + p.out_channel[0];
      const bool more = row + 2 * rows <= p.rows && (row + 2 * rows - 1) * p.step_h + p.tap_h[0] + side - 1 < p.height;
      r.ahead_in = more ? static_cast<const float*>(r.in[(rows - 1) * p.step_h + side - 1]) + p.x.h : zeros;
      r.ahead_in_row = more ? p.x.h : 0;
      r.ahead_in_step = more ? p.x.w : 0;
      r.ahead_out = more ? r.out + rows * p.out.h : r.out;
      depthwise_rows(r, side, p.step_h, rows, channels, ahead);
      if (!bounds.complete)
        for (int i = 0; i < rows; ++i) activate_rows(p.act, r.out + i * r.out_row, r.out_step, p.cols, channels);
      row += rows;
    }
  });
  return true;
}
