// A run of convolutions and pools in one call: a program of steps over an arena of reused buffers. Images are independent,
// so the program runs slice by slice of the batch, and what a step wrote is still in cache when the next one reads it.
#include "segment.h"

#include <algorithm>
#include <atomic>

#include "step_scratch.h"
#include "tap_conv.h"
#include "team.h"

namespace lp {
namespace {

void run_inline(int64_t n, void (*body)(int64_t, int64_t, void*), void* ctx) {
  if (n > 0) body(0, n, ctx);
}

// body(i) for i in [0, n) on the caller's pool; the calling thread takes the first ones.
template <class F>
void in_parallel(const Env& env, int64_t n, const F& body) {
  env.parallel(
      n,
      [](int64_t begin, int64_t end, void* ctx) {
        for (int64_t i = begin; i < end; ++i) (*static_cast<const F*>(ctx))(i);
      },
      const_cast<F*>(&body));
}

View channels_last(float* data, int64_t step, int64_t h, int64_t w) { return View{data, step * h * w, 1, w * step, step}; }

struct Buffers {
  const Segment& s;
  float* arena;
  int64_t first;  // image

  View at(int64_t place, int64_t step, int64_t h, int64_t w) const {
    if (place == kFromInput) {
      View v = s.x;
      v.data = static_cast<float*>(v.data) + first * v.n;
      return v;
    }
    if (place == kToOutput) return channels_last(s.y + first * step * h * w, step, h, w);
    return channels_last(arena + place * s.header->slice, step, h, w);
  }
};

// Lanes up to the next pixel, at least to a multiple of 8, that belong to the map alone: only the arena's maps have them.
bool has_room(int64_t place, int64_t step, int64_t channels) { return place >= 0 && step >= (channels + 7) / 8 * 8; }

void run_step(const Segment& s, const SegmentStep& t, const Buffers& b, int64_t images, const Env& env) {
  const View x = b.at(t.in, t.in_step, t.height, t.width), y = b.at(t.out, t.out_step, t.out_h, t.out_w);
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
  if (t.kind == kMean) return cpu_kernels().mean_pool(MeanPool{x, y, images, t.channels, t.height, t.width}, env);
  CompactForward f{};
  f.shape = ConvShape{images,  t.channels, t.height,   t.width, t.outputs, t.kh,    t.kw,    t.out_h,
                      t.out_w, t.stride_h, t.stride_w, t.pad_h, t.pad_w,   t.dil_h, t.dil_w, t.groups};
  f.dtype = DType::f32;
  f.x = x;
  f.y = y;
  if (t.residual != kNone) f.residual = b.at(t.residual, t.residual_step, t.out_h, t.out_w);
  f.packed = s.tensor[t.weight];
  f.tile = int(t.tile);
  f.bias = t.bias == kNone ? nullptr : s.tensor[t.bias];
  f.in_index = IndexList{nullptr, t.channels};
  f.out_index = IndexList{nullptr, t.outputs};
  f.x_has_room = has_room(t.in, t.in_step, t.channels);
  f.y_has_room = has_room(t.out, t.out_step, t.outputs);
  f.residual_has_room = has_room(t.residual, t.residual_step, t.outputs);
  f.x_channels = t.channels;
  f.y_channels = t.outputs;
  f.act = Act(t.act);
  compact_forward_cpu(f, env);
}

InvertedResidual::Layer layer(const Segment& s, const SegmentStep& t) {
  return {s.tensor[t.weight], t.bias == kNone ? nullptr : s.tensor[t.bias], Act(t.act)};
}

// Steps [first, last], joined by maps inside.
void run_depth_first(const Segment& s, const SegmentStep* first, const SegmentStep* last, const Buffers& b, int64_t images,
                     const Env& env) {
  const SegmentStep& depthwise = last[-1];
  InvertedResidual p{};
  p.x = b.at(first->in, first->in_step, first->height, first->width);
  p.x_room = has_room(first->in, first->in_step, first->channels);
  p.out = b.at(last->out, last->out_step, last->out_h, last->out_w);
  if (last->residual != kNone) p.residual = b.at(last->residual, last->residual_step, last->out_h, last->out_w);
  p.out_room = has_room(last->out, last->out_step, last->outputs) &&
               (last->residual == kNone || has_room(last->residual, last->residual_step, last->outputs));
  p.n = images;
  p.inputs = first->channels;
  p.inner = depthwise.channels;
  p.outputs = last->outputs;
  p.height = depthwise.height;
  p.width = depthwise.width;
  p.rows = last->out_h;
  p.cols = last->out_w;
  p.stride = depthwise.stride_h;
  if (first != &depthwise) p.expand = layer(s, *first);
  p.depthwise = layer(s, depthwise);
  p.project = layer(s, *last);
  cpu_kernels().inverted_residual(p, env);
}

// Step i and those that it is joined with; the next one.
int64_t run_steps(const Segment& s, int64_t i, const Buffers& b, int64_t images, const Env& env) {
  const int64_t first = i;
  while (s.step[i].out == kInside) ++i;
  if (i == first)
    run_step(s, s.step[i], b, images, env);
  else
    run_depth_first(s, s.step + first, s.step + i, b, images, env);
  return i + 1;
}

}  // namespace

void run_segment_cpu(const Segment& s, const Env& env) {
  const int64_t slice = s.header->slice, slices = (s.n + slice - 1) / slice;
  // Enough slices: every thread runs whole ones, and nobody waits between steps. Else the threads share each step.
  const bool by_slices = env.threads > 1 && slices >= env.threads;
  const int64_t slots = by_slices ? env.threads : 1, per_slot = s.header->arena * slice + 16;
  float* memory = static_cast<float*>(env.alloc(env.owner, size_t(slots * per_slot) * sizeof(float)));
  const auto run_slice = [&](int64_t index, float* arena, StepScratch& scratch, const Env& inner) {
    const Buffers b{s, arena, index * slice};
    const int64_t images = std::min(slice, s.n - b.first);
    for (int64_t i = 0; i < s.header->steps;) {
      i = run_steps(s, i, b, images, inner);
      scratch.reset();
    }
  };
  std::atomic<int64_t> next{0};
  const auto alone = [&](int64_t slot) {
    StepScratch& scratch = StepScratch::of_thread();
    const Env inner = scratch.env(1, run_inline);
    for (int64_t index; (index = next.fetch_add(1, std::memory_order_relaxed)) < slices;)
      run_slice(index, memory + slot * per_slot, scratch, inner);
    scratch.trim();
  };
  if (by_slices) return in_parallel(env, slots, alone);
  if (env.threads == 1) return alone(0);
  Team team(env.threads);
  in_parallel(env, env.threads, [&](int64_t index) {
    Team::Member member(team, index);
    StepScratch& scratch = StepScratch::of_thread();
    try {
      const Env inner = scratch.env(env.threads, run_inline, &member);
      for (int64_t i = 0; i < slices; ++i) run_slice(i, memory, scratch, inner);
      scratch.trim();
    } catch (...) {
      team.abandon();
      throw;
    }
  });
}

}  // namespace lp
