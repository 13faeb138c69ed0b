// Batch normalisation with gate, residual sum and activation: two passes forward, two backward. The value before the
// activation is computed again in the backward pass, so nothing but the input is kept. Included once per instruction set.

// A matrix of `lines` by `length`: pixels by channels (channels last, parameters along the line) or planes by pixels
// (contiguous, one parameter per line). Tasks take whole lines. Channels last, a line is as many pixels as fill whole vectors,
// so that few or odd channels cost no idle lanes; the parameters are repeated along it.
template <class T>
struct NormLayout {
  bool last;
  int64_t lines, length, channels, repeat, per_task, tasks, parts;  // parts: partial sums per place
  int64_t places;                                                   // of parameters: along the line, or one per channel
};

constexpr int64_t kNormWide = LP_REGISTERS == 32 ? 4 : 2;  // vectors of a wide column

// Pixels per line: the fewest whose channels fill wide columns, or at least vectors, if the pixels divide into them.
template <class T>
static int64_t pixels_per_line(int64_t pixels, int64_t channels) {
  constexpr int64_t L = Simd<T, LP_VECTOR_BYTES>::lanes, longest = 8192;
  for (const int64_t width : {kNormWide * L, L})
    for (int64_t k = 1; k <= width && k * channels <= longest; k *= 2)
      if (k * channels % width == 0 && pixels % k == 0) return k;
  return 1;
}

template <class T>
static NormLayout<T> norm_layout(const BatchNorm& p) {
  NormLayout<T> l{};
  l.last = p.channels_last;
  l.channels = p.channels;
  l.repeat = p.channels_last && p.channels > 0 ? pixels_per_line<T>(p.n * p.pixels, p.channels) : 1;
  l.lines = p.channels_last ? p.n * p.pixels / l.repeat : p.n * p.channels;
  l.length = p.channels_last ? p.channels * l.repeat : p.pixels;
  l.places = p.channels_last ? l.length : p.channels;
  const int64_t bytes = std::max<int64_t>(1, l.length) * int64_t(sizeof(T));
  l.per_task = std::max<int64_t>(p.channels_last ? 16 : 1, std::min<int64_t>(512, (128 << 10) / bytes));
  l.tasks = (l.lines + l.per_task - 1) / l.per_task;
  l.parts = p.channels_last ? l.tasks : p.n;
  return l;
}

// Per place, as vectors read them.
template <class T>
struct NormTables {
  T *mean, *scale, *shift, *linear,
      *constant;  // z = (x - mean) * scale + shift; dx = scale * g - constant - linear * (x - mean)
  T* alive;       // all bits or none; nullptr: all channels live
};

template <class V>
static inline V keep_bits(V v, V bits) {
  using I = typename Simd<std::conditional_t<sizeof(ScalarOf<V>) == 4, int32_t, int64_t>, sizeof(V)>::reg;
  return V(I(v) & I(bits));
}

// g = dy * act'(z)
template <Act A, class V>
static inline V activation_grad(V z, V dy) {
  if constexpr (A == Act::none) return dy;
  if constexpr (A == Act::relu) return z > V{} ? dy : V{};
  return dy * activate_grad<A>(A == Act::relu6 || A == Act::sigmoid ? activate<A>(z) : z);
}

// Vectors of one column of the layout: full ones, or the first `count` lanes.
template <class T, int NV, bool Part>
struct NormColumn {
  using V = typename Simd<T, LP_VECTOR_BYTES>::reg;
  static constexpr int L = Simd<T, LP_VECTOR_BYTES>::lanes;
  int64_t count;
  V read(const T* p, int v) const { return Part ? load_part<V>(p + v * L, count) : load<V>(p + v * L); }
  void write(T* p, int v, V value) const { Part ? store_part<V>(p + v * L, value, count) : store<V>(p + v * L, value); }
};

// Covers lines [begin, end) with columns: body(column, channel offset, first element, rows, elements from row to row). A
// column's rows share their parameters; a plane is cut into rows as wide as the widest column.
template <class T, class Body>
static inline void norm_columns(const NormLayout<T>& l, int64_t begin, int64_t end, Body&& body) {
  constexpr int64_t L = Simd<T, LP_VECTOR_BYTES>::lanes, wide = kNormWide;
  int64_t at = 0;
  if (l.last) {
    const int64_t from = begin * l.length, rows = end - begin;
    for (; at + wide * L <= l.length; at += wide * L) body(NormColumn<T, int(wide), false>{L}, at, from + at, rows, l.length);
    for (; at + L <= l.length; at += L) body(NormColumn<T, 1, false>{L}, at, from + at, rows, l.length);
    if (at < l.length) body(NormColumn<T, 1, true>{l.length - at}, at, from + at, rows, l.length);
    return;
  }
  for (int64_t line = begin; line < end; ++line) {
    const int64_t from = line * l.length, rows = l.length / (wide * L);
    at = rows * wide * L;
    if (rows > 0) body(NormColumn<T, int(wide), false>{L}, 0, from, rows, wide * L);
    const int64_t rest = (l.length - at) / L;
    if (rest > 0) body(NormColumn<T, 1, false>{L}, 0, from + at, rest, L);
    at += rest * L;
    if (at < l.length) body(NormColumn<T, 1, true>{l.length - at}, 0, from + at, 1, L);
  }
}

template <class T, int NV, bool Part>
constexpr int column_vectors(const NormColumn<T, NV, Part>&) {
  return NV;
}

// A column's parameters in registers.
template <class T, class C, bool Masked>
struct NormParameters {
  using V = typename C::V;
  static constexpr int NV = column_vectors(C{});
  const C& column;
  int64_t at;  // of the column in the tables
  bool last;
  V bits[NV] = {};

  NormParameters(const C& column, const NormLayout<T>& l, const NormTables<T>& t, int64_t at, int64_t channel)
      : column(column), at(l.last ? at : channel), last(l.last) {
    if (Masked && last)
      for (int v = 0; v < NV; ++v) bits[v] = column.read(t.alive + at, v);
  }
  // Along the line, or one value for it.
  void load(const T* table, V* to) const {
    for (int v = 0; v < NV; ++v) to[v] = last ? column.read(table + at, v) : V{} + table[at];
  }
  V keep(V value, int v) const { return Masked && last ? keep_bits(value, bits[v]) : value; }
  // Two sums of the column, per place; a plane's columns add up to one.
  void write_sums(const NormLayout<T>& l, double* out, const V* first, const V* second) const {
    for (int v = 0; v < NV; ++v)
      for (int64_t i = 0; i < column.count; ++i) {
        const int64_t to = last ? at + v * C::L + i : at;
        out[to] = (last ? 0 : out[to]) + double(first[v][i]);
        out[l.places + to] = (last ? 0 : out[l.places + to]) + double(second[v][i]);
      }
  }
};

// Both sums of one channel over the tasks and the pixels of a line.
template <class T>
static void channel_sums(const NormLayout<T>& l, const double* sums, int64_t channel, double& first, double& second) {
  first = second = 0;
  for (int64_t part = 0; part < l.parts; ++part)
    for (int64_t r = 0; r < l.repeat; ++r) {
      first += sums[part * 2 * l.places + r * l.channels + channel];
      second += sums[(part * 2 + 1) * l.places + r * l.channels + channel];
    }
}

// Runs body(column, at, begin, end, table offset) over the tasks: lines [begin, end) that share their parameters.
template <class T, class Body>
static void norm_tasks(const NormLayout<T>& l, const Env& env, const Body& body) {
  run_tasks(env, l.tasks, [&](int, int64_t task) {
    const int64_t begin = task * l.per_task, end = std::min(l.lines, begin + l.per_task);
    if (l.last) return body(task, begin, end, int64_t(0));
    for (int64_t line = begin; line < end; ++line) body(line / l.channels, line, line + 1, line % l.channels);
  });
}

template <class T>
static bool line_is_dead(const NormLayout<T>& l, const NormTables<T>& t, int64_t channel) {
  T zero = T(0);
  return !l.last && t.alive && memcmp(t.alive + channel, &zero, sizeof(T)) == 0;
}

// sums[part][2][places]: of (x - pivot) and of its square.
template <class T, bool Masked>
static void norm_moments(const BatchNorm& p, const NormLayout<T>& l, const NormTables<T>& t, const T* pivot, double* sums,
                         const Env& env) {
  const T* x = static_cast<const T*>(p.x);
  norm_tasks(l, env, [&](int64_t part, int64_t begin, int64_t end, int64_t channel) {
    double* out = sums + part * 2 * l.places;
    if (!l.last) out[channel] = out[l.places + channel] = 0;
    if (line_is_dead(l, t, channel)) return;
    norm_columns<T>(l, begin, end, [&](const auto& column, int64_t at, int64_t from, int64_t rows, int64_t stride) {
      using C = std::decay_t<decltype(column)>;
      using V = typename C::V;
      constexpr int NV = column_vectors(C{});
      const NormParameters<T, C, Masked> parameters(column, l, t, at, channel);
      V m[NV], s[NV] = {}, q[NV] = {};
      parameters.load(pivot, m);
      for (const T* row = x + from; rows > 0; --rows, row += stride)
        for (int v = 0; v < NV; ++v) {
          const V d = parameters.keep(column.read(row, v) - m[v], v);
          s[v] += d;
          q[v] += d * d;
        }
      parameters.write_sums(l, out, s, q);
    });
  });
}

template <class T, Act A, bool Masked>
static void norm_forward(const BatchNorm& p, const NormLayout<T>& l, const NormTables<T>& t, const Env& env) {
  const T *x = static_cast<const T*>(p.x), *residual = static_cast<const T*>(p.residual);
  T* y = static_cast<T*>(p.y);
  norm_tasks(l, env, [&](int64_t, int64_t begin, int64_t end, int64_t channel) {
    const bool dead = line_is_dead(l, t, channel);
    norm_columns<T>(l, begin, end, [&](const auto& column, int64_t at, int64_t from, int64_t rows, int64_t stride) {
      using C = std::decay_t<decltype(column)>;
      using V = typename C::V;
      constexpr int NV = column_vectors(C{});
      const NormParameters<T, C, Masked> parameters(column, l, t, at, channel);
      V m[NV], s[NV], b[NV];
      parameters.load(t.mean, m);
      parameters.load(t.scale, s);
      parameters.load(t.shift, b);
      for (; rows > 0; --rows, from += stride) {
        for (int v = 0; v < NV; ++v) {
          V z = parameters.keep(dead ? V{} : column.read(x + from, v) - m[v], v);
          z = z * s[v] + b[v];
          if (residual) z += column.read(residual + from, v);
          column.write(y + from, v, activate<A>(z));
        }
      }
    });
  });
}

// Pass == 1: sums[part][2][places] of g and g * (x - mean). Pass == 2: the gradients of x and of the residual.
template <class T, Act A, bool Masked, int Pass>
static void norm_backward(const BatchNorm& p, const NormLayout<T>& l, const NormTables<T>& t, double* sums, const Env& env) {
  const T *x = static_cast<const T*>(p.x), *residual = static_cast<const T*>(p.residual);
  const T* dy = static_cast<const T*>(p.grad_y);
  T *grad_x = static_cast<T*>(p.grad_x), *grad_residual = static_cast<T*>(p.grad_residual);
  norm_tasks(l, env, [&](int64_t part, int64_t begin, int64_t end, int64_t channel) {
    double* out = Pass == 1 ? sums + part * 2 * l.places : nullptr;
    if (Pass == 1 && !l.last) out[channel] = out[l.places + channel] = 0;
    const bool dead = line_is_dead(l, t, channel);
    if (Pass == 1 && dead) return;
    norm_columns<T>(l, begin, end, [&](const auto& column, int64_t at, int64_t from, int64_t rows, int64_t stride) {
      using C = std::decay_t<decltype(column)>;
      using V = typename C::V;
      constexpr int NV = column_vectors(C{});
      const NormParameters<T, C, Masked> parameters(column, l, t, at, channel);
      V m[NV], s[NV], b[NV], k[NV] = {}, c0[NV] = {}, s1[NV] = {}, s2[NV] = {};
      parameters.load(t.mean, m);
      parameters.load(t.scale, s);
      parameters.load(t.shift, b);
      if (Pass == 2) {
        parameters.load(t.linear, k);
        parameters.load(t.constant, c0);
      }
      for (; rows > 0; --rows, from += stride) {
        for (int v = 0; v < NV; ++v) {
          const V d = parameters.keep(dead ? V{} : column.read(x + from, v) - m[v], v);
          V g = column.read(dy + from, v);
          if constexpr (A != Act::none) {
            V z = d * s[v] + b[v];
            if (residual) z += column.read(residual + from, v);
            g = activation_grad<A>(z, g);
          }
          if constexpr (Pass == 1) {
            g = parameters.keep(g, v);
            s1[v] += g;
            s2[v] += g * d;
          } else {
            if (grad_residual) column.write(grad_residual + from, v, g);
            if (grad_x) {
              V dx = parameters.keep(s[v] * g - (c0[v] + k[v] * d), v);
              if (dead) dx = V{};
              column.write(grad_x + from, v, dx);
            }
          }
        }
      }
      if constexpr (Pass == 1) parameters.write_sums(l, out, s1, s2);
    });
  });
}

template <class T>
static T value_or(const void* p, int64_t c, T otherwise) {
  return p ? static_cast<const T*>(p)[c] : otherwise;
}

// Where channel c of the maps is in the vectors.
static inline int64_t norm_place(const BatchNorm& p, int64_t c) { return p.place ? p.place[c] : c; }

template <class T>
static NormTables<T> norm_tables(const BatchNorm& p, const NormLayout<T>& l, const Env& env) {
  const int64_t c = l.places;
  T* block = static_cast<T*>(env.alloc(env.owner, size_t(6 * c + 1) * sizeof(T)));
  NormTables<T> t{block, block + c, block + 2 * c, block + 3 * c, block + 4 * c, nullptr};
  if (p.live.count < p.channels) {
    t.alive = block + 5 * c;
    memset(t.alive, 0, size_t(c) * sizeof(T));
    for (int64_t r = 0; r < l.repeat; ++r)
      for (int64_t i = 0; i < p.live.count; ++i) memset(t.alive + r * p.channels + p.live[i], 0xff, sizeof(T));
  }
  memset(block, 0, size_t(5 * c) * sizeof(T));
  return t;
}

// The first pixel's values to the others of a line.
template <class T>
static void repeat_table(const NormLayout<T>& l, T* table) {
  for (int64_t r = 1; r < l.repeat; ++r) memcpy(table + r * l.channels, table, size_t(l.channels) * sizeof(T));
}

// Scale and shift of the live channels from their moments; zero for the others.
template <class T>
static void fill_norm_tables(const BatchNorm& p, const NormLayout<T>& l, NormTables<T>& t) {
  for (int64_t i = 0; i < p.live.count; ++i) {
    const int64_t c = p.live[i], at = norm_place(p, c);
    const T gate = value_or<T>(p.gate, at, T(1)), weight = value_or<T>(p.weight, at, T(1));
    t.mean[c] = static_cast<const T*>(p.mean)[at];
    t.scale[c] = T(gate * weight / std::sqrt(double(static_cast<const T*>(p.var)[at]) + p.eps));
    t.shift[c] = gate * value_or<T>(p.bias, at, T(0));
  }
  for (T* table : {t.mean, t.scale, t.shift}) repeat_table(l, table);
}

template <class T>
static void batch_norm_forward(const BatchNorm& p, const Env& env) {
  const NormLayout<T> l = norm_layout<T>(p);
  NormTables<T> t = norm_tables<T>(p, l, env);
  const int64_t count = p.n * p.pixels;
  if (p.training && count > 0) {
    // About the first value of each channel, so that a large mean does not cancel the variance.
    T* pivot = static_cast<T*>(env.alloc(env.owner, size_t(l.places) * sizeof(T)));
    memset(pivot, 0, size_t(l.places) * sizeof(T));
    for (int64_t i = 0; i < p.live.count; ++i)
      pivot[p.live[i]] = static_cast<const T*>(p.x)[p.live[i] * (l.last ? 1 : p.pixels)];
    repeat_table(l, pivot);
    double* sums = static_cast<double*>(env.alloc(env.owner, size_t(l.parts * 2 * l.places) * sizeof(double)));
    t.alive ? norm_moments<T, true>(p, l, t, pivot, sums, env) : norm_moments<T, false>(p, l, t, pivot, sums, env);
    for (int64_t i = 0; i < p.live.count; ++i) {
      const int64_t c = p.live[i], at = norm_place(p, c);
      double s, q;
      channel_sums(l, sums, c, s, q);
      s /= double(count);
      static_cast<T*>(p.mean)[at] = T(double(pivot[c]) + s);
      const double var = q / double(count) - s * s;
      static_cast<T*>(p.var)[at] = T(var < 0 ? 0 : var);
    }
  }
  fill_norm_tables(p, l, t);
  with_act(p.act, [&](auto act) {
    constexpr Act A = decltype(act)::value;
    t.alive ? norm_forward<T, A, true>(p, l, t, env) : norm_forward<T, A, false>(p, l, t, env);
  });
}

template <class T>
static void batch_norm_backward(const BatchNorm& p, const Env& env) {
  const NormLayout<T> l = norm_layout<T>(p);
  NormTables<T> t = norm_tables<T>(p, l, env);
  const int64_t count = p.n * p.pixels;
  fill_norm_tables(p, l, t);
  double* sums = static_cast<double*>(env.alloc(env.owner, size_t(l.parts * 2 * l.places + 1) * sizeof(double)));
  with_act(p.act, [&](auto act) {
    constexpr Act A = decltype(act)::value;
    const bool wants_sums = p.training || p.grad_weight || p.grad_bias || p.grad_gate;
    if (wants_sums) {
      t.alive ? norm_backward<T, A, true, 1>(p, l, t, sums, env) : norm_backward<T, A, false, 1>(p, l, t, sums, env);
      for (int64_t i = 0; i < p.live.count; ++i) {
        const int64_t c = p.live[i], at = norm_place(p, c);
        double s1, s2;
        channel_sums(l, sums, c, s1, s2);
        const double rstd = 1 / std::sqrt(double(static_cast<const T*>(p.var)[at]) + p.eps);
        const double gate = value_or<T>(p.gate, at, T(1)), weight = value_or<T>(p.weight, at, T(1));
        const double bias = value_or<T>(p.bias, at, T(0));
        if (p.grad_weight) static_cast<T*>(p.grad_weight)[at] = T(gate * s2 * rstd);
        if (p.grad_bias) static_cast<T*>(p.grad_bias)[at] = T(gate * s1);
        if (p.grad_gate) static_cast<T*>(p.grad_gate)[at] = T(weight * s2 * rstd + bias * s1);
        if (p.training && count > 0) {
          const double scale = gate * weight * rstd / double(count);
          t.constant[c] = T(scale * s1);
          t.linear[c] = T(scale * rstd * rstd * s2);
        }
      }
      repeat_table(l, t.constant);
      repeat_table(l, t.linear);
    }
    if (p.grad_x || p.grad_residual)
      t.alive ? norm_backward<T, A, true, 2>(p, l, t, sums, env) : norm_backward<T, A, false, 2>(p, l, t, sums, env);
  });
}
