// A run of convolutions and max-pools in one call: a program of steps over an arena of reused buffers. Images are independent,
// so the program runs slice by slice of the batch, and what a step wrote is still in cache when the next one reads it.
#include "segment.h"

#include <algorithm>
#include <atomic>

#include "step_scratch.h"
#include "tap_conv.h"

namespace lp {
namespace {

void run_inline(int64_t n, void (*body)(int64_t, int64_t, void*), void* ctx) {
  if (n > 0) body(0, n, ctx);
}

View dense(float* data, int64_t c, int64_t h, int64_t w) { return View{data, c * h * w, 1, w * c, c}; }

struct Buffers {
  const Segment& s;
  float* arena;
  int64_t first;  // image

  View at(int64_t place, int64_t c, int64_t h, int64_t w) const {
    if (place == kFromInput) {
      View v = s.x;
      v.data = static_cast<float*>(v.data) + first * v.n;
      return v;
    }
    if (place == kToOutput) return dense(s.y + first * c * h * w, c, h, w);
    return dense(arena + place * s.header->slice, c, h, w);
  }
};

void run_step(const Segment& s, const SegmentStep& t, const Buffers& b, int64_t images, const Env& env) {
  const View x = b.at(t.in, t.channels, t.height, t.width), y = b.at(t.out, t.outputs, t.out_h, t.out_w);
  if (t.kind == kMaxPool) {
    const MaxPool p{static_cast<const float*>(x.data),
                    static_cast<float*>(y.data),
                    images,
                    t.channels,
                    t.height,
                    t.width,
                    t.kh,
                    t.kw,
                    t.stride_h,
                    t.stride_w,
                    t.pad_h,
                    t.pad_w,
                    t.out_h,
                    t.out_w};
    cpu_kernels().max_pool(p, env);
    return;
  }
  CompactForward f{};
  f.shape = ConvShape{images,  t.channels, t.height,   t.width, t.outputs, t.kh,    t.kw,    t.out_h,
                      t.out_w, t.stride_h, t.stride_w, t.pad_h, t.pad_w,   t.dil_h, t.dil_w, t.groups};
  f.dtype = DType::f32;
  f.x = x;
  f.y = y;
  if (t.residual != kNone) f.residual = b.at(t.residual, t.outputs, t.out_h, t.out_w);
  f.packed = s.tensor[t.weight];
  f.tile = int(t.tile);
  f.bias = t.bias == kNone ? nullptr : s.tensor[t.bias];
  f.in_index = IndexList{nullptr, t.channels};
  f.out_index = IndexList{nullptr, t.outputs};
  f.x_channels = t.channels;
  f.y_channels = t.outputs;
  f.act = Act(t.act);
  compact_forward_cpu(f, env);
}

}  // namespace

void run_segment_cpu(const Segment& s, const Env& env) {
  const int64_t slice = s.header->slice, slices = (s.n + slice - 1) / slice;
  // Enough slices: every thread runs whole ones, and nobody waits between steps.
  const bool by_slices = env.threads > 1 && slices >= env.threads;
  const int64_t slots = by_slices ? env.threads : 1, per_slot = s.header->arena * slice + 16;
  float* memory = static_cast<float*>(env.alloc(env.owner, size_t(slots * per_slot) * sizeof(float)));
  struct Context {
    const Segment& s;
    const Env& env;
    float* memory;
    int64_t per_slot, slices;
    bool by_slices;
    std::atomic<int64_t> next;
  } context{s, env, memory, per_slot, slices, by_slices, {0}};
  const auto body = [](int64_t begin, int64_t end, void* ctx) {
    Context& c = *static_cast<Context*>(ctx);
    StepScratch& scratch = StepScratch::of_thread();
    const Env inner = scratch.env(c.by_slices ? 1 : c.env.threads, c.by_slices ? run_inline : c.env.parallel);
    const int64_t slice = c.s.header->slice;
    for (int64_t slot = begin; slot < end; ++slot)
      for (int64_t task; (task = c.next.fetch_add(1, std::memory_order_relaxed)) < c.slices;) {
        const Buffers b{c.s, c.memory + slot * c.per_slot, task * slice};
        const int64_t images = std::min(slice, c.s.n - b.first);
        for (int64_t i = 0; i < c.s.header->steps; ++i) {
          run_step(c.s, c.s.step[i], b, images, inner);
          scratch.reset();
        }
      }
    scratch.trim();
  };
  if (by_slices)
    env.parallel(slots, body, &context);
  else
    body(0, 1, &context);
}

}  // namespace lp
