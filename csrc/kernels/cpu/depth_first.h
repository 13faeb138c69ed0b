// Inverted residuals (Sandler et al. 2018) depth first: 1x1 to many channels, depthwise 3x3, 1x1 to few. The wide maps between
// are never whole: a few rows at a time go through all three layers and stay in the cache. The first layer may be missing.
// Included once per instruction set (see simd.h).

// Pixels of the output that go through together, at least: in whole pairs of rows.
constexpr int64_t kStripPixels = 56;

static void inverted_residual(const InvertedResidual& p, const Env& env) {
  const int64_t channels = round_up(p.inner, 8), step = round_up(p.inner, kPanel);
  const bool expand = p.expand.weight != nullptr;
  const int64_t strip = round_up(std::min(p.rows, (kStripPixels + p.cols - 1) / p.cols), 2);
  const int64_t ring_rows = expand ? (strip - 1) * p.stride + 3 : 0, ring_row = (p.width + 2) * step;
  const int64_t slot_floats = ring_rows * ring_row + strip * p.cols * step;
  const int64_t bands = std::min(p.rows, std::max<int64_t>(1, env.threads / std::max<int64_t>(1, p.n)));
  const int64_t tasks = p.n * bands, slots = task_slots(env, tasks);
  // Without expanded rows of its own the input must have room for whole vectors.
  const int64_t wide = expand || p.x_room ? channels : p.inner;
  const DepthwiseWeights w = depthwise_weights(env, p.depthwise.weight, p.depthwise.shift, 9, p.inner, wide);
  const int64_t row_floats = expand ? ring_row : (p.width - 1) * p.x.w + wide;
  float* zeros = static_cast<float*>(env.alloc(env.owner, size_t(row_floats) * 4));
  memset(zeros, 0, size_t(row_floats) * 4);
  float* scratch = static_cast<float*>(env.alloc(env.owner, size_t(slots * slot_floats) * 4));
  const Clamp expand_bounds = clamp_of(p.expand.act), bounds = clamp_of(p.depthwise.act), last_bounds = clamp_of(p.project.act);
  const PanelOutputs inner_to = panel_outputs(env, p.expand.shift, p.inner, true);
  const PanelOutputs to = panel_outputs(env, p.project.shift, p.outputs, p.out_room);
  const int64_t one = 0;
  run_tasks(env, tasks, [&](int slot, int64_t index) {
    const int64_t n = index / bands, band = index % bands;
    float *ring = scratch + slot * slot_floats, *inner = ring + ring_rows * ring_row;
    // Columns of padding: no window is cut off at the sides.
    for (int64_t i = 0; i < ring_rows; ++i) {
      memset(ring + i * ring_row, 0, size_t(step) * 4);
      memset(ring + (i + 1) * ring_row - step, 0, size_t(step) * 4);
    }
    const float* x = static_cast<const float*>(p.x.data) + n * p.x.n;
    DepthwiseRow r{};
    r.pad = expand ? 0 : 1;
    r.width = expand ? p.width + 2 : p.width;
    r.step = expand ? step : p.x.w;
    r.cols = p.cols;
    r.weight = w.weight;
    r.tap_stride = wide;
    r.shift = w.shift;
    r.out_step = step;
    r.out_row = p.cols * step;
    r.bounds = bounds;
    r.part = wide;
    PointwiseTile first{};
    first.ldx = p.x.w;
    first.ldy = step;
    first.runs = 1;
    first.run_at = &one;
    first.run_length = &p.inputs;
    first.bounds = expand_bounds;
    first.near = true;
    PointwiseTile last{};
    last.ldx = step;
    last.ldy = p.out.w;
    last.ldr = p.residual.w;
    last.runs = 1;
    last.run_at = &one;
    last.run_length = &p.inner;
    last.bounds = last_bounds;
    const int64_t end = p.rows * (band + 1) / bands;
    int64_t next = 0;  // row of the input that has not been expanded yet
    for (int64_t row = p.rows * band / bands; row < end; row += strip) {
      const int64_t rows = std::min(strip, end - row);
      if (expand) {
        const int64_t begin = std::max(next, row * p.stride - 1), stop = std::min(p.height, (row + rows - 1) * p.stride + 2);
        next = stop;
        pointwise_panels(first, p.expand.weight, inner_to.shift, p.inputs, inner_to.count, stop - begin, p.width,
                         [&](int64_t line, PointwiseTile& t) {
                           t.x = x + (begin + line) * p.x.h;
                           t.y = ring + (begin + line) % ring_rows * ring_row + step;
                         });
        if (!expand_bounds.complete)
          for (int64_t h = begin; h < stop; ++h)
            activate_rows(p.expand.act, ring + h % ring_rows * ring_row + step, step, p.width, p.inner);
      }
      for (int64_t done = 0; done < rows;) {
        const int some = rows - done >= kDepthwiseRows ? kDepthwiseRows : 1;
        for (int64_t i = 0; i < (some - 1) * p.stride + 3; ++i) {
          const int64_t h = (row + done) * p.stride - 1 + i;
          const bool inside = h >= 0 && h < p.height;
          r.in[i] = !inside ? zeros : expand ? ring + h % ring_rows * ring_row : x + h * p.x.h;
        }
        r.out = inner + done * r.out_row;
        depthwise_rows(r, 3, p.stride, some, wide, Ahead::none);
        done += some;
      }
      if (!bounds.complete) activate_rows(p.depthwise.act, inner, step, rows * p.cols, p.inner);
      float* y = static_cast<float*>(p.out.data) + n * p.out.n + row * p.out.h;
      const float* residual = static_cast<const float*>(p.residual.data);
      if (residual) residual += n * p.residual.n + row * p.residual.h;
      pointwise_panels(last, p.project.weight, to.shift, p.inner, to.count, 1, rows * p.cols, [&](int64_t, PointwiseTile& t) {
        t.x = inner;
        t.y = y;
        t.residual = residual;
      });
      if (!last_bounds.complete) activate_rows(p.project.act, y, p.out.w, rows * p.cols, p.outputs);
    }
  });
}
