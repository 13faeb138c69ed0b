// Register tiles of the direct convolution: MR pixels by P panels of 16 outputs, or by 16 channels of a depthwise one.
// Included once per instruction set (see simd.h).

// What a tile fetches into L2 beside its products: `step` elements more per input.
template <class T>
struct NextPanels {
  const T* at;
  int64_t step;
};

// Weights beyond this many bytes come from memory, or the last-level cache. The first of some tiles that share a group of
// panels would wait for it, so all of them fetch the next group, a share each.
constexpr int64_t kFarWeights = int64_t(256) << 10, kFarTiles = 16;

// `width` elements per input in a group, whose weights are followed by those of the next one.
template <class T>
static NextPanels<T> next_panels(const T* group, int64_t depth, int64_t width, int64_t outputs, int64_t tiles) {
  if (depth * outputs * int64_t(sizeof(T)) <= kFarWeights || tiles > kFarTiles) return {group, 0};
  return {group + depth * width, std::min<int64_t>(64 / int64_t(sizeof(T)), width / std::max<int64_t>(1, tiles))};
}

template <class T>
using TileFn = void (*)(const T* const* pixel, const int64_t* run_at, const int64_t* run_length, int runs, const T* weight,
                        int64_t panel_stride, NextPanels<T> ahead, T* out);

// GCC spills accumulators that are indexed in a loop; a fold over constant indices keeps them in registers.
template <class T, int Bytes, int W, int P, int MR, int... I>
static inline __attribute__((always_inline)) void tile_body(const T* const* pixel, const int64_t* run_at,
                                                            const int64_t* run_length, int runs, const T* weight,
                                                            int64_t panel_stride, NextPanels<T> ahead, T* out,
                                                            std::integer_sequence<int, I...>) {
  using V = typename Simd<T, Bytes>::reg;
  using M = typename Simd<T, Bytes>::mem;
  constexpr int L = Simd<T, Bytes>::lanes, per_panel = W / L, NV = per_panel * P;
  V acc[MR * NV] = {};
  const T* panel[P];
  for (int i = 0; i < P; ++i) panel[i] = weight + i * panel_stride;
  for (int r = 0; r < runs; ++r) {
    const int64_t at = run_at[r], length = run_length[r];
    const T* x[MR];
    for (int j = 0; j < MR; ++j) x[j] = pixel[j] + at;
    for (int64_t k = 0; k < length; ++k) {
      V b[NV];
      if constexpr (P > 1) {
        __builtin_prefetch(ahead.at, 0, 2);
        ahead.at += ahead.step;
      }
      for (int v = 0; v < NV; ++v) b[v] = *reinterpret_cast<const M*>(panel[v / per_panel] + v % per_panel * L);
      ((acc[I] += x[I / NV][k] * b[I % NV]), ...);
      for (int i = 0; i < P; ++i) panel[i] += W;
    }
  }
  ((*reinterpret_cast<M*>(out + I / NV * (P * W) + I % NV * L) = acc[I]), ...);
}

template <class T, int Bytes, int W, int P, int MR>
static void tile(const T* const* pixel, const int64_t* run_at, const int64_t* run_length, int runs, const T* weight,
                 int64_t panel_stride, NextPanels<T> ahead, T* out) {
  constexpr int NV = W / Simd<T, Bytes>::lanes * P;
  tile_body<T, Bytes, W, P, MR>(pixel, run_at, run_length, runs, weight, panel_stride, ahead, out,
                                std::make_integer_sequence<int, MR * NV>());
}

// Depthwise: pixels by one block of 16 channels; `weight` strides by panel_stride from tap to tap.
template <class T, int Bytes, int MR, int... I>
static inline __attribute__((always_inline)) void depthwise_body(const T* const* pixel, const int64_t* tap_at, int taps,
                                                                 const T* weight, int64_t tap_stride, T* out,
                                                                 std::integer_sequence<int, I...>) {
  using V = typename Simd<T, Bytes>::reg;
  using M = typename Simd<T, Bytes>::mem;
  constexpr int L = Simd<T, Bytes>::lanes, NV = int(kPanel) / L;
  V acc[MR * NV] = {};
  for (int t = 0; t < taps; ++t, weight += tap_stride) {
    V w[NV];
    for (int v = 0; v < NV; ++v) w[v] = *reinterpret_cast<const M*>(weight + v * L);
    ((acc[I] += *reinterpret_cast<const M*>(pixel[I / NV] + tap_at[t] + I % NV * L) * w[I % NV]), ...);
  }
  ((*reinterpret_cast<M*>(out + I / NV * kPanel + I % NV * L) = acc[I]), ...);
}

template <class T, int Bytes, int W, int MR>
static void depthwise_tile(const T* const* pixel, const int64_t* tap_at, const int64_t*, int taps, const T* weight,
                           int64_t tap_stride, NextPanels<T>, T* out) {
  constexpr int NV = int(kPanel) / Simd<T, Bytes>::lanes;
  depthwise_body<T, Bytes, MR>(pixel, tap_at, taps, weight, tap_stride, out, std::make_integer_sequence<int, MR * NV>());
}

// Pixels per tile by vectors per row: as many accumulators as the register file holds beside the operands.
constexpr int max_rows(int vectors) {
  return LP_REGISTERS == 32 ? (vectors == 1   ? 14
                               : vectors == 2 ? 14
                               : vectors == 3 ? 8
                                              : 6)
                            : (vectors == 1   ? 12
                               : vectors == 2 ? 6
                               : vectors <= 4 ? 3
                                              : 1);
}

// Vectors that hold a whole panel: a last panel of 8 takes the lower half of one and goes through in one pass with the
// panel before it.
constexpr bool kTailBeside = LP_VECTOR_BYTES == 64;

// A vector of a panel; `last` of a tail has 8 values.
template <class V, bool Tail>
static inline __attribute__((always_inline)) V load_panel(const float* p, [[maybe_unused]] bool last) {
#if defined(__AVX512F__)
  if constexpr (Tail && sizeof(V) == 64) {
    if (last) return V(_mm512_maskz_loadu_ps(__mmask16(0xff), p));
  }
#endif
  return load<V>(p);
}

template <class T, int W>
constexpr int vector_bytes() {
  return LP_VECTOR_BYTES < W * int(sizeof(T)) ? LP_VECTOR_BYTES : W * int(sizeof(T));
}

template <class T>
struct TileSet {
  int max;
  TileFn<T> fn[15];  // by pixel count; counts without a tile of their own use the next larger one
};

template <class T, int W, int P, int MR>
static void fill_tiles(TileSet<T>& set) {
  constexpr int bytes = vector_bytes<T, W>(), limit = max_rows(W / Simd<T, bytes>::lanes * P);
  if constexpr (MR <= limit) {
    if constexpr (MR == limit || MR % 2 == 0 || MR == 1) set.fn[MR] = tile<T, bytes, W, P, MR>;
    set.max = MR;
    fill_tiles<T, W, P, MR + 1>(set);
    if (!set.fn[MR]) set.fn[MR] = set.fn[MR + 1];
  }
}

template <class T, int W, int P>
static const TileSet<T>& tiles() {
  static const TileSet<T> set = [] {
    TileSet<T> s{};
    fill_tiles<T, W, P, 1>(s);
    return s;
  }();
  return set;
}

template <class T>
static const TileSet<T>& depthwise_tiles() {
  constexpr int bytes = LP_VECTOR_BYTES;
  static const TileSet<T> set = [] {
    TileSet<T> s{};
    s.max = 4;
    s.fn[1] = depthwise_tile<T, bytes, int(kPanel), 1>;
    s.fn[2] = depthwise_tile<T, bytes, int(kPanel), 2>;
    s.fn[3] = s.fn[4] = depthwise_tile<T, bytes, int(kPanel), 4>;
    return s;
  }();
  return set;
}
