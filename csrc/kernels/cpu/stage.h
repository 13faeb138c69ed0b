// Copies the live channels of a band of input rows, with its zero padding, into a channels-last buffer. Afterwards every
// (tap column, channel) of a pixel is one contiguous run, whatever the memory format, padding or channel subset was.
// Included once per instruction set (see simd.h).

// A map of more bytes is not in L2 when a kernel begins.
constexpr int64_t kFarMap = int64_t(1) << 20;

struct Axis {
  int64_t first, step, count;  // positions first, first + step, ...; those outside [0, limit) are zero
};

static inline bool is_run(const int64_t* index, int64_t count) {
  for (int64_t i = 1; i < count; ++i)
    if (index[i] != index[0] + i) return false;
  return count > 0;
}

// Ascending channels are picked 8 or 16 at a time: one load, one compression, one store that the next one overlaps.
struct GatherPlan {
#if defined(__AVX512F__)
  static constexpr int lanes = 16;
#else
  static constexpr int lanes = 8;
#endif
  static constexpr int limit = 128;
  int count;  // 0: no plan, pick one by one
  int start[limit], taken[limit];
#if defined(__AVX512F__)
  uint16_t mask[limit];
#else
  alignas(32) int32_t order[limit][8];
#endif
};

static void plan_gather(GatherPlan& plan, const int64_t* channel, int64_t channels) {
  plan.count = 0;
#if defined(__AVX2__)
  constexpr int L = GatherPlan::lanes;
  if (channels == 0 || channel[channels - 1] < L - 1) return;
  for (int64_t i = 1; i < channels; ++i)
    if (channel[i] <= channel[i - 1]) return;
  const int64_t last = channel[channels - 1] - (L - 1);  // no vector reads past the last channel
  int count = 0;
  for (int64_t i = 0; i < channels; ++count) {
    if (count == GatherPlan::limit) return;
    const int64_t start = std::min(channel[i], last);
    int taken = 0;
#if defined(__AVX512F__)
    plan.mask[count] = 0;
    for (; i < channels && channel[i] < start + L; ++i, ++taken) plan.mask[count] |= uint16_t(1u << (channel[i] - start));
#else
    for (int l = 0; l < 8; ++l) plan.order[count][l] = 0;
    for (; i < channels && channel[i] < start + L; ++i, ++taken) plan.order[count][taken] = int32_t(channel[i] - start);
#endif
    plan.start[count] = int(start);
    plan.taken[count] = taken;
  }
  // Few channels per vector: one by one is as fast.
  if (int64_t(count) * 2 <= channels) plan.count = count;
#else
  (void)channel, (void)channels;
#endif
}

static inline void gather_pixel([[maybe_unused]] const GatherPlan& plan, [[maybe_unused]] float* dst,
                                [[maybe_unused]] const float* src) {
#if defined(__AVX2__)
  for (int i = 0; i < plan.count; ++i) {
#if defined(__AVX512F__)
    _mm512_storeu_ps(dst, _mm512_maskz_compress_ps(plan.mask[i], _mm512_loadu_ps(src + plan.start[i])));
#else
    const __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i*>(plan.order[i]));
    _mm256_storeu_ps(dst, _mm256_permutevar8x32_ps(_mm256_loadu_ps(src + plan.start[i]), order));
#endif
    dst += plan.taken[i];
  }
#endif
}

// Channels of pixels in whole vectors, the last of which also takes some of what is behind them: it is overwritten by the next
// pixel. How many pixels: none for which something behind the last one would be read or written.
template <int Bytes>
static int64_t copy_pixels(float* dst, const float* src, int64_t pixel_stride, int64_t pixels, int64_t channels, int64_t ld) {
  using V = typename Simd<float, Bytes>::reg;
  constexpr int64_t L = Simd<float, Bytes>::lanes;
  const int64_t beyond = (channels + L - 1) / L * L - channels;
  if (pixel_stride < channels) return 0;
  const int64_t step = std::min(pixel_stride, ld), whole = std::max<int64_t>(0, pixels - (beyond + step - 1) / step);
  for (int64_t p = 0; p < whole; ++p, dst += ld, src += pixel_stride) {
    for (int64_t i = 0; i < channels; i += L) store<V>(dst + i, load<V>(src + i));
    for (int64_t i = channels; i < ld; ++i) dst[i] = 0;
  }
  return whole;
}

template <class S, class T>
static void stage_row_gather(T* dst, const S* src, int64_t pixel_stride, int64_t pixels, const int64_t* channel,
                             int64_t channels, bool consecutive, const GatherPlan& plan, int64_t ld) {
  if (consecutive) {
    src += channel[0];
    if constexpr (std::is_same_v<S, T>) {
      if (pixel_stride == ld && channels == ld) {
        memcpy(dst, src, size_t(pixels * ld) * sizeof(T));
        return;
      }
    }
    int64_t done = 0;
    if constexpr (std::is_same_v<S, float> && std::is_same_v<T, float>)
      done = channels > 8   ? copy_pixels<LP_VECTOR_BYTES>(dst, src, pixel_stride, pixels, channels, ld)
             : channels > 4 ? copy_pixels<32>(dst, src, pixel_stride, pixels, channels, ld)
                            : copy_pixels<16>(dst, src, pixel_stride, pixels, channels, ld);
    for (int64_t p = done; p < pixels; ++p) {
      for (int64_t i = 0; i < channels; ++i) dst[p * ld + i] = to_acc(src[p * pixel_stride + i]);
      for (int64_t i = channels; i < ld; ++i) dst[p * ld + i] = T(0);
    }
    return;
  }
  if constexpr (std::is_same_v<S, float> && std::is_same_v<T, float>) {
    if (plan.count > 0) {
      // The last store may reach into what follows, which is written later.
      for (int64_t p = 0; p < pixels; ++p, dst += ld, src += pixel_stride) {
        gather_pixel(plan, dst, src);
        for (int64_t i = channels; i < ld; ++i) dst[i] = T(0);
      }
      return;
    }
  }
  for (int64_t p = 0; p < pixels; ++p, dst += ld, src += pixel_stride) {
    for (int64_t i = 0; i < channels; ++i) dst[i] = to_acc(src[channel[i]]);
    for (int64_t i = channels; i < ld; ++i) dst[i] = T(0);
  }
}

// Channel planes to channels-last: Lanes planes at a time, so that the stores of a pixel are contiguous.
template <int Lanes, class S, class T>
static inline void transpose_block(T* dst, const S* src, int64_t channel_stride, int64_t pixel_stride, int64_t pixels,
                                   const int64_t* channel, int64_t ld) {
  const S* plane[Lanes];
  for (int i = 0; i < Lanes; ++i) plane[i] = src + channel[i] * channel_stride;
  for (int64_t p = 0; p < pixels; ++p) {
    T value[Lanes];
    for (int i = 0; i < Lanes; ++i) value[i] = to_acc(plane[i][p * pixel_stride]);
    for (int i = 0; i < Lanes; ++i) dst[p * ld + i] = value[i];
  }
}

#if defined(__AVX2__)
// Three planes, the colours of an image, to pixels: whole vectors of them; how many.
static int64_t interleave_three(float* dst, const float* a, const float* b, const float* c, int64_t pixels) {
  using V = Simd<float, LP_VECTOR_BYTES>::reg;
  typedef int32_t Lanes __attribute__((vector_size(LP_VECTOR_BYTES)));
  constexpr int64_t L = Simd<float, LP_VECTOR_BYTES>::lanes;
  struct Masks {
    Lanes first_two[3], all[3];
  };
  static const Masks masks = [] {
    Masks m;
    for (int i = 0; i < 3 * L; ++i) {
      const int lane = i % L, pixel = i / 3, plane = i % 3;
      m.first_two[i / L][lane] = plane == 1 ? L + pixel : pixel;
      m.all[i / L][lane] = plane == 2 ? L + pixel : lane;
    }
    return m;
  }();
  int64_t p = 0;
  for (; p + L <= pixels; p += L)
    for (int i = 0; i < 3; ++i) {
      const V two = __builtin_shuffle(load<V>(a + p), load<V>(b + p), masks.first_two[i]);
      store<V>(dst + 3 * p + i * L, __builtin_shuffle(two, load<V>(c + p), masks.all[i]));
    }
  return p;
}
#endif

template <class S, class T>
static void stage_row_planes(T* dst, const S* src, int64_t channel_stride, int64_t pixel_stride, int64_t pixels,
                             const int64_t* channel, int64_t channels, int64_t ld) {
  int64_t i = 0;
#if defined(__AVX2__)
  if constexpr (std::is_same_v<S, float> && std::is_same_v<T, float>)
    if (channels == 3 && ld == 3 && pixel_stride == 1) {
      const auto plane = [&](int k) { return src + channel[k] * channel_stride; };
      const int64_t done = interleave_three(dst, plane(0), plane(1), plane(2), pixels);
      dst += done * ld;
      src += done;
      pixels -= done;
    }
#endif
  for (; i + 8 <= channels; i += 8) transpose_block<8>(dst + i, src, channel_stride, pixel_stride, pixels, channel + i, ld);
  for (; i < channels; ++i) transpose_block<1>(dst + i, src, channel_stride, pixel_stride, pixels, channel + i, ld);
  for (; i < ld; ++i)
    for (int64_t p = 0; p < pixels; ++p) dst[p * ld + i] = T(0);
}

template <class S, class T>
static void stage_band(T* dst, const S* image, const View& x, int64_t height, int64_t width, Axis row, Axis col,
                       const int64_t* channel, int64_t channels, int64_t ld) {
  const bool consecutive = is_run(channel, channels);
  GatherPlan plan;
  plan.count = 0;
  if (std::is_same_v<S, float> && x.c == 1 && !consecutive) plan_gather(plan, channel, channels);
  int64_t lo = 0, hi = col.count;
  while (lo < hi && (col.first + lo * col.step < 0 || col.first + lo * col.step >= width)) ++lo;
  while (hi > lo && (col.first + (hi - 1) * col.step < 0 || col.first + (hi - 1) * col.step >= width)) --hi;
  for (int64_t r = 0; r < row.count; ++r, dst += col.count * ld) {
    const int64_t ih = row.first + r * row.step;
    if (ih < 0 || ih >= height || channels == 0) {
      memset(dst, 0, size_t(col.count * ld) * sizeof(T));
      continue;
    }
    if (lo > 0) memset(dst, 0, size_t(lo * ld) * sizeof(T));
    const S* src = image + ih * x.h + (col.first + lo * col.step) * x.w;
    if (x.c == 1)
      stage_row_gather(dst + lo * ld, src, x.w * col.step, hi - lo, channel, channels, consecutive, plan, ld);
    else
      stage_row_planes(dst + lo * ld, src, x.c, x.w * col.step, hi - lo, channel, channels, ld);
    if (hi < col.count) memset(dst + hi * ld, 0, size_t((col.count - hi) * ld) * sizeof(T));
  }
}

// How the pixels of a convolution are cut into tasks, and where a task's pixels lie in its staged band.
struct Bands {
  int64_t images, rows;  // per task; images > 1 only when a task takes whole images
  int64_t image_blocks, row_blocks, tasks;
  int64_t staged_rows, staged_cols, pixels;  // upper bounds for one task
  int64_t pixel_step_h, pixel_step_w;        // in staged rows and columns
  int64_t source_step_h, source_step_w;      // staged row r is input row first + r * source_step_h
  int64_t min_h, min_w, extent_h, extent_w;  // of the taps
  int64_t ld;
};

static int64_t round_up(int64_t v, int64_t to) { return (v + to - 1) / to * to; }

static Bands make_bands(const TapConv& p, size_t element, int threads) {
  Bands b{};
  int64_t max_h = 0, max_w = 0, widest = 0;
  for (int t = 0; t < p.taps; ++t) {
    b.min_h = t == 0 ? p.tap_h[0] : std::min(b.min_h, p.tap_h[t]);
    b.min_w = t == 0 ? p.tap_w[0] : std::min(b.min_w, p.tap_w[t]);
    max_h = t == 0 ? p.tap_h[0] : std::max(max_h, p.tap_h[t]);
    max_w = t == 0 ? p.tap_w[0] : std::max(max_w, p.tap_w[t]);
  }
  b.extent_h = max_h - b.min_h + 1;
  b.extent_w = max_w - b.min_w + 1;
  for (int g = 0; g < p.groups; ++g) widest = std::max(widest, p.in_begin[g + 1] - p.in_begin[g]);
  b.ld = p.depthwise ? round_up(widest, kPanel) : widest;
  // A single column (or row) of taps never looks between two pixels: stage only what is read.
  const bool dense_h = b.extent_h > 1, dense_w = b.extent_w > 1;
  b.source_step_h = dense_h ? 1 : p.step_h;
  b.source_step_w = dense_w ? 1 : p.step_w;
  b.pixel_step_h = dense_h ? p.step_h : 1;
  b.pixel_step_w = dense_w ? p.step_w : 1;
  b.staged_cols = (p.cols - 1) * b.pixel_step_w + b.extent_w;
  const auto rows_for = [&](int64_t rows) { return (rows - 1) * b.pixel_step_h + b.extent_h; };
  const int64_t budget = int64_t(256 * 1024 / element);
  // A row also costs its share of the pixel table (24 bytes per pixel).
  const int64_t row_cost = b.staged_cols * std::max<int64_t>(1, b.ld) + p.cols * 24 / int64_t(element);
  const int64_t wanted_tasks = threads > 1 ? 3 * threads : 1;
  b.images = 1;
  b.rows = p.rows;
  if (rows_for(p.rows) * row_cost <= budget / 2) {
    const int64_t image_cost = rows_for(p.rows) * row_cost;
    b.images = std::min(std::min(p.n, budget / image_cost), std::max<int64_t>(1, 512 / (p.rows * p.cols)));
    b.images = std::max<int64_t>(1, std::min(b.images, p.n * p.groups / wanted_tasks));
  }
  if (b.images == 1) {
    while (b.rows > 1 && rows_for(b.rows) * row_cost > budget) b.rows = (b.rows + 1) / 2;
    while (b.rows > 1 && b.rows * p.cols > 64 && p.n * p.groups * ((p.rows + b.rows - 1) / b.rows) < wanted_tasks)
      b.rows = (b.rows + 1) / 2;
    b.row_blocks = (p.rows + b.rows - 1) / b.rows;
    if (p.n % threads != 0 && b.row_blocks > 1) b.row_blocks = std::min(p.rows, round_up(b.row_blocks, threads));
    b.rows = (p.rows + b.row_blocks - 1) / b.row_blocks;
  } else {
    b.row_blocks = 1;
  }
  b.image_blocks = (p.n + b.images - 1) / b.images;
  b.tasks = b.row_blocks * b.image_blocks * p.groups;
  b.staged_rows = rows_for(b.rows);
  b.pixels = b.images * b.rows * p.cols;
  return b;
}

static int64_t staged_elements(const Bands& b) { return b.images * b.staged_rows * b.staged_cols * b.ld; }

struct Task {
  int group;
  int64_t image0, images, row0, rows;
};

static Task task_at(const TapConv& p, const Bands& b, int64_t index) {
  Task t;
  // Groups vary slowest in the inner part, so that tasks of one image run close together.
  t.group = int(index % p.groups);
  index /= p.groups;
  t.row0 = p.rows * (index % b.row_blocks) / b.row_blocks;
  t.rows = p.rows * (index % b.row_blocks + 1) / b.row_blocks - t.row0;
  t.image0 = index / b.row_blocks * b.images;
  t.images = std::min(b.images, p.n - t.image0);
  return t;
}

template <class S, class T>
static void stage_task(T* staged, const TapConv& p, const Bands& b, const Task& t, int64_t ld) {
  const int64_t first = p.in_begin[t.group], channels = p.in_begin[t.group + 1] - first;
  const int64_t rows = (t.rows - 1) * b.pixel_step_h + b.extent_h;
  for (int64_t i = 0; i < t.images; ++i) {
    const S* image = static_cast<const S*>(p.x.data) + (t.image0 + i) * p.x.n;
    stage_band(staged + i * rows * b.staged_cols * ld, image, p.x, p.height, p.width,
               Axis{t.row0 * p.step_h + b.min_h, b.source_step_h, rows}, Axis{b.min_w, b.source_step_w, b.staged_cols},
               p.in_channel + first, channels, ld);
  }
}

// Slots of scratch that run_tasks() needs; a member of a team has its own.
static int64_t task_slots(const Env& env, int64_t tasks) { return env.member ? 1 : std::min<int64_t>(env.threads, tasks); }

// Runs body(thread slot, task) over all tasks; slots are distinct between concurrent bodies. Every slot has its share of
// neighbouring tasks, the same share of the map in every layer, so that it finds what it wrote in its own cache; then it
// helps the others.
template <class F>
static void run_tasks(const Env& env, int64_t tasks, const F& body) {
  if (env.member) return static_cast<Team::Member*>(env.member)->run(tasks, [&](int64_t task) { body(0, task); });
  constexpr int64_t limit = 64;
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  struct Context {
    const F* body;
    int64_t slots;
    Share share[limit];
  } context;
  context.body = &body;
  context.slots = std::min(std::min<int64_t>(env.threads, tasks), limit);
  for (int64_t i = 0; i < context.slots; ++i) {
    context.share[i].next.store(tasks * i / context.slots, std::memory_order_relaxed);
    context.share[i].end = tasks * (i + 1) / context.slots;
  }
  env.parallel(
      context.slots,
      [](int64_t begin, int64_t end, void* ctx) {
        auto* c = static_cast<Context*>(ctx);
        for (int64_t slot = begin; slot < end; ++slot)
          for (int64_t k = 0; k < c->slots; ++k) {
            Share& share = c->share[(slot + k) % c->slots];
            for (int64_t task; (task = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;)
              (*c->body)(int(slot), task);
          }
      },
      &context);
}

static char* aligned(char* p) { return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(p) + 63) & ~uintptr_t(63)); }
