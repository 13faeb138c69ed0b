// A convolution of maps of live channels only is the dense convolution of a smaller weight: its live rows and columns are
// copied side by side, row by row, so that packing does not jump through the large one; gradients are spread the same way.
#pragma once
#include "driver.h"

namespace lp {

// The live part of a weight in the weight's own format. Rows of channels are a little longer than a power of two: strides of
// one fall into one cache set.
inline View live_view(const ConvShape& s, const View& w, int64_t inputs) {
  const int64_t taps = s.kh * s.kw, ld = inputs % 64 == 0 ? inputs + 16 : inputs;
  if (w.c == 1) return View{nullptr, taps * ld, 1, s.kw * ld, ld};
  return View{nullptr, inputs * taps, taps, s.kw, 1};
}

// The live columns of one row, with strides of a channel and of a tap on both sides.
template <class T>
void gather_row(const ConvShape& s, const IndexList& ins, const T* from, const View& f, T* to, const View& t) {
  const int64_t count = ins.count, step = f.c, out_step = t.c;
  for (int64_t h = 0; h < s.kh; ++h)
    for (int64_t v = 0; v < s.kw; ++v) {
      const T* __restrict src = from + h * f.h + v * f.w;
      T* __restrict dst = to + h * t.h + v * t.w;
      if (step == 1 && out_step == 1)
        for (int64_t i = 0; i < count; ++i) dst[i] = src[ins[i]];
      else
        for (int64_t i = 0; i < count; ++i) dst[i * out_step] = src[ins[i] * step];
    }
}

template <class T>
void spread_row(const ConvShape& s, const IndexList& ins, const T* from, const View& f, T* to, const int64_t* step) {
  const int64_t count = ins.count, in_step = f.c, out_step = step[1];
  for (int64_t h = 0; h < s.kh; ++h)
    for (int64_t v = 0; v < s.kw; ++v) {
      const T* __restrict src = from + h * f.h + v * f.w;
      T* __restrict dst = to + h * step[2] + v * step[3];
      if (in_step == 1 && out_step == 1)
        for (int64_t i = 0; i < count; ++i) dst[ins[i]] = src[i];
      else
        for (int64_t i = 0; i < count; ++i) dst[ins[i] * out_step] = src[i * in_step];
    }
}

// By vectors, where both sides are rows of channels and the CPU can; else false.
template <class T>
bool copied_by_vectors(const Env& env, const ConvShape& s, bool gather, const void* whole, const int64_t* step,
                       const View& block, const IndexList& ins, const IndexList& outs) {
  const int64_t taps = s.kh * s.kw;
  const bool rows = step[1] == 1 && step[3] == s.channels && step[2] == s.kw * s.channels && step[0] == taps * s.channels &&
                    block.c == 1 && block.h == s.kw * block.w;
  if (!std::is_same_v<T, float> || !rows || s.channels < 16) return false;
  float* const w = static_cast<float*>(const_cast<void*>(whole));  // gathering only reads it
  const LiveRows p{gather, w, static_cast<float*>(block.data), taps, s.channels, block.n, block.w, outs, ins};
  return level().live_rows(p, env);
}

// Copies the live part of `w` to `to`.
template <class T>
void gather_weight(const Env& env, const ConvShape& s, const View& w, const View& to, const IndexList& ins,
                   const IndexList& outs) {
  struct Context {
    const ConvShape& s;
    const View& from;
    View to;
    const IndexList &ins, &outs;
  } context{s, w, to, ins, outs};
  const int64_t step[4] = {w.n, w.c, w.h, w.w};
  if (copied_by_vectors<T>(env, s, true, w.data, step, to, ins, outs)) return;
  env.parallel(
      outs.count,
      [](int64_t begin, int64_t end, void* ctx) {
        const Context& k = *static_cast<Context*>(ctx);
        for (int64_t o = begin; o < end; ++o)
          gather_row(k.s, k.ins, static_cast<const T*>(k.from.data) + k.outs[o] * k.from.n, k.from,
                     static_cast<T*>(k.to.data) + o * k.to.n, k.to);
      },
      &context);
}

// The live part into a whole tensor, whose rows are dense: zeros beside it in the rows that live and, with `clear`, in all
// others, which else are left alone.
template <class T>
void spread_weight(const Env& env, const ConvShape& s, const View& from, const IndexList& ins, const IndexList& outs, T* grad,
                   const int64_t* step, bool clear = true) {
  // Rows by vectors, unless so few elements live among zeros that writing them one by one is less work.
  const bool many = !clear || outs.count * ins.count * 8 >= s.outputs * s.channels;
  const bool copied = many && copied_by_vectors<T>(env, s, false, grad, step, from, ins, outs);
  if (copied && !clear) return;
  int64_t* place = scratch<int64_t>(env, s.outputs);
  std::fill(place, place + s.outputs, int64_t(-1));
  for (int64_t o = 0; o < outs.count; ++o) place[outs[o]] = o;
  struct Context {
    const ConvShape& s;
    const View& from;
    const IndexList& ins;
    T* grad;
    const int64_t *step, *place;
    bool copied, clear;
  } context{s, from, ins, grad, step, place, copied, clear};
  env.parallel(
      s.outputs,
      [](int64_t begin, int64_t end, void* ctx) {
        const Context& k = *static_cast<Context*>(ctx);
        const int64_t size = k.s.channels * k.s.kh * k.s.kw;
        const auto fill = [&](int64_t first, int64_t last) {
          std::memset(k.grad + first * size, 0, size_t((last - first) * size) * sizeof(T));
        };
        // At once, because a long run is filled without reading it first.
        if (!k.copied && k.clear) fill(begin, end);
        for (int64_t o = begin; o < end; ++o) {
          const bool lives = k.place[o] >= 0;
          if (k.copied && !lives) {
            int64_t last = o + 1;
            while (last < end && k.place[last] < 0) ++last;
            fill(o, last);
            o = last - 1;
          } else if (!k.copied && lives) {
            if (!k.clear) fill(o, o + 1);
            spread_row(k.s, k.ins, static_cast<const T*>(k.from.data) + k.place[o] * k.from.n, k.from, k.grad + o * size,
                       k.step);
          }
        }
      },
      &context);
}

// values[live[i]] for all i; nullptr stays nullptr.
template <class T>
const T* live_values(const Env& env, const void* values, const IndexList& live) {
  if (!values) return nullptr;
  T* found = scratch<T>(env, live.count);
  for (int64_t i = 0; i < live.count; ++i) found[i] = static_cast<const T*>(values)[live[i]];
  return found;
}

// The same problem over the live part; `problem` is a MaskedForward or a MaskedBackward.
template <class T, class Problem>
Problem live_problem(const Env& env, const Problem& problem) {
  Problem p = problem;
  p.compact_maps = false;
  p.shape.channels = problem.live_in.count;
  p.shape.outputs = problem.live_out.count;
  p.live_in = IndexList{nullptr, problem.live_in.count};
  p.live_out = IndexList{nullptr, problem.live_out.count};
  p.weight = live_view(problem.shape, problem.weight, problem.live_in.count);
  p.weight.data = scratch<T>(env, problem.live_out.count * p.weight.n);
  gather_weight<T>(env, problem.shape, problem.weight, p.weight, problem.live_in, problem.live_out);
  p.bias = live_values<T>(env, problem.bias, problem.live_out);
  p.gate = live_values<T>(env, problem.gate, problem.live_out);
  p.in_gate = live_values<T>(env, problem.in_gate, problem.live_in);
  return p;
}

template <class T>
void* zero_values(const Env& env, const void* wanted, int64_t count) {
  if (!wanted) return nullptr;
  T* found = scratch<T>(env, count);
  std::memset(found, 0, size_t(count) * sizeof(T));
  return found;
}

template <class T>
void spread_values(void* to, const void* from, const IndexList& live) {
  for (int64_t i = 0; to && i < live.count; ++i) static_cast<T*>(to)[live[i]] = static_cast<const T*>(from)[i];
}

// Runs backward(live problem) and spreads its gradients.
template <class T, class Backward>
void live_backward(const MaskedBackward& f, const Env& env, Backward&& backward) {
  MaskedBackward p = live_problem<T>(env, f);
  View grad = live_view(f.shape, f.weight, f.live_in.count);
  if (f.grad_weight) {
    p.grad_weight = grad.data = zero_values<T>(env, f.grad_weight, f.live_out.count * grad.n);
    const int64_t steps[4] = {grad.n, grad.c, grad.h, grad.w};
    std::copy(steps, steps + 4, p.grad_weight_strides);
  }
  p.grad_bias = zero_values<T>(env, f.grad_bias, f.live_out.count);
  p.grad_gate = zero_values<T>(env, f.grad_gate, f.live_out.count);
  p.grad_in_gate = zero_values<T>(env, f.grad_in_gate, f.live_in.count);
  backward(p);
  if (f.grad_weight)
    spread_weight<T>(env, f.shape, grad, f.live_in, f.live_out, static_cast<T*>(f.grad_weight), f.grad_weight_strides);
  spread_values<T>(f.grad_bias, p.grad_bias, f.live_out);
  spread_values<T>(f.grad_gate, p.grad_gate, f.live_out);
  spread_values<T>(f.grad_in_gate, p.grad_in_gate, f.live_in);
}

}  // namespace lp
