// Depthwise 3x3, stride 1 and 2, on channels-last tensors: four output columns at a time, the weights of one vector of
// channels in registers, nothing staged. Included once per instruction set (see simd.h).

struct DepthwiseRow {
  const float* in[3];  // at the first input column; a row of the padding is a vector of zeros ...
  int64_t step[3];     // ... that is read again and again
  int64_t pad, width;
  const float *weight, *shift, *residual;
  int64_t tap_stride, residual_step;
  float* out;
  int64_t out_step;
  int64_t part;  // channels, where they are fewer than a vector holds and masks are cheap
  const float* ahead_in;
  const float* ahead_out;
  int64_t ahead_in_step, ahead_in_row;
  Clamp bounds;
};

template <bool Part, class V>
static inline __attribute__((always_inline)) V depthwise_load(const DepthwiseRow& r, const float* p) {
  if constexpr (Part) return load_part<V>(p, r.part);
  return load<V>(p);
}

template <bool Part, class V>
static inline __attribute__((always_inline)) void depthwise_store(const DepthwiseRow& r, float* p, V v) {
  if constexpr (Part)
    store_part<V>(p, v, r.part);
  else
    store<V>(p, v);
}

template <class V, int Stride, int Cols, bool Ahead, bool Part>
static inline __attribute__((always_inline)) void depthwise_columns(const DepthwiseRow& r, const V* w, V shift, int64_t channel,
                                                                    int64_t col) {
  V acc[Cols];
#pragma GCC unroll 4
  for (int c = 0; c < Cols; ++c) acc[c] = shift;
  if constexpr (Ahead) {
    // What the next output row reads and writes: rows lie too far apart for the hardware to guess.
    for (int s = 0; s < Stride; ++s) {
      const float* in = r.ahead_in + s * r.ahead_in_row + channel + col * Stride * r.ahead_in_step;
#pragma GCC unroll 8
      for (int c = 0; c < Cols * Stride; ++c) __builtin_prefetch(in + c * r.ahead_in_step);
    }
#pragma GCC unroll 4
    for (int c = 0; c < Cols; ++c) __builtin_prefetch(r.ahead_out + channel + (col + c) * r.out_step, 1);
  }
#pragma GCC unroll 3
  for (int kh = 0; kh < 3; ++kh) {
    const float* in = r.in[kh] + channel + (col * Stride - r.pad) * r.step[kh];
#pragma GCC unroll 9
    for (int i = 0; i < (Cols - 1) * Stride + 3; ++i) {
      const V v = depthwise_load<Part, V>(r, in);
      in += r.step[kh];
#pragma GCC unroll 4
      for (int c = 0; c < Cols; ++c)
        if (i - c * Stride >= 0 && i - c * Stride < 3) acc[c] += v * w[kh * 3 + i - c * Stride];
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < Cols; ++c) {
    if (r.residual) acc[c] += depthwise_load<Part, V>(r, r.residual + channel + (col + c) * r.residual_step);
    depthwise_store<Part, V>(r, r.out + channel + (col + c) * r.out_step, clamp(acc[c], r.bounds.low, r.bounds.high));
  }
}

// A column whose window reaches into the padding.
template <class V, int Stride, bool Part>
static inline __attribute__((always_inline)) void depthwise_edge(const DepthwiseRow& r, const V* w, V shift, int64_t channel,
                                                                 int64_t col) {
  const int64_t first = col * Stride - r.pad;
  V acc[3] = {shift, V{}, V{}};
#pragma GCC unroll 3
  for (int k = 0; k < 3; ++k) {
    if (first + k < 0 || first + k >= r.width) continue;
#pragma GCC unroll 3
    for (int kh = 0; kh < 3; ++kh)
      acc[kh] += depthwise_load<Part, V>(r, r.in[kh] + channel + (first + k) * r.step[kh]) * w[kh * 3 + k];
  }
  V sum = acc[0] + acc[1] + acc[2];
  if (r.residual) sum += depthwise_load<Part, V>(r, r.residual + channel + col * r.residual_step);
  depthwise_store<Part, V>(r, r.out + channel + col * r.out_step, clamp(sum, r.bounds.low, r.bounds.high));
}

// Columns [from, to) of one output row.
template <class V, int Stride, bool Ahead, bool Part = false>
static __attribute__((noinline)) void depthwise_strip(const DepthwiseRow& r, int64_t channels, int64_t from, int64_t to) {
  constexpr int64_t L = sizeof(V) / 4;
  const int64_t room = r.width - 3 + r.pad;
  const int64_t lo = std::min(to, std::max(from, (r.pad + Stride - 1) / Stride));
  const int64_t hi = std::max(lo, std::min(to, room < 0 ? 0 : room / Stride + 1));
  for (int64_t block = 0; block < channels; block += L) {
    const int64_t channel = Part ? 0 : std::min(block, channels - L);  // the last vector overlaps the one before
    V w[9];
#pragma GCC unroll 9
    for (int k = 0; k < 9; ++k) w[k] = depthwise_load<Part, V>(r, r.weight + k * r.tap_stride + channel);
    const V shift = r.shift ? depthwise_load<Part, V>(r, r.shift + channel) : V{};
    for (int64_t c = from; c < lo; ++c) depthwise_edge<V, Stride, Part>(r, w, shift, channel, c);
    int64_t c = lo;
    if (hi - lo >= 4)
      for (; c < hi; c += 4) depthwise_columns<V, Stride, 4, Ahead, Part>(r, w, shift, channel, std::min(c, hi - 4));
    for (; c < hi; ++c) depthwise_columns<V, Stride, 1, false, Part>(r, w, shift, channel, c);
    for (c = hi; c < to; ++c) depthwise_edge<V, Stride, Part>(r, w, shift, channel, c);
  }
}

// What depthwise() takes; p.weight is (tap, channel) without padding.
static bool is_depthwise_rows(const TapConv& p) {
  const int64_t channels = p.out_begin[1];
  if (p.groups != 1 || p.taps != 9 || p.step_h != p.step_w || p.step_h > 2 || p.scale || channels < 1) return false;
  if (p.tap_h[8] - p.tap_h[0] != 2 || p.tap_w[8] - p.tap_w[0] != 2 || p.tap_w[1] - p.tap_w[0] != 1) return false;
  if (p.x.c != 1 || p.out.c != 1 || (p.residual.data && p.residual.c != 1)) return false;
  return is_run(p.in_channel, channels) && is_run(p.out_channel, channels);
}

static bool depthwise(const TapConv& p, const Env& env) {
  if (!is_depthwise_rows(p)) return false;
  const int64_t channels = p.out_begin[1];
  float* zeros = static_cast<float*>(env.alloc(env.owner, size_t(channels) * 4));
  memset(zeros, 0, size_t(channels) * 4);
  const int64_t wanted = env.threads > 1 ? 4 * env.threads : 1;
  const int64_t bands = std::min(p.rows, std::max<int64_t>(1, (wanted + p.n - 1) / std::max<int64_t>(1, p.n)));
  const Clamp bounds = clamp_of(p.act);
  // Far: the tensors are larger than L2, prefetching pays.
  const bool far = p.n * (p.height * p.width + p.rows * p.cols) * channels * 4 > (2 << 20);
  run_tasks(env, p.n * bands, [&](int, int64_t index) {
    const int64_t n = index / bands, band = index % bands;
    DepthwiseRow r{};
    r.pad = -p.tap_w[0];
    r.width = p.width;
    r.weight = static_cast<const float*>(p.weight);
    r.tap_stride = channels;
    r.shift = static_cast<const float*>(p.shift);
    r.residual_step = p.residual.w;
    r.out_step = p.out.w;
    r.bounds = bounds;
    r.part = channels;
    // Strips of columns, so that two of the three input rows of the next output row are still in L1; cut behind whole
    // groups of four columns.
    const int64_t row_bytes = p.cols * p.step_h * channels * 4;
    const int64_t budget = std::max<int64_t>(8, 24 * 1024 / (16 * channels * p.step_h) / 4 * 4);
    const int64_t strip = !far && row_bytes <= 24 * 1024 ? p.cols : budget;
    const int64_t lead = (r.pad + p.step_w - 1) / p.step_w % 4;
    const int64_t end = p.rows * (band + 1) / bands;
    for (int64_t from = 0, to; from < p.cols; from = to) {
      to = from + strip + (from == 0 ? lead : 0);
      if (to + 3 >= p.cols) to = p.cols;
      for (int64_t row = p.rows * band / bands; row < end; ++row) {
        for (int kh = 0; kh < 3; ++kh) {
          const int64_t h = row * p.step_h + p.tap_h[0] + kh;
          const bool inside = h >= 0 && h < p.height;
          r.in[kh] = inside ? static_cast<const float*>(p.x.data) + n * p.x.n + h * p.x.h + p.in_channel[0] : zeros;
          r.step[kh] = inside ? p.x.w : 0;
        }
        r.out = static_cast<float*>(p.out.data) + n * p.out.n + row * p.out.h + p.out_channel[0];
        const bool more = row + 1 < p.rows && (row + 1) * p.step_h + p.tap_h[0] + 2 < p.height;
        r.ahead_in = more ? r.in[2] + p.x.h : zeros;
        r.ahead_in_row = more ? p.x.h : 0;
        r.ahead_in_step = more ? p.x.w : 0;
        r.ahead_out = row + 1 < p.rows ? r.out + p.out.h : r.out;
        if (p.residual.data)
          r.residual = static_cast<const float*>(p.residual.data) + n * p.residual.n + row * p.residual.h + p.out_channel[0];
        // The widest vector that the channels fill; masked where that is cheap.
        constexpr bool masks = LP_VECTOR_BYTES == 64;
        using Wide = Simd<float, LP_VECTOR_BYTES>::reg;
        using Narrow = Simd<float, LP_VECTOR_BYTES == 64 ? 32 : LP_VECTOR_BYTES>::reg;
        const auto run = [&](auto stride, auto ahead) {
          constexpr int Stride = decltype(stride)::value;
          constexpr bool Ahead = decltype(ahead)::value;
          if (channels * 4 >= LP_VECTOR_BYTES)
            depthwise_strip<Wide, Stride, Ahead>(r, channels, from, to);
          else if (masks && channels > 8)
            depthwise_strip<Wide, Stride, Ahead, masks>(r, channels, from, to);
          else if (channels * 4 >= int64_t(sizeof(Narrow)))
            depthwise_strip<Narrow, Stride, Ahead>(r, channels, from, to);
          else if (masks && channels > 4)
            depthwise_strip<Narrow, Stride, Ahead, masks>(r, channels, from, to);
          else if (channels >= 4)
            depthwise_strip<Simd<float, 16>::reg, Stride, Ahead>(r, channels, from, to);
          else
            depthwise_strip<Simd<float, 4>::reg, Stride, Ahead>(r, channels, from, to);
        };
        using One = std::integral_constant<int, 1>;
        using Two = std::integral_constant<int, 2>;
        if (p.step_h == 1)
          far ? run(One(), std::true_type()) : run(One(), std::false_type());
        else
          far ? run(Two(), std::true_type()) : run(Two(), std::false_type());
        if (!bounds.complete) activate_rows(p.act, r.out + from * r.out_step, r.out_step, to - from, channels);
      }
    }
  });
  return true;
}
