// Maximum over windows of dense channels-last maps. Included once per instruction set (see simd.h).

template <class V>
static inline V larger(V best, V v) {
  return (v > best) | (v != v) ? v : best;  // NaN wins
}

static void max_pool(const MaxPool& p, const Env& env) {
  const int64_t C = p.channels;
  run_tasks(env, p.n * p.out_h, [&](int, int64_t index) {
    const int64_t n = index / p.out_h, row = index % p.out_h, h0 = row * p.stride_h - p.pad_h;
    const int64_t top = std::max<int64_t>(0, h0), bottom = std::min(p.height, h0 + p.kh);
    const float* image = p.x + n * p.height * p.width * C;
    float* y = p.y + index * p.out_w * C;
    const auto run = [&](auto zero) __attribute__((always_inline)) {
      using V = decltype(zero);
      constexpr int64_t L = sizeof(V) / 4;
      for (int64_t col = 0; col < p.out_w; ++col, y += C) {
        const int64_t w0 = col * p.stride_w - p.pad_w;
        const int64_t left = std::max<int64_t>(0, w0), right = std::min(p.width, w0 + p.kw);
        for (int64_t block = 0; block < C; block += L) {
          const int64_t c = std::min(block, C - L);  // the last vector overlaps the one before
          const float* line = image + (top * p.width + left) * C + c;
          V best = load<V>(line);
          for (int64_t h = top; h < bottom; ++h, line += p.width * C)
            for (int64_t w = 0; w < right - left; ++w) best = larger(best, load<V>(line + w * C));
          store<V>(y + c, best);
        }
      }
    };
    using Wide = Simd<float, LP_VECTOR_BYTES>::reg;
    if (C * 4 >= LP_VECTOR_BYTES)
      run(Wide{});
    else if (C >= 4)
      run(Simd<float, 16>::reg{});
    else
      run(Simd<float, 4>::reg{});
  });
}
