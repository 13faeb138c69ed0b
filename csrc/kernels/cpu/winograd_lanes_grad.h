// The weight gradient of winograd_lanes.h: the transformed tiles of inputs and of output gradients, multiplied lane by lane and
// summed over all tiles, point by point. Included once per instruction set (see simd.h).

#if defined(__AVX512F__)

template <int M>
struct WinogradAdjoint;

// The sums of the lanes of 16 vectors.
static inline __attribute__((always_inline)) __m512 sums_of_lanes(__m512* a) {
  const auto pairs = [](__m512 x, __m512 y) {  // of 16 bytes
    return _mm512_add_ps(_mm512_maskz_shuffle_f32x4(0xffff, x, y, 0x88), _mm512_maskz_shuffle_f32x4(0xffff, x, y, 0xdd));
  };
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) a[i] = _mm512_add_ps(low_words(a[2 * i], a[2 * i + 1]), high_words(a[2 * i], a[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) a[i] = _mm512_add_ps(low_pairs(a[2 * i], a[2 * i + 1]), high_pairs(a[2 * i], a[2 * i + 1]));
  a[0] = pairs(a[0], a[1]);
  a[0] = pairs(a[0], pairs(a[2], a[3]));
  return a[0];
}

// sums[o][c] (+)= sum over tiles of grad[o][tile] * x[c][tile], four outputs by four channels.
template <int... I>
static inline __attribute__((always_inline)) void lane_grad_block(const float* x, const float* grad, int64_t step,
                                                                  int64_t vectors, float* sums, bool add,
                                                                  std::integer_sequence<int, I...>) {
  using V = Simd<float, 64>::reg;
  V acc[16] = {};
  for (int64_t v = 0; v < vectors; ++v, x += kTileLanes, grad += kTileLanes) {
    V a[4], b[4];
    for (int k = 0; k < 4; ++k) a[k] = load<V>(grad + k * step), b[k] = load<V>(x + k * step);
    ((acc[I] += a[I / 4] * b[I % 4]), ...);
  }
  __m512 lanes[16] = {__m512(acc[I])...};
  const V found = V(sums_of_lanes(lanes));
  store<V>(sums, add ? load<V>(sums) + found : found);
}

// Sums of products at each point: [point][panel of 16 outputs][channel][output], steps in floats. Whole tensors of consecutive
// channels.
template <int M>
static void lane_grad_sums(const TapWeightGrad& w, const Env& env, float* out, int64_t point_step, int64_t panel_step) {
  constexpr int N = M + 2, points = N * N;
  const TapConv& p = w.conv;
  const int64_t channels = p.in_begin[1], outputs = p.out_begin[1], ins = round_up(channels, 4), outs = round_up(outputs, 4);
  const LaneGrid grid = lane_grid(p, M);
  const int64_t vectors = (grid.tiles + kTileLanes - 1) / kTileLanes;
  // What a pass transforms stays in L2.
  const int64_t fit = std::max<int64_t>(4, (int64_t(256) << 10) / (points * (ins + outs) * kTileLanes * 4)) * env.threads;
  const int64_t passes = (vectors + fit - 1) / fit, most = (vectors + passes - 1) / passes;
  const int64_t step = most * kTileLanes, x_point = ins * step + kTileLanes, grad_point = outs * step + kTileLanes;
  const int64_t blocks = ins / 4 * (outs / 4), zero_floats = round_up(std::max(channels, outputs), kPanel);
  const int64_t floats = points * (x_point + grad_point + blocks * 16) + zero_floats;
  float* const x = reinterpret_cast<float*>(aligned(static_cast<char*>(env.alloc(env.owner, size_t(floats) * 4 + 64))));
  float *const grad = x + points * x_point, *const sums = grad + points * grad_point,
               *const zeros = sums + points * blocks * 16;
  memset(zeros, 0, size_t(zero_floats) * 4);
  for (int point = 0; point < points; ++point) {  // channels that are not there
    std::fill(x + point * x_point + channels * step, x + (point + 1) * x_point, 0.0f);
    std::fill(grad + point * grad_point + outputs * step, grad + (point + 1) * grad_point, 0.0f);
  }
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t begin = vectors * pass / passes, count = vectors * (pass + 1) / passes - begin;
    run_tasks(env, count, [&](int, int64_t v) {
      LaneTiles tiles;
      place_lanes(grid, (begin + v) * kTileLanes, tiles);
      LanePixels<N> in;
      lane_pixels<M>(tiles, p.x, p.in_channel[0], p.height, p.width, p.tap_h[0], p.tap_w[0], zeros, in);
      transform_lanes<N, N>(in, channels, x + v * kTileLanes, x_point, step,
                            [](const auto* d, auto* o) { Winograd<M>::input(d, o); });
      LanePixels<M> of;
      lane_pixels<M>(tiles, w.grad, p.out_channel[0], p.rows, p.cols, 0, 0, zeros, of);
      transform_lanes<M, N>(of, outputs, grad + v * kTileLanes, grad_point, step,
                            [](const auto* d, auto* o) { WinogradAdjoint<M>::grad(d, o); });
    });
    const auto ahead = [&](const View& map) {
      return LinesAhead(grid, map, M, (begin + count) * kTileLanes, (begin + count + most) * kTileLanes, points);
    };
    LinesAhead next_x = ahead(p.x), next_grad = ahead(w.grad);
    run_tasks(env, points, [&](int, int64_t point) {
      if (env.threads == 1) {
        next_x.fetch<0>();
        next_grad.fetch<0>();
      }
      float* to = sums + point * blocks * 16;
      for (int64_t o = 0; o < outs; o += 4)
        for (int64_t c = 0; c < ins; c += 4, to += 16)
          lane_grad_block(x + point * x_point + c * step, grad + point * grad_point + o * step, step, count, to, pass > 0,
                          std::make_integer_sequence<int, 16>());
    });
  }
  for (int point = 0; point < points; ++point)
    for (int64_t o = 0; o < outputs; ++o) {
      const float* from = sums + (point * blocks + o / 4 * (ins / 4)) * 16 + o % 4 * 4;
      float* to = out + point * point_step + o / kPanel * panel_step + o % kPanel;
      for (int64_t c = 0; c < channels; ++c) to[c * kPanel] = from[c / 4 * 16 + c % 4];
    }
}

#endif
