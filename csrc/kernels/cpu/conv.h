// Direct convolution: register tiles over a staged channels-last band. Included once per instruction set (see simd.h).

template <class S, class T>
static void run_panels(const TapConv& p, const TileSet<T>& set, const T* weight, int64_t panel_stride, const int64_t* run_at,
                       const int64_t* run_length, int runs, const PixelTable<T>& table, int64_t pixels, int64_t first,
                       int64_t count, int64_t ld, int64_t outputs = 0) {
  T out[14 * 3 * kPanel] __attribute__((aligned(64)));
  const int64_t tiles = (pixels + set.max - 1) / set.max;
  const T* pointer[14];
  const int64_t depth = panel_stride / kPanel;
  NextPanels<T> ahead = next_panels(weight, depth, ld, outputs, tiles);
  const bool consecutive = is_run(p.out_channel + first, count);
  for (int64_t t = 0; t < tiles; ++t) {
    // Even shares instead of full tiles and a stump.
    const int64_t begin = pixels * t / tiles, size = pixels * (t + 1) / tiles - begin;
    for (int j = 0; j < 14; ++j) pointer[j] = table.in[begin + std::min<int64_t>(j, size - 1)];
    set.fn[size](pointer, run_at, run_length, runs, weight, panel_stride, ahead, out);
    ahead.at += depth * ahead.step;
    epilogue<S, T>(p, out, ld, table, begin, size, first, count, consecutive);
  }
}

template <class S>
static void conv(const TapConv& p, const Env& env) {
  using T = typename AccOf<S>::type;
  if (p.n == 0 || p.rows == 0 || p.cols == 0) return;
  if constexpr (std::is_same_v<S, float>) {
    if (is_pointwise(p)) return pointwise(p, env);
    if (is_planes(p)) return planes(p, env);
  }
  PanelOutputs to{};
  if constexpr (std::is_same_v<S, float>)
    to = panel_outputs(env, static_cast<const float*>(p.shift), p.out_begin[p.groups], p.out_room && p.groups == 1);
  const Bands b = make_bands(p, sizeof(T), env.threads);
  const int64_t staged_bytes = round_up((staged_elements(b) + 64) * int64_t(sizeof(T)), 64);
  const int64_t slot_bytes = staged_bytes + round_up(b.pixels * 24, 64) + round_up(int64_t(p.taps + 1) * 16, 64) + 64;
  // Few pixels: threads share them and split the outputs; each stages its band itself.
  int64_t widest = 0;
  for (int g = 0; g < p.groups; ++g) widest = std::max(widest, p.out_begin[g + 1] - p.out_begin[g]);
  const int64_t missing = env.threads > 1 && !p.depthwise ? (2 * env.threads + b.tasks - 1) / b.tasks : 1;
  const int64_t splits = std::max<int64_t>(1, std::min(missing, widest / (2 * kPanel)));
  const int64_t slots = task_slots(env, b.tasks * splits);
  char* scratch = aligned(static_cast<char*>(env.alloc(env.owner, size_t(slots * slot_bytes + 64))));
  const auto held = [&](int64_t slot) { return reinterpret_cast<int64_t*>(scratch + (slot + 1) * slot_bytes - 64); };
  for (int64_t slot = 0; slot < slots; ++slot) *held(slot) = -1;  // the band that is staged there
  run_tasks(env, b.tasks * splits, [&](int slot, int64_t index) {
    char* base = scratch + slot * slot_bytes;
    T* staged = reinterpret_cast<T*>(base);
    int64_t* numbers = reinterpret_cast<int64_t*>(base + staged_bytes);
    PixelTable<T> table{reinterpret_cast<const T**>(numbers), numbers + b.pixels, numbers + 2 * b.pixels};
    int64_t* run_at = reinterpret_cast<int64_t*>(base + staged_bytes + round_up(b.pixels * 24, 64));
    int64_t* run_length = run_at + p.taps + 1;
    const Task t = task_at(p, b, index / splits);
    const int64_t inputs = p.in_begin[t.group + 1] - p.in_begin[t.group];
    const int64_t in_group = p.out_begin[t.group + 1] - p.out_begin[t.group], panels = (in_group + kPanel - 1) / kPanel;
    const int64_t begin = index % splits * panels / splits * kPanel;
    const int64_t first = p.out_begin[t.group] + begin;
    const int64_t outputs = std::min(in_group, (index % splits + 1) * panels / splits * kPanel) - begin;
    if (outputs <= 0) return;
    const int64_t ld = p.depthwise ? round_up(inputs, kPanel) : inputs;
    // A 1x1 convolution of an unpadded channels-last input reads in place.
    const int64_t* channel = p.in_channel + p.in_begin[t.group];
    bool in_place = std::is_same_v<S, T> && !p.depthwise && p.taps == 1 && p.x.c == 1 && inputs > 0 && p.tap_h[0] >= 0 &&
                    p.tap_w[0] >= 0 && (p.rows - 1) * p.step_h + p.tap_h[0] < p.height &&
                    (p.cols - 1) * p.step_w + p.tap_w[0] < p.width && is_run(channel, inputs);
    if (!in_place && *held(slot) != index / splits) {
      stage_task<S, T>(staged, p, b, t, ld);
      *held(slot) = index / splits;
    }
    const int64_t staged_rows = (t.rows - 1) * b.pixel_step_h + b.extent_h;
    // Long rows of a channels-last output: equally spaced pixels need no table, and the epilogue stays in registers.
    const bool by_rows = std::is_same_v<S, float> && !in_place && !p.depthwise && p.taps > 0 && p.cols >= 12 && !p.scale &&
                         p.out.c == 1 && (!p.residual.data || p.residual.c == 1) && is_run(p.out_channel + first, outputs);
    int64_t pixels = 0;
    for (int64_t i = 0; i < t.images && !by_rows; ++i)
      for (int64_t r = 0; r < t.rows; ++r)
        for (int64_t c = 0; c < p.cols; ++c, ++pixels) {
          const int64_t n = t.image0 + i, row = t.row0 + r;
          table.in[pixels] = in_place
                                 ? reinterpret_cast<const T*>(p.x.data) + n * p.x.n + (row * p.step_h + p.tap_h[0]) * p.x.h +
                                       (c * p.step_w + p.tap_w[0]) * p.x.w + channel[0]
                                 : staged + ((i * staged_rows + r * b.pixel_step_h) * b.staged_cols + c * b.pixel_step_w) * ld;
          table.out[pixels] = n * p.out.n + row * p.out.h + c * p.out.w;
          table.residual[pixels] = n * p.residual.n + row * p.residual.h + c * p.residual.w;
        }
    const T* weight = static_cast<const T*>(p.weight) + p.weight_begin[t.group] + begin * p.taps * inputs;
    int runs = 0;
    for (int k = 0; k < p.taps; ++k) {
      const int64_t at = ((p.tap_h[k] - b.min_h) * b.staged_cols + p.tap_w[k] - b.min_w) * ld;
      if (!p.depthwise && runs > 0 && run_at[runs - 1] + run_length[runs - 1] == at) {
        run_length[runs - 1] += ld;
      } else {
        run_at[runs] = at;
        run_length[runs++] = ld;
      }
    }
    if constexpr (std::is_same_v<S, float>) {
      if (by_rows) {
        PointwiseTile tile{};
        tile.ldx = b.pixel_step_w * ld;
        tile.ldy = p.out.w;
        tile.ldr = p.residual.w;
        tile.runs = runs;
        tile.run_at = run_at;
        tile.run_length = run_length;
        tile.bounds = clamp_of(p.act);
        // The last outputs of all take the spare lanes with them.
        const int64_t stored = first + outputs == p.out_begin[p.groups] ? to.count - first : outputs;
        const float* shift = to.shift ? to.shift + first : nullptr;
        float* out = static_cast<float*>(p.out.data) + p.out_channel[first];
        const auto at = [&](int64_t line, PointwiseTile& q) {
          const int64_t i = line / t.rows, r = line % t.rows, n = t.image0 + i, row = t.row0 + r;
          q.x = staged + (i * staged_rows + r * b.pixel_step_h) * b.staged_cols * ld;
          q.y = out + n * p.out.n + row * p.out.h;
          if (p.residual.data)
            q.residual =
                static_cast<const float*>(p.residual.data) + p.out_channel[first] + n * p.residual.n + row * p.residual.h;
        };
        const int64_t lines = t.images * t.rows;
        pointwise_panels(tile, weight, shift, int64_t(p.taps) * inputs, stored, lines, p.cols, at);
        if (!tile.bounds.complete)
          for (int64_t line = 0; line < lines; ++line) {
            at(line, tile);
            activate_rows(p.act, tile.y, tile.ldy, p.cols, outputs);
          }
        return;
      }
    }
    if (p.depthwise) {
      for (int64_t o = 0; o < outputs; o += kPanel) {
        run_panels<S, T>(p, depthwise_tiles<T>(), weight + o, ld, run_at, run_length, runs, table, pixels, first + o,
                         std::min(kPanel, outputs - o), kPanel);
        for (int64_t j = 0; j < pixels; ++j) table.in[j] += kPanel;
      }
      return;
    }
    const int64_t depth = int64_t(p.taps) * inputs, rest = outputs % kPanel;
    const int64_t full = outputs / kPanel + (rest > 8);
    for (int64_t panel = 0; panel < full;) {
      int64_t take = 1;
      const TileSet<T>* set = &tiles<T, 16, 1>();
      if constexpr (LP_REGISTERS == 32 && sizeof(T) == 4) {
        if (full - panel == 3) {
          take = 3;
          set = &tiles<T, 16, 3>();
        } else if (full - panel >= 2) {
          take = 2;
          set = &tiles<T, 16, 2>();
        }
      }
      const int64_t o = panel * kPanel;
      run_panels<S, T>(p, *set, weight + o * depth, kPanel * depth, run_at, run_length, runs, table, pixels, first + o,
                       std::min(take * kPanel, outputs - o), take * kPanel, outputs);
      panel += take;
    }
    if (rest > 0 && rest <= 8) {
      const int64_t o = outputs - rest;
      run_panels<S, T>(p, tiles<T, 8, 1>(), weight + o * depth, 0, run_at, run_length, runs, table, pixels, first + o, rest, 8);
    }
  });
}
