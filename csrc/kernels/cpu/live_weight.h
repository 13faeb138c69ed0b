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
  env.parallel(
      outs.count,
      [](int64_t begin, int64_t end, void* ctx) {
        const Context& k = *static_cast<Context*>(ctx);
        for (int64_t o = begin; o < end; ++o) {
          const T* row = static_cast<const T*>(k.from.data) + k.outs[o] * k.from.n;
          T* out = static_cast<T*>(k.to.data) + o * k.to.n;
          const auto copy = [&](int64_t i, int64_t h, int64_t v) {
            out[i * k.to.c + h * k.to.h + v * k.to.w] = row[k.ins[i] * k.from.c + h * k.from.h + v * k.from.w];
          };
          if (k.from.c == 1) {
            for (int64_t h = 0; h < k.s.kh; ++h)
              for (int64_t v = 0; v < k.s.kw; ++v)
                for (int64_t i = 0; i < k.ins.count; ++i) copy(i, h, v);
          } else {
            for (int64_t i = 0; i < k.ins.count; ++i)
              for (int64_t h = 0; h < k.s.kh; ++h)
                for (int64_t v = 0; v < k.s.kw; ++v) copy(i, h, v);
          }
        }
      },
      &context);
}

// The gradient of the live part into that of the whole weight, every element of which is written; rows are dense.
template <class T>
void spread_weight(const Env& env, const ConvShape& s, const View& from, const IndexList& ins, const IndexList& outs, T* grad,
                   const int64_t* step) {
  int64_t* place = scratch<int64_t>(env, s.outputs);
  std::fill(place, place + s.outputs, int64_t(-1));
  for (int64_t o = 0; o < outs.count; ++o) place[outs[o]] = o;
  struct Context {
    const ConvShape& s;
    const View& from;
    const IndexList& ins;
    T* grad;
    const int64_t *step, *place;
  } context{s, from, ins, grad, step, place};
  env.parallel(
      s.outputs,
      [](int64_t begin, int64_t end, void* ctx) {
        const Context& k = *static_cast<Context*>(ctx);
        // At once, because a long run is filled without reading it first.
        const int64_t size = k.s.channels * k.s.kh * k.s.kw;
        std::memset(k.grad + begin * size, 0, size_t((end - begin) * size) * sizeof(T));
        for (int64_t o = begin; o < end; ++o) {
          if (k.place[o] < 0) continue;
          T* row = k.grad + o * size;
          const T* live = static_cast<const T*>(k.from.data) + k.place[o] * k.from.n;
          for (int64_t h = 0; h < k.s.kh; ++h)
            for (int64_t v = 0; v < k.s.kw; ++v) {
              T* to = row + h * k.step[2] + v * k.step[3];
              const T* values = live + h * k.from.h + v * k.from.w;
              for (int64_t i = 0; i < k.ins.count; ++i) to[k.ins[i] * k.step[1]] = values[i * k.from.c];
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
