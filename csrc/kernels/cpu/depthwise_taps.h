// Depthwise convolution by any list of taps: oblong, dilated, large kernels, any stride, on channels-last tensors, where
// depthwise_flat.h and depthwise.h do not take it. One vector of channels of a tile of columns at a time, a load and a product
// per tap and column, nothing staged. Included once per instruction set (see simd.h).

constexpr int kTapColumns = LP_REGISTERS == 32 ? 14 : 10;

// One row of the output; taps whose row of the input lies outside of the map are left out.
struct TapRow {
  int taps;
  const float* const* in;  // per tap: the input of column 0, may lie outside of the row
  const int64_t* weight;   // per tap: offset
  const int64_t* column;   // per tap: of the input for column 0
  const float *weights, *shift, *residual;
  float* out;
  int64_t step, width, stride, out_step, residual_step;
  int64_t part;  // channels, where they are fewer than a vector holds
  Clamp bounds;
};

template <class V, bool Part>
static inline __attribute__((always_inline)) void tap_store(const TapRow& r, V sum, V low, V high, int64_t channel,
                                                            int64_t col) {
  if (r.residual) sum += depthwise_load<Part, V>(r, r.residual + channel + col * r.residual_step);
  depthwise_store<Part, V>(r, r.out + channel + col * r.out_step, clamp(sum, low, high));
}

// Columns whose windows lie inside of the row.
template <class V, int Cols, bool Part>
static inline __attribute__((always_inline)) void tap_columns(const TapRow& r, int64_t channel, int64_t col) {
  V acc[Cols];
  const V shift = r.shift ? depthwise_load<Part, V>(r, r.shift + channel) : V{};
#pragma GCC unroll 14
  for (int c = 0; c < Cols; ++c) acc[c] = shift;
  const int64_t apart = r.stride * r.step, begin = channel + col * apart;
  for (int t = 0; t < r.taps; ++t) {
    const V w = depthwise_load<Part, V>(r, r.weights + r.weight[t] + channel);
    const float* x = r.in[t] + begin;
#pragma GCC unroll 14
    for (int c = 0; c < Cols; ++c) acc[c] += depthwise_load<Part, V>(r, x + c * apart) * w;
  }
  const V low = V{} + r.bounds.low, high = V{} + r.bounds.high;
#pragma GCC unroll 14
  for (int c = 0; c < Cols; ++c) tap_store<V, Part>(r, acc[c], low, high, channel, col + c);
}

template <class V, bool Part>
static void tap_edge(const TapRow& r, int64_t channel, int64_t col) {
  V sum = r.shift ? depthwise_load<Part, V>(r, r.shift + channel) : V{};
  for (int t = 0; t < r.taps; ++t) {
    const int64_t w = r.column[t] + col * r.stride;
    if (w < 0 || w >= r.width) continue;
    const V weight = depthwise_load<Part, V>(r, r.weights + r.weight[t] + channel);
    sum += depthwise_load<Part, V>(r, r.in[t] + channel + col * r.stride * r.step) * weight;
  }
  tap_store<V, Part>(r, sum, V{} + r.bounds.low, V{} + r.bounds.high, channel, col);
}

// Columns [begin, end), those in [lo, hi) inside.
struct TapColumns {
  int64_t begin, lo, hi, end;
};

template <class V, bool Part>
static __attribute__((noinline)) void tap_vector(const TapRow& r, const TapColumns& at, int64_t channel) {
  for (int64_t c = at.begin; c < at.lo; ++c) tap_edge<V, Part>(r, channel, c);
  int64_t c = at.lo;
  for (; c + kTapColumns <= at.hi; c += kTapColumns) tap_columns<V, kTapColumns, Part>(r, channel, c);
  for (; c + 4 <= at.hi; c += 4) tap_columns<V, 4, Part>(r, channel, c);
  for (; c < at.hi; ++c) tap_columns<V, 1, Part>(r, channel, c);
  for (; c < at.end; ++c) tap_edge<V, Part>(r, channel, c);
}

// All channels: whole vectors, the last one overlapping the one before; fewer than a vector by masks or narrower ones.
template <int Bytes>
static void tap_channels(const TapRow& r, const TapColumns& at, int64_t channels) {
  using V = typename Simd<float, Bytes>::reg;
  constexpr int64_t L = Bytes / 4;
  int64_t channel = 0;
  for (; channel + L <= channels; channel += L) tap_vector<V, false>(r, at, channel);
  if (channel == channels) return;
  if (channel > 0) return tap_vector<V, false>(r, at, channels - L);
  if constexpr (LP_VECTOR_BYTES == 64) {
    if (channels > 8) return tap_vector<V, true>(r, at, 0);
    return tap_vector<Simd<float, 32>::reg, true>(r, at, 0);
  } else if constexpr (Bytes > 16) {
    tap_channels<Bytes / 2>(r, at, channels);
  } else {
    for (; channel < channels; ++channel) tap_vector<Simd<float, 4>::reg, false>(r, at, channel);
  }
}

// p.weight is (tap, channel) without padding; false: not a case for it.
static bool depthwise_taps(const TapConv& p, const Env& env) {
  const int64_t channels = p.out_begin[1];
  if (p.groups != 1 || p.scale || p.taps == 0 || channels < 1) return false;
  if (p.x.c != 1 || p.out.c != 1 || (p.residual.data && p.residual.c != 1)) return false;
  if (!is_run(p.in_channel, channels) || !is_run(p.out_channel, channels)) return false;
  const Clamp bounds = clamp_of(p.act);
  int64_t first = p.tap_w[0], last = p.tap_w[0];
  for (int t = 1; t < p.taps; ++t) {
    first = std::min(first, p.tap_w[t]);
    last = std::max(last, p.tap_w[t]);
  }
  // All windows of [lo, hi) lie inside.
  const int64_t lo = std::min(p.cols, std::max<int64_t>(0, (p.step_w - 1 - first) / p.step_w));
  const int64_t fits = p.width - 1 - last, hi = std::max(lo, std::min(p.cols, fits < 0 ? 0 : fits / p.step_w + 1));
  const int64_t wanted = env.threads > 1 ? 4 * env.threads : 1, lines = p.n * p.rows;
  const int64_t parts = std::max<int64_t>(1, std::min((wanted + lines - 1) / lines, p.cols / (4 * kTapColumns)));
  const int64_t bands = parts > 1 ? p.rows : std::min(p.rows, std::max<int64_t>(1, (wanted + p.n - 1) / p.n));
  const int64_t tasks = p.n * bands * parts, slots = task_slots(env, tasks), each = 3 * p.taps;
  int64_t* scratch = static_cast<int64_t*>(env.alloc(env.owner, size_t(slots * each) * 8));
  run_tasks(env, tasks, [&](int slot, int64_t index) {
    const int64_t part = index % parts, band = index / parts % bands, n = index / parts / bands;
    int64_t* const numbers = scratch + slot * each;
    const float** const in = reinterpret_cast<const float**>(numbers);
    int64_t *const weight = numbers + p.taps, *const column = weight + p.taps;
    const float* image = static_cast<const float*>(p.x.data) + n * p.x.n + p.in_channel[0];
    TapRow r{};
    r.in = in;
    r.weight = weight;
    r.column = column;
    r.weights = static_cast<const float*>(p.weight);
    r.shift = static_cast<const float*>(p.shift);
    r.step = p.x.w;
    r.width = p.width;
    r.stride = p.step_w;
    r.out_step = p.out.w;
    r.residual_step = p.residual.w;
    r.part = channels;
    r.bounds = bounds;
    const int64_t begin = p.cols * part / parts, end = p.cols * (part + 1) / parts;
    for (int64_t row = p.rows * band / bands; row < p.rows * (band + 1) / bands; ++row) {
      r.taps = 0;
      for (int t = 0; t < p.taps; ++t) {
        const int64_t h = row * p.step_h + p.tap_h[t];
        if (h < 0 || h >= p.height) continue;
        in[r.taps] = image + h * p.x.h + p.tap_w[t] * p.x.w;
        weight[r.taps] = t * channels;
        column[r.taps++] = p.tap_w[t];
      }
      r.out = static_cast<float*>(p.out.data) + n * p.out.n + row * p.out.h + p.out_channel[0];
      if (p.residual.data)
        r.residual = static_cast<const float*>(p.residual.data) + n * p.residual.n + row * p.residual.h + p.out_channel[0];
      // All channels of a few columns: lines follow each other, and are read again while they are near.
      for (int64_t c = begin; c < end;) {
        TapColumns at{c, 0, 0, std::min(end, std::max(c, lo) + 2 * kTapColumns)};
        at.lo = std::clamp(lo, at.begin, at.end);
        at.hi = std::clamp(hi, at.lo, at.end);
        tap_channels<LP_VECTOR_BYTES>(r, at, channels);
        c = at.end;
      }
      if (!bounds.complete) activate_rows(p.act, r.out + begin * p.out.w, p.out.w, end - begin, channels);
    }
  });
  return true;
}

// Where the input lies; false: not a case for it.
static bool depthwise_in_place(const TapConv& p, const Env& env) { return depthwise(p, env) || depthwise_taps(p, env); }
