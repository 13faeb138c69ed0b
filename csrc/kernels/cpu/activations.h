// Activations and their derivatives, of one value or of a vector of them: float and double. Included once per instruction set
// (see simd.h).

template <class V, bool = std::is_arithmetic_v<V>>
struct LaneOf {
  using type = V;
};
template <class V>
struct LaneOf<V, false> {
  using type = ScalarOf<V>;
};

// f(lane) for every lane.
template <class V, class F>
static inline V each_lane(V v, const F& f) {
  if constexpr (std::is_arithmetic_v<V>) {
    return f(v);
  } else {
    for (size_t i = 0; i < sizeof(V) / sizeof(v[0]); ++i) v[i] = f(v[i]);
    return v;
  }
}

// 2^n for whole n in the range of normal floats.
template <class V>
static inline __attribute__((always_inline)) V power_of_two(V n) {
  if constexpr (std::is_arithmetic_v<V>) {
    const int32_t bits = (int32_t(n) + 127) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return scale;
  } else {
    using I = typename Simd<int32_t, sizeof(V)>::reg;
    return V((__builtin_convertvector(n, I) + 127) << 23);
  }
}

// e^x to about 1 ulp (Cody-Waite reduction, degree 6); beyond the range of floats as at its ends.
template <class V>
static inline __attribute__((always_inline)) V exp_acc(V x) {
  if constexpr (std::is_same_v<typename LaneOf<V>::type, double>) {
    return each_lane(x, [](double lane) { return std::exp(lane); });
  } else {
    const V low = V{} - 87.0f, high = V{} + 88.0f, magic = V{} + 12582912.0f;
    x = x > low ? x : low;  // also where x is NaN
    x = x < high ? x : high;
    const V n = (x * 1.44269504f + magic) - magic;
    const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    V p = V{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * power_of_two(n);
  }
}

template <class V>
static inline V sigmoid(V v) {
  using T = typename LaneOf<V>::type;
  return v == v ? T(1) / (T(1) + exp_acc(-v)) : v;
}

// The normal distribution: its density, and the integral up to x. For floats that integral is t P(t) e^(-x^2/2) beyond |x|,
// with t = 1 / (1 + 0.45 |x| / sqrt(2)) and P of degree 9 fitted to the scaled complementary error function (relative error of
// the fit 3e-8; of the result about 1e-6 down to x = -5).
template <class V>
struct Normal {
  V density, integral;
};
template <class V>
static inline __attribute__((always_inline)) Normal<V> normal(V x) {
  using T = typename LaneOf<V>::type;
  const V bell = exp_acc(x * x * T(-0.5));
  const V density = bell * T(0.39894228040143267794);
  if constexpr (std::is_same_v<T, double>) {
    const V root = x * T(-0.70710678118654752440);
    return {density, each_lane(root, [](double lane) { return 0.5 * std::erfc(lane); })};
  } else {
    const V zero = V{}, one = V{} + 1.0f;
    const V t = one / (one + (x < zero ? -x : x) * 0.31819805153394640f);
    V p = V{} + -4.1480821976844370e-2f;
    p = p * t + 1.9107806894596780e-1f;
    p = p * t + -3.0129168314416890e-1f;
    p = p * t + 1.4310002379968267e-1f;
    p = p * t + -2.2763557510607768e-2f;
    p = p * t + 1.2009115646266011e-1f;
    p = p * t + 1.7522379365697166e-1f;
    p = p * t + 2.2827469084818322e-1f;
    p = p * t + 2.5388301576346184e-1f;
    p = p * t + 2.5388532280887240e-1f;
    const V beyond = p * t * bell * 0.5f;
    return {density, x < zero ? beyond : one - beyond};
  }
}

template <Act A, class V>
static inline __attribute__((always_inline)) V activate(V v) {
  using T = typename LaneOf<V>::type;
  const V zero = V{}, six = V{} + T(6);
  if constexpr (A == Act::relu) return v < zero ? zero : v;  // NaN passes through
  if constexpr (A == Act::relu6) return v < zero ? zero : (v > six ? six : v);
  if constexpr (A == Act::silu) return v * sigmoid(v);
  if constexpr (A == Act::hardswish) {
    const V u = v + T(3);
    return v * (u < zero ? zero : (u > six ? six : u)) * T(1.0 / 6.0);
  }
  if constexpr (A == Act::gelu) return v * (v == v ? normal(v).integral : v);
  if constexpr (A == Act::sigmoid) return sigmoid(v);
  return v;
}

// Derivative of the activation at `s`: the output for relu, relu6 and sigmoid, else the value before the activation.
template <Act A, class V>
static inline __attribute__((always_inline)) V activate_grad(V s) {
  using T = typename LaneOf<V>::type;
  const V zero = V{}, one = V{} + T(1);
  if constexpr (A == Act::relu) return s > zero ? one : zero;
  if constexpr (A == Act::relu6) return s > zero ? (s < V{} + T(6) ? one : zero) : zero;
  if constexpr (A == Act::silu) {
    const V g = sigmoid(s);
    return g * (one + s * (one - g));
  }
  if constexpr (A == Act::hardswish) {
    const V three = V{} + T(3);
    return s < -three ? zero : (s < three ? s * T(1.0 / 3.0) + T(0.5) : one);
  }
  if constexpr (A == Act::gelu) {
    const Normal<V> n = normal(s);
    return n.integral + s * n.density;
  }
  if constexpr (A == Act::sigmoid) return s * (one - s);
  return one;
}

// Calls f(integral constant) with the run-time activation.
template <class F>
static inline void with_act(Act act, F&& f) {
  switch (act) {
    case Act::relu:
      return f(std::integral_constant<Act, Act::relu>());
    case Act::relu6:
      return f(std::integral_constant<Act, Act::relu6>());
    case Act::silu:
      return f(std::integral_constant<Act, Act::silu>());
    case Act::hardswish:
      return f(std::integral_constant<Act, Act::hardswish>());
    case Act::gelu:
      return f(std::integral_constant<Act, Act::gelu>());
    case Act::sigmoid:
      return f(std::integral_constant<Act, Act::sigmoid>());
    default:
      return f(std::integral_constant<Act, Act::none>());
  }
}

// The activation over `pixels` rows of `count` consecutive channels.
template <class T>
static void activate_rows(Act act, T* y, int64_t ld, int64_t pixels, int64_t count) {
  with_act(act, [&](auto a) {
    using V = typename Simd<T, LP_VECTOR_BYTES>::reg;
    constexpr int64_t L = Simd<T, LP_VECTOR_BYTES>::lanes;
    if constexpr (decltype(a)::value != Act::none)
      for (int64_t j = 0; j < pixels; ++j, y += ld)
        for (int64_t o = 0; o < count; o += L) {
          const int64_t lanes = std::min(L, count - o);
          store_part<V>(y + o, activate<decltype(a)::value>(load_part<V>(y + o, lanes)), lanes);
        }
  });
}
