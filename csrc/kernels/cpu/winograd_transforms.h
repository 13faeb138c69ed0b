// What Winograd convolution is made of: one-dimensional transforms at their points, and the transforms of tiles. Included once
// per instruction set (see simd.h).

// One-dimensional transforms for M outputs over N = M + R - 1 inputs. N = 6 takes the points 0, +-sqrt(1/2), +-sqrt(2): their
// matrices are better conditioned than those of 0, +-1, +-2, and the error is about a quarter. N = 5, for stride 2 alone, takes
// +-1/2, +-5/4. The transform of the input depends on the points alone, and all of it but the last point, infinity, is the
// transform of one input less.
template <int M, int N = M + 2>
struct Winograd;

template <>
struct Winograd<2, 4> {
  template <class V>
  static inline __attribute__((always_inline)) void input(const V* d, V* o) {
    o[0] = d[0] - d[2];
    o[1] = d[1] + d[2];
    o[2] = d[2] - d[1];
    o[3] = d[3] - d[1];
  }
  template <class V>
  static inline __attribute__((always_inline)) void output(const V* m, V* y) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] + m[3];
  }
};

struct WinogradSix {
  template <class V>
  static inline __attribute__((always_inline)) void finite(const V* d, V* o) {
    constexpr float a = 0.70710678118654752f, b = 1.41421356237309505f;
    const V e1 = d[4] - 2.0f * d[2], f1 = d[3] - 2.0f * d[1];
    const V e2 = d[4] - 0.5f * d[2], f2 = d[3] - 0.5f * d[1];
    o[0] = d[0] + (d[4] - 2.5f * d[2]);
    o[1] = e1 + a * f1;
    o[2] = e1 - a * f1;
    o[3] = e2 + b * f2;
    o[4] = e2 - b * f2;
  }
  template <class V>
  static inline __attribute__((always_inline)) V infinity(const V* d) {
    return d[1] + (d[5] - 2.5f * d[3]);
  }
  template <class V>
  static inline __attribute__((always_inline)) void input(const V* d, V* o) {
    finite(d, o);
    o[5] = infinity(d);
  }
};

struct WinogradFive {
  template <class V>
  static inline __attribute__((always_inline)) void finite(const V* d, V* o) {
    const V e1 = d[2] - 1.5625f * d[0], f1 = d[3] - 1.5625f * d[1];
    const V e2 = d[2] - 0.25f * d[0], f2 = d[3] - 0.25f * d[1];
    o[0] = f1 + 0.5f * e1;
    o[1] = f1 - 0.5f * e1;
    o[2] = f2 + 1.25f * e2;
    o[3] = f2 - 1.25f * e2;
  }
  template <class V>
  static inline __attribute__((always_inline)) V infinity(const V* d) {
    return 0.390625f * d[0] + (d[4] - 1.8125f * d[2]);
  }
};
template <int N>
using PointsOf = std::conditional_t<N == 6, WinogradSix, WinogradFive>;

// Output k is the sum of the products times the k-th powers of their points; infinity adds to the last output.
template <int M>
struct Winograd<M, 6> : WinogradSix {
  template <class V>
  static inline __attribute__((always_inline)) void output(const V* m, V* y) {
    constexpr float a[5] = {1.0f, 0.70710678118654752f, 0.5f, 0.35355339059327376f, 0.25f};
    constexpr float b[5] = {1.0f, 1.41421356237309505f, 2.0f, 2.82842712474619010f, 4.0f};
    const V s1 = m[1] + m[2], d1 = m[1] - m[2], s2 = m[3] + m[4], d2 = m[3] - m[4];
    y[0] = m[0] + s1 + s2;
#pragma GCC unroll 5
    for (int k = 1; k < M; ++k) {
      const V near = k % 2 ? d1 : s1, far = k % 2 ? d2 : s2;
      y[k] = (k == M - 1 ? m[5] + a[k] * near : a[k] * near) + b[k] * far;
    }
  }
};

template <>
struct Winograd<4, 5> : WinogradFive {
  template <class V>
  static inline __attribute__((always_inline)) void output(const V* m, V* y) {
    const V s1 = m[0] + m[1], d1 = m[0] - m[1], s2 = m[2] + m[3], d2 = m[2] - m[3];
    y[0] = s1 + s2;
    y[1] = 0.5f * d1 + 1.25f * d2;
    y[2] = 0.25f * s1 + 1.5625f * s2;
    y[3] = m[4] + 0.125f * d1 + 1.953125f * d2;
  }
};

// Transformed inputs lie as [group of tiles][point, phase][block of 16 channels][tile of the group][16], so that the product
// reads one stream. Strides are in floats.
constexpr int kChannelBlock = 16;
constexpr int kTileGroup = LP_REGISTERS == 32 ? 14 : LP_VECTOR_BYTES == 32 ? 12 : 6;

struct ChannelBlocks {
  int64_t blocks, last_begin, last_end;  // the last block holds the last 16 channels: it may overlap the one before
  int64_t point, group;                  // strides: from point to point (or phase to phase), from group to group
};

// `points`: counting each phase of a point.
static ChannelBlocks channel_blocks(int64_t channels, int64_t points) {
  ChannelBlocks b;
  b.blocks = (channels + kChannelBlock - 1) / kChannelBlock;
  b.last_end = b.blocks == 1 ? channels : kChannelBlock;
  b.last_begin = b.blocks == 1 ? 0 : b.blocks * kChannelBlock - channels;
  b.point = b.blocks * kTileGroup * kChannelBlock;
  if (b.point % 1024 == 0) b.point += kChannelBlock;  // strides of whole pages fall into one cache set
  b.group = b.point * points;
  return b;
}

template <int M, int N = M + 2>
static void winograd_input(const float* src, int64_t row, int64_t col, int64_t channels, const ChannelBlocks& b, float* dst) {
  using V = Simd<float, LP_VECTOR_BYTES>::reg;
  constexpr int L = Simd<float, LP_VECTOR_BYTES>::lanes;
  for (int64_t block = 0; block < b.blocks; ++block, dst += kTileGroup * kChannelBlock) {
    const float* from = src + std::min(block * kChannelBlock, std::max<int64_t>(0, channels - kChannelBlock));
    for (int v = 0; v < kChannelBlock; v += L) {
      V t[N][N], in[N], out[N];
      const float* line = from + v;
#pragma GCC unroll 6
      for (int j = 0; j < N; ++j, line += col) {
        const float* const base[2] = {line, line + 4 * row};  // steps that addresses take as they are
#pragma GCC unroll 6
        for (int i = 0; i < N; ++i) in[i] = in_register(load<V>(base[i / 4] + i % 4 * row));
        Winograd<M, N>::input(in, out);
#pragma GCC unroll 6
        for (int i = 0; i < N; ++i) t[i][j] = out[i];
      }
      float* to = dst + v;
#pragma GCC unroll 6
      for (int i = 0; i < N; ++i) {
        Winograd<M, N>::input(t[i], out);
#pragma GCC unroll 6
        for (int j = 0; j < N; ++j, to += b.point) store<V>(to, out[j]);
      }
    }
  }
}

// Stride 2. Output i of a row reads inputs 2 i + k: the even ones, 2 (i + t), for its even taps, the odd ones for its odd taps,
// of which there is one less. Both are stride-1 convolutions, and their products at a point may be added before the transform
// back, where the odd ones have no point at infinity. So a point of a tile has four, two or one (phase row, phase column).
template <int N, int S>
struct TileDomain {
  static constexpr int points = N * N;
  static constexpr int window = S == 1 ? N : 2 * N - 1;  // input pixels along one side
  static constexpr int taps = window * window;           // points, counting each phase
  static constexpr int phases(int i, int j) { return S == 1 ? 1 : (i < N - 1 ? 2 : 1) * (j < N - 1 ? 2 : 1); }
  // Of the first phase of point (i, j), row-major.
  static constexpr int offset(int i, int j) { return S == 1 ? i * N + j : 2 * window * i + (i < N - 1 ? 4 : 2) * j; }
  static constexpr int offset(int i, int j, int row_phase, int col_phase) {
    return offset(i, j) + (j < N - 1 ? 2 : 1) * row_phase + col_phase;
  }
};

template <int N>
static void winograd_strided_input(const float* src, int64_t row, int64_t col, int64_t channels, const ChannelBlocks& b,
                                   float* dst) {
  using V = Simd<float, LP_VECTOR_BYTES>::reg;
  using D = TileDomain<N, 2>;
  constexpr int L = Simd<float, LP_VECTOR_BYTES>::lanes, window = D::window;
  for (int64_t block = 0; block < b.blocks; ++block, dst += kTileGroup * kChannelBlock) {
    const float* from = src + std::min(block * kChannelBlock, std::max<int64_t>(0, channels - kChannelBlock));
    for (int v = 0; v < kChannelBlock; v += L) {
      V t[2][N][window], even[N], odd[N], out[N];
      for (int j = 0; j < window; ++j) {
        const float* const line = from + j * col + v;
        const float* const base[3] = {line, line + 4 * row, line + 8 * row};
#pragma GCC unroll 6
        for (int i = 0; i < N; ++i) {
          even[i] = in_register(load<V>(base[i / 2] + i % 2 * 2 * row));
          if (i < N - 1) odd[i] = in_register(load<V>(base[i / 2] + (i % 2 * 2 + 1) * row));
        }
        PointsOf<N>::finite(even, out);
#pragma GCC unroll 6
        for (int i = 0; i < N - 1; ++i) t[0][i][j] = out[i];
        t[0][N - 1][j] = PointsOf<N>::infinity(even);
        PointsOf<N>::finite(odd, out);
#pragma GCC unroll 6
        for (int i = 0; i < N - 1; ++i) t[1][i][j] = out[i];
      }
      for (int phase = 0; phase < 2; ++phase)
        for (int i = 0; i < N - phase; ++i) {
          const V* from_row = t[phase][i];
#pragma GCC unroll 6
          for (int j = 0; j < N; ++j) {
            even[j] = from_row[2 * j];
            if (j < N - 1) odd[j] = from_row[2 * j + 1];
          }
          float* to = dst + D::offset(i, 0, phase, 0) * b.point + v;
          const int64_t next = (i < N - 1 ? 4 : 2) * b.point;
          PointsOf<N>::finite(even, out);
#pragma GCC unroll 6
          for (int j = 0; j < N - 1; ++j) store<V>(to + j * next, out[j]);
          PointsOf<N>::finite(odd, out);
#pragma GCC unroll 6
          for (int j = 0; j < N - 1; ++j) store<V>(to + j * next + b.point, out[j]);
          store<V>(dst + D::offset(i, N - 1, phase, 0) * b.point + v, PointsOf<N>::infinity(even));
        }
    }
  }
}

// products: [point][width] of one tile, into a buffer: y[row * cols + col][width].
template <int M, int N>
static void winograd_output_buffer(const float* products, int64_t width, int rows, int cols, float* y) {
  const auto run = [&](auto zero, int64_t v) __attribute__((always_inline)) {
    using V = decltype(zero);
    V t[M][N], in[N], out[M];
#pragma GCC unroll 6
    for (int j = 0; j < N; ++j) {
#pragma GCC unroll 6
      for (int i = 0; i < N; ++i) in[i] = load<V>(products + (i * N + j) * width + v);
      Winograd<M, N>::output(in, out);
#pragma GCC unroll 5
      for (int i = 0; i < M; ++i) t[i][j] = out[i];
    }
#pragma GCC unroll 5
    for (int i = 0; i < M; ++i) {
      Winograd<M, N>::output(t[i], out);
      if (i >= rows) return;
#pragma GCC unroll 5
      for (int j = 0; j < M; ++j)
        if (j < cols) store<V>(y + (i * cols + j) * width + v, out[j]);
    }
  };
  constexpr int L = Simd<float, LP_VECTOR_BYTES>::lanes;
  int64_t v = 0;
  for (; v + L <= width; v += L) run(Simd<float, LP_VECTOR_BYTES>::reg{}, v);
  if constexpr (L > 8)
    for (; v < width; v += 8) run(Simd<float, 32>::reg{}, v);
}

// Into dense channels-last maps, with all of the epilogue. Strides are in floats.
struct TileTarget {
  float* y;
  const float* residual;
  int64_t y_row, y_col, residual_row, residual_col;
  const float* shift;
  int64_t count;  // outputs
  Clamp bounds;
};

// A vector of a tile's outputs; Whole: of all its pixels.
template <int M, int N, class V, bool Residual, bool Whole>
static inline __attribute__((always_inline)) void winograd_output_vector(const float* products, int64_t width, int rows,
                                                                         int cols, const TileTarget& to, int64_t v) {
  V t[M][N], in[N], out[M];
  const float* line[N];
  for (int i = 0; i < N; ++i) line[i] = products + i * N * width;
  int64_t at = v;
#pragma GCC unroll 6
  for (int j = 0; j < N; ++j, at += width) {
#pragma GCC unroll 6
    for (int i = 0; i < N; ++i) in[i] = load<V>(line[i] + at);
    Winograd<M, N>::output(in, out);
#pragma GCC unroll 5
    for (int i = 0; i < M; ++i) t[i][j] = out[i];
  }
  constexpr int64_t L = sizeof(V) / 4;
  const int64_t lanes = std::min(L, to.count - v);
  const V shift = to.shift ? load_part<V>(to.shift + v, lanes) : V{};
  const auto store_pixels = [&](auto full) __attribute__((always_inline)) {
    const int64_t count = decltype(full)::value ? L : lanes;
    float* y = to.y + v;
    const float* const residual = Residual ? to.residual + v : nullptr;
#pragma GCC unroll 5
    for (int i = 0; i < M; ++i, y += to.y_row) {
      if (!Whole && i >= rows) return;
      Winograd<M, N>::output(t[i], out);
      float* pixel = y;
      const float* more = Residual ? residual + i * to.residual_row : nullptr;
#pragma GCC unroll 5
      for (int j = 0; j < M; ++j, pixel += to.y_col) {
        if (!Whole && j >= cols) break;
        V sums = out[j] + shift;
        if constexpr (Residual) sums += load_part<V>(more + j * to.residual_col, count);
        store_part<V>(pixel, clamp(sums, to.bounds.low, to.bounds.high), count);
      }
    }
  };
  lanes == L ? store_pixels(std::true_type()) : store_pixels(std::false_type());
}

template <int M, int N, bool Residual, bool Whole>
static void winograd_output_maps(const float* products, int64_t width, int rows, int cols, const TileTarget& to) {
  using V = Simd<float, LP_VECTOR_BYTES>::reg;
  constexpr int64_t L = Simd<float, LP_VECTOR_BYTES>::lanes;
  int64_t v = 0;
  for (; v + std::min<int64_t>(L, 9) <= to.count; v += L)
    winograd_output_vector<M, N, V, Residual, Whole>(products, width, rows, cols, to, v);
  for (; v < to.count; v += std::min<int64_t>(L, 8))
    winograd_output_vector<M, N, Simd<float, (L > 8 ? 32 : LP_VECTOR_BYTES)>::reg, Residual, Whole>(products, width, rows, cols,
                                                                                                    to, v);
}

template <int M, int N>
static void winograd_output_maps(const float* products, int64_t width, int rows, int cols, const TileTarget& to) {
  const bool whole = rows == M && cols == M;
  const auto run = to.residual ? (whole ? winograd_output_maps<M, N, true, true> : winograd_output_maps<M, N, true, false>)
                               : (whole ? winograd_output_maps<M, N, false, true> : winograd_output_maps<M, N, false, false>);
  run(products, width, rows, cols, to);
}
