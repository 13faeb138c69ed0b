// Depthwise with stride 1 on maps whose pixels follow each other without a gap: a row is one run of floats, the same tap of the
// next column lies as many floats further as there are channels, and a vector holds whatever channels its place in the row has.
// Its weights repeat with the period of the channels, and stay in registers while the vector goes down the rows, which takes
// three loads per result of 3x3. No lane is idle but in the last vector of a row, so that three channels cost less than four.
// Included once per instruction set (see simd.h).

constexpr int kDepthwiseSide = 7;  // of the largest kernel
// Floats from what a column reads to what is fetched for one of the next: going down the rows, the hardware cannot guess them.
// What comes from beyond L2 takes longer, the more so where others use the same cache.
constexpr int64_t kFlatAhead = 2 * kPanel, kFarAhead = 8 * kPanel;

// Lanes [from, to) of a vector, zero elsewhere; nothing else is touched.
struct LaneRange {
  int64_t from, to;
};
template <class V>
static inline __attribute__((always_inline)) V load_range(const float* p, LaneRange range) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return V(_mm512_maskz_loadu_ps(__mmask16((1u << range.to) - (1u << range.from)), p));
#elif defined(__AVX2__)
  if constexpr (sizeof(V) == 32) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), first = _mm256_set1_epi32(int(range.from));
    const __m256i outside = _mm256_cmpgt_epi32(first, lane), below = _mm256_cmpgt_epi32(_mm256_set1_epi32(int(range.to)), lane);
    return V(_mm256_maskload_ps(p, _mm256_andnot_si256(outside, below)));
  }
#endif
  float lanes[sizeof(V) / 4] = {};
  for (int64_t i = range.from; i < range.to; ++i) lanes[i] = p[i];
  return load<V>(lanes);
}

struct FlatRows {
  const float* in;                       // at the window of the first output, which may begin before the map
  int64_t in_row, before, inside, rows;  // input rows before the map, then in it; output rows
  int64_t channels, pad, width, length;  // columns of padding; floats of an input and of an output row
  const float *weight, *shift;           // [tap][weight_step], and the shift alike: by place in the row
  int64_t weight_step;
  bool pairs, far;  // far: the maps come from beyond L2
  const float* residual;
  float* out;
  int64_t residual_row, out_row;
  Clamp bounds;
};

// One vector of all rows, and the same channels of the next N - 1 pixels; Edge: some lanes' windows end at the sides of the
// map, or it is the last one.
template <int K, int N, bool Edge, bool Residual>
static inline __attribute__((always_inline)) void flat_column(const FlatRows& r, int64_t phase, int64_t at, int64_t ahead) {
  using V = Simd<float, LP_VECTOR_BYTES>::reg;
  constexpr int64_t L = Simd<float, LP_VECTOR_BYTES>::lanes;
  const int64_t channels = r.channels, lanes = std::min(L, r.length - at);
  V w[K * K];
#pragma GCC unroll 49
  for (int k = 0; k < K * K; ++k) w[k] = load<V>(r.weight + k * r.weight_step + phase);
  LaneRange range[K];
  if constexpr (Edge)
    for (int k = 0; k < K; ++k) {
      const int64_t first = at + (k - r.pad) * channels;
      range[k].from = std::clamp<int64_t>(-first, 0, L);
      range[k].to = std::clamp(r.width - first, range[k].from, L);
    }
  const V shift = load<V>(r.shift + phase), low = V{} + r.bounds.low, high = V{} + r.bounds.high;
  const float *in = r.in + at, *residual = r.residual ? r.residual + at : nullptr;
  float* out = r.out + at;
  const int64_t in_row = r.in_row, out_row = r.out_row, residual_row = r.residual_row;
  const int64_t before = r.before, below = before + r.inside;  // input rows from the window of the first output on
  const bool far = r.far;
  V acc[N][K];  // of the output rows that the next input row adds to
  const auto start = [&](int i) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) acc[n][i] = shift;
  };
  const auto add = [&](int used) __attribute__((always_inline)) {
    if constexpr (!Edge) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) __builtin_prefetch(in + (K - 1 + n) * channels + ahead);
      if (far) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) __builtin_prefetch(out + n * channels + ahead, 1);
      }
    }
    start(used - 1);
    // The products of a row are added up by themselves: those of 3x3 then wait for no sum of the rows before.
    V sum[N][K];
#pragma GCC unroll 10
    for (int j = 0; j < K + N - 1; ++j) {
      const V v = in_register(Edge ? load_range<V>(in + j * channels, range[j % K]) : load<V>(in + j * channels));
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n)
        if (j - n >= 0 && j - n < K) {
#pragma GCC unroll 7
          for (int i = 0; i < used; ++i) {
            const V product = v * w[(used - 1 - i) * K + j - n];
            if constexpr (K == 3)
              sum[n][i] = j == n ? product : sum[n][i] + product;
            else
              acc[n][i] += product;
          }
        }
    }
    if constexpr (K == 3) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n)
#pragma GCC unroll 7
        for (int i = 0; i < used; ++i) acc[n][i] += sum[n][i];
    }
  };
  const auto finish = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      V v = acc[n][0];
#pragma GCC unroll 6
      for (int i = 0; i + 1 < K; ++i) acc[n][i] = acc[n][i + 1];
      if constexpr (Residual) v += Edge ? load_part<V>(residual, lanes) : load<V>(residual + n * channels);
      v = clamp(v, low, high);
      Edge ? store_part<V>(out, v, lanes) : store<V>(out + n * channels, v);
    }
    if constexpr (Residual) residual += residual_row;
    out += out_row;
  };
#pragma GCC unroll 6
  for (int used = 1; used < K; ++used) {
    start(used - 1);
    if (used > before && used <= below) add(used);
    in += in_row;
  }
  int64_t row = 0;
  for (; row < r.rows && row + K - 1 < before; ++row) {
    start(K - 1);
    in += in_row;
    finish();
  }
  for (const int64_t stop = std::min(r.rows, below - (K - 1)); row < stop; ++row) {
    add(K);
    in += in_row;
    finish();
  }
  for (; row < r.rows; ++row) {
    start(K - 1);
    finish();
  }
}

// A column by itself: at the sides of the map, and of 5x5, whose registers would not do for the loop around it as well.
template <int K, bool Edge, bool Residual>
static __attribute__((noinline)) void flat_single(const FlatRows& r, int64_t phase, int64_t at) {
  flat_column<K, 1, Edge, Residual>(r, phase, at, r.far ? kFarAhead : kFlatAhead);
}

template <int K, bool Residual>
static __attribute__((noinline)) void flat_rows(const FlatRows& rows) {
  constexpr int64_t L = Simd<float, LP_VECTOR_BYTES>::lanes;
  const FlatRows r = rows;
  const int64_t ahead = r.far ? kFarAhead : kFlatAhead;
  const int64_t begin = r.pad * r.channels, end = std::min(r.length, r.width + begin - (K - 1) * r.channels) - L;
  if (K == 3 && LP_REGISTERS == 32 && r.pairs) {
    const int64_t last = round_up(r.channels, L) - L;  // the last vector of a pixel begins here
    const int64_t beyond = 2 * r.channels - last - L;  // from behind it to where the next two pixels begin
    const auto at_side = [&](int64_t pixel) { return pixel < begin || pixel + r.channels + last > end; };
    for (int64_t pixel = 0; pixel < r.length;) {
      if (at_side(pixel)) {
        for (int64_t c = 0; c < r.channels; c += L) flat_single<3, true, Residual>(r, c, pixel + c);
        pixel += r.channels;
        continue;
      }
      for (int64_t c = 0; c < r.channels; c += L)
        flat_column<3, 2, false, Residual>(r, c, pixel + c, c + ahead <= last ? ahead : ahead + beyond);
      pixel += 2 * r.channels;
    }
    return;
  }
  int64_t phase = 0, at = 0;
  const int64_t step = L % r.channels;
  const auto next = [&] {
    at += L;
    phase += step;
    if (phase >= r.channels) phase -= r.channels;
  };
  for (; at < std::min(begin, r.length); next()) flat_single<K, true, Residual>(r, phase, at);
  for (; at <= end; next())
    if constexpr (K == 5)
      flat_single<K, false, Residual>(r, phase, at);
    else
      flat_column<K, 1, false, Residual>(r, phase, at, ahead);
  for (; at < r.length; next()) flat_single<K, true, Residual>(r, phase, at);
}

// Lines of 64 bytes in the L1 cache lie in so many sets. Three ways are for the outputs and what is fetched ahead, and the
// windows of all input rows may take two thirds of the others; more with narrow vectors, more columns of which would begin
// anew.
constexpr int64_t kL1Sets = 64, kFlatLines = LP_VECTOR_BYTES == 64 ? 45 : 50;  // per way

// Whether the windows of `rows` output rows stay in the L1 cache until the next columns read them, and the outputs until the
// next columns fill their lines: at most one line in fourteen may find no place in its set.
static bool flat_fits(const TapConv& p, int64_t channels, int64_t side, int64_t rows, int pixels) {
  const int64_t lines = (side + pixels - 2) * channels / kPanel + 2, all = (rows + side - 1) * lines, ways = l1_ways();
  if (all > kFlatLines * (ways - 3)) return false;
  // They can only be short of places where few rows lie close to a multiple of the sets' size, so that many share their sets.
  bool meet = false;
  for (int64_t few = 1; few <= 2 * (rows + side - 1) / ways; ++few) {
    const int64_t beyond = few * p.x.h * 4 % (kL1Sets * 64);
    meet |= std::min(beyond, kL1Sets * 64 - beyond) * ways < 2 * lines * 64;
  }
  if (!meet) return true;
  int change[2 * kL1Sets] = {};  // of the lines per set, from each set to the next, twice around
  const auto count = [&](uintptr_t at, int64_t row_floats, int64_t many, int64_t reach) {
    for (int64_t row = 0; row < many; ++row, at += uintptr_t(row_floats) * 4) {
      const int64_t set = int64_t(at / 64 % kL1Sets);
      ++change[set];
      --change[set + std::min(reach, kL1Sets)];
    }
  };
  count(reinterpret_cast<uintptr_t>(p.x.data), p.x.h, rows + side - 1, lines + 2);
  for (int n = 0; n < pixels; ++n)
    count(reinterpret_cast<uintptr_t>(p.out.data) + uintptr_t(n * channels) * 4, p.out.h, rows, 2);
  int64_t once = 0, again = 0, without = 0;
  for (int64_t set = 0; set < kL1Sets; ++set) again += change[set];
  for (int64_t set = 0; set < kL1Sets; ++set) {
    once += change[set];
    again += change[kL1Sets + set];
    without += std::max<int64_t>(0, once + again - ways);
  }
  return without * 14 <= all;
}

// How the rows of an image go through: in bands, 0 of them where this is not a case for it; and two pixels at a time, which
// share half of their loads, that ragged widths split between cache lines, and the weights. A pixel then takes whole vectors,
// the last of which also computes some channels of the next pixel, as that does again: at most one lane in twelve, and never
// from a residual that has been overwritten.
struct FlatPlan {
  int64_t bands;
  bool pairs, far;
};

// Bands have at least so many times the rows of a window, as each column of one begins anew, and pairs so many channels. Maps
// that come from memory, of so many bytes together, are read row by row, as are those of 5x5 whose weights fill whole vectors.
// Beyond L2 the lines of the next columns' outputs are fetched as well as those of their inputs.
constexpr int64_t kFlatRows = 4, kFlatPairs = 56, kFlatMost = int64_t(24) << 20, kFlatFar = int64_t(4) << 20;

static FlatPlan flat_plan(const TapConv& p, int64_t channels, int threads) {
  const bool gapless = p.x.w == channels && p.out.w == channels && (!p.residual.data || p.residual.w == channels);
  if (!gapless || p.step_h != 1) return {};
  constexpr int64_t L = Simd<float, LP_VECTOR_BYTES>::lanes;
  const int64_t side = p.tap_h[p.taps - 1] - p.tap_h[0] + 1, spare = round_up(channels, L) - channels;
  bool pairs = side == 3 && LP_REGISTERS == 32 && 12 * spare <= channels && !(p.residual.data && p.residual.data == p.out.data);
  const int64_t most = p.rows / (kFlatRows * side);
  int64_t bands = 1;
  if (flat_fits(p, channels, side, p.rows, 1)) {
    // Where all rows begin at the same place in a cache line, few loads are split.
    pairs = pairs && (p.x.h % kPanel != 0 || p.rows < 2 * kFlatRows * side) && flat_fits(p, channels, side, p.rows, 2);
  } else {
    pairs = pairs && channels >= kFlatPairs;
    while (bands < most && !flat_fits(p, channels, side, (p.rows + bands - 1) / bands, pairs ? 2 : 1)) ++bands;
  }
  const int64_t bytes = p.n * (p.height * p.width + p.rows * p.cols) * channels * 4;
  if (bands > 1 && (bytes > kFlatMost || (side == 5 && spare == 0))) return {};
  if (threads > 1) {  // they share bands
    const int64_t wanted = (4 * threads + p.n - 1) / std::max<int64_t>(1, p.n);
    bands = std::max(bands, std::min(wanted, std::max<int64_t>(threads, most)));
  }
  return {std::max<int64_t>(1, std::min(p.rows, bands)), pairs, bytes > kFlatFar};
}

static void depthwise_flat(const TapConv& p, const float* weights, const float* shifts, int64_t channels, FlatPlan plan,
                           const Env& env) {
  constexpr int64_t L = Simd<float, LP_VECTOR_BYTES>::lanes;
  const int64_t side = p.tap_h[p.taps - 1] - p.tap_h[0] + 1, taps = p.taps;
  // The weights from every channel on, for one vector.
  const int64_t weight_step = round_up(channels + L - 1, L);
  float* weight =
      reinterpret_cast<float*>(aligned(static_cast<char*>(env.alloc(env.owner, size_t((taps + 1) * weight_step) * 4 + 64))));
  const auto repeat = [&](float* to, const float* from) {
    for (int64_t i = 0; i < channels; ++i) to[i] = from ? from[i] : 0.0f;
    for (int64_t i = channels; i < weight_step; ++i) to[i] = to[i - channels];
  };
  for (int64_t t = 0; t < taps; ++t) repeat(weight + t * weight_step, weights + t * channels);
  repeat(weight + taps * weight_step, shifts);
  const Clamp bounds = clamp_of(p.act);
  run_tasks(env, p.n * plan.bands, [&](int, int64_t index) {
    const int64_t n = index / plan.bands, band = index % plan.bands;
    const int64_t begin = p.rows * band / plan.bands, end = p.rows * (band + 1) / plan.bands, first = begin + p.tap_h[0];
    FlatRows r{};
    r.channels = channels;
    r.pad = -p.tap_w[0];
    r.width = p.width * channels;
    r.length = p.cols * channels;
    r.in = static_cast<const float*>(p.x.data) + n * p.x.n + first * p.x.h + p.tap_w[0] * channels + p.in_channel[0];
    r.in_row = p.x.h;
    r.before = std::max<int64_t>(0, -first);
    r.inside = std::max<int64_t>(0, std::min(p.height, first + end - begin + side - 1) - std::max<int64_t>(0, first));
    r.rows = end - begin;
    r.weight = weight;
    r.shift = weight + taps * weight_step;
    r.weight_step = weight_step;
    r.pairs = plan.pairs;
    r.far = plan.far;
    r.out = static_cast<float*>(p.out.data) + n * p.out.n + begin * p.out.h + p.out_channel[0];
    r.out_row = p.out.h;
    if (p.residual.data)
      r.residual = static_cast<const float*>(p.residual.data) + n * p.residual.n + begin * p.residual.h + p.out_channel[0];
    r.residual_row = p.residual.h;
    r.bounds = bounds;
    const auto run = [&](auto k) {
      constexpr int K = decltype(k)::value;
      r.residual ? flat_rows<K, true>(r) : flat_rows<K, false>(r);
    };
    side == 3   ? run(std::integral_constant<int, 3>())
    : side == 5 ? run(std::integral_constant<int, 5>())
                : run(std::integral_constant<int, kDepthwiseSide>());
    if (!bounds.complete)
      for (int64_t i = 0; i < r.rows; ++i) activate_rows(p.act, r.out + i * r.out_row, r.length, 1, r.length);
  });
}
