// Batch normalisation with gate, residual sum and activation: partial sums per block, their combination, one pass that writes.
// No atomics; sums are added in an order that only the shape and the number of multiprocessors decide.
#pragma once
#include "batch_norm.h"
#include "simt.h"

namespace lp {
namespace cuda {

// Activation known when compiled, or (`any`) read from the parameters.
enum class NormAct : int { none = 0, relu = 1, any = 2 };

template <class S, int V>
struct alignas(V * sizeof(typename S::Element)) NormVector {
  typename S::Element e[V];
};

// Not converted yet: nothing waits for the values until all that are on their way have been asked for.
template <class S, int V>
LP_DEVICE NormVector<S, V> norm_read(const void* map, int64_t offset, int count) {
  const auto* from = static_cast<const typename S::Element*>(map) + offset;
  NormVector<S, V> x{};
  if (count == V) {
    x = *reinterpret_cast<const NormVector<S, V>*>(from);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (i < count) x.e[i] = from[i];
  }
  return x;
}

template <class S, int V>
LP_DEVICE void norm_write(void* map, int64_t offset, int count, const typename NormSum<S>::type* v) {
  auto* to = static_cast<typename S::Element*>(map) + offset;
  NormVector<S, V> y;
#pragma unroll
  for (int i = 0; i < V; ++i) y.e[i] = S::save(v[i]);
  if (count == V) {
    *reinterpret_cast<NormVector<S, V>*>(to) = y;
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (i < count) to[i] = y.e[i];
  }
}

// What a thread works on: one column of a range of lines.
template <int V, bool LAST>
struct NormThread {
  int64_t column, line, begin, end;
  int part, column_of_block, row;
  bool active;

  LP_DEVICE explicit NormThread(const NormPlan& l) {
    const int t = simt::thread();
    part = simt::block_x() % l.parts;
    column_of_block = t % l.width;
    row = t / l.width;
    column = int64_t(simt::block_x() / l.parts) * l.width + column_of_block;
    active = row < l.rows && column < l.columns;
    begin = l.begin(part);
    end = l.end(part);
    line = begin + row;
  }
};

// A block's channels, computed once and kept in shared memory as [lane][column]; then a thread's own, in registers.
template <class A, int LANES, bool SLOPES>
struct NormParameters {
  A mean[LANES], scale[LANES], shift[LANES], constant[SLOPES ? LANES : 1], linear[SLOPES ? LANES : 1];
  unsigned alive = 0;

  LP_DEVICE void load(const BatchNorm& p, const NormPlan& l, const A* slopes) {
    A* table = reinterpret_cast<A*>(simt::shared());
    constexpr int kFields = SLOPES ? 6 : 4;
    const int64_t first = int64_t(simt::block_x() / l.parts) * l.width;
    const int places = l.width * LANES;
    for (int i = simt::thread(); i < places; i += kNormThreads) {
      const int column = i / LANES, lane = i % LANES;
      if (first + column >= l.columns) continue;
      const NormChannel<A> c = norm_channel<A>(p, ((first + column) * LANES + lane) % l.channels, slopes);
      A* to = table + lane * l.width + column;
      to[0] = c.mean, to[places] = c.scale, to[2 * places] = c.shift, to[3 * places] = c.alive ? A(1) : A(0);
      if (kFields == 6) to[4 * places] = c.constant, to[5 * places] = c.linear;
    }
    simt::sync_block();
    const int column = simt::thread() % l.width;
#pragma unroll
    for (int i = 0; i < LANES; ++i) {
      const A* from = table + i * l.width + column;
      mean[i] = from[0], scale[i] = from[places], shift[i] = from[2 * places];
      alive |= unsigned(from[3 * places] != A(0)) << i;
      if constexpr (SLOPES) constant[i] = from[4 * places], linear[i] = from[5 * places];
    }
  }
};

constexpr int norm_table_bytes(int width, int lanes, int fields, int sum_bytes) { return width * lanes * fields * sum_bytes; }

// Adds two sums per lane over the rows of a block and writes them as partial[part][2][places].
template <class A, int V, bool LAST>
LP_DEVICE void norm_write_sums(const NormPlan& l, const NormThread<V, LAST>& at, const A (&first)[V], const A (&second)[V],
                               A* partial) {
  constexpr int kLanes = LAST ? V : 1;
  const int t = simt::thread();
  A* table = reinterpret_cast<A*>(simt::shared());  // [2][lane][thread]
  simt::sync_block();                               // its memory held parameters
  A sums[2][kLanes] = {};
#pragma unroll
  for (int i = 0; i < V; ++i) sums[0][LAST ? i : 0] += first[i], sums[1][LAST ? i : 0] += second[i];
#pragma unroll
  for (int i = 0; i < 2 * kLanes; ++i) table[i * kNormThreads + t] = sums[i / kLanes][i % kLanes];
  int half = 1;
  while (half < l.rows) half *= 2;
  for (half /= 2; half > 0; half /= 2) {
    simt::sync_block();
    if (at.row < half && at.row + half < l.rows)
#pragma unroll
      for (int i = 0; i < 2 * kLanes; ++i) table[i * kNormThreads + t] += table[i * kNormThreads + t + half * l.width];
  }
  if (!at.active || at.row > 0) return;
#pragma unroll
  for (int i = 0; i < 2 * kLanes; ++i)
    partial[(int64_t(at.part) * 2 + i / kLanes) * l.places + at.column * kLanes + i % kLanes] = table[i * kNormThreads + t];
}

// Sums of (x - pivot) and its square; the pivot is the first value of the place in this part, so that a large mean does not
// cancel the variance.
template <class S, int V, bool LAST>
LP_DEVICE void norm_moments(const BatchNorm& p, const NormPlan& l, typename NormSum<S>::type* partial) {
  using A = typename NormSum<S>::type;
  constexpr int kUnroll = 4;
  const NormThread<V, LAST> at(l);
  A s[V] = {}, q[V] = {};
  if (at.active) {
    const int64_t first = norm_offset<V, LAST>(l, at.begin, at.column);
    const NormVector<S, V> pivot = norm_read<S, V>(p.x, first, norm_count<V, LAST>(l, first));
    for (int64_t line = at.line; line < at.end; line += int64_t(kUnroll) * l.rows) {
      NormVector<S, V> x[kUnroll];
      int count[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t row = line + int64_t(u) * l.rows, offset = norm_offset<V, LAST>(l, row, at.column);
        count[u] = row < at.end ? norm_count<V, LAST>(l, offset) : 0;
        x[u] = norm_read<S, V>(p.x, offset, count[u]);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const A d = i < count[u] ? S::load(x[u].e[i]) - S::load(pivot.e[LAST ? i : 0]) : A(0);
          s[i] += d;
          q[i] += d * d;
        }
    }
  }
  norm_write_sums<A, V, LAST>(l, at, s, q, partial);
}

template <NormAct ACT, class A>
LP_DEVICE A norm_activate(const BatchNorm& p, A z) {
  if constexpr (ACT == NormAct::none) return z;
  if constexpr (ACT == NormAct::relu) return activate(Act::relu, z);
  return activate(p.act, z);
}

// g = dy * act'(z)
template <NormAct ACT, class A>
LP_DEVICE A norm_activation_grad(const BatchNorm& p, A z, A dy) {
  if constexpr (ACT == NormAct::none) return dy;
  if constexpr (ACT == NormAct::relu) return z > A(0) ? dy : A(0);
  if (p.act == Act::none) return dy;
  if (p.act == Act::relu) return z > A(0) ? dy : A(0);
  return dy * activate_grad(p.act, p.act == Act::relu6 || p.act == Act::sigmoid ? activate(p.act, z) : z);
}

// y of every element.
template <class S, int V, bool LAST, NormAct ACT>
LP_DEVICE void norm_apply(const BatchNorm& p, const NormPlan& l) {
  using A = typename NormSum<S>::type;
  constexpr int kUnroll = 2;
  const NormThread<V, LAST> at(l);
  NormParameters<A, LAST ? V : 1, false> c;
  c.load(p, l, nullptr);
  if (!at.active) return;
  for (int64_t line = at.line; line < at.end; line += int64_t(kUnroll) * l.rows) {
    NormVector<S, V> x[kUnroll], add[kUnroll];
    int64_t offset[kUnroll];
    int count[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t row = line + int64_t(u) * l.rows;
      offset[u] = norm_offset<V, LAST>(l, row, at.column);
      count[u] = row < at.end ? norm_count<V, LAST>(l, offset[u]) : 0;
      x[u] = norm_read<S, V>(p.x, offset[u], count[u]);
      if (p.residual) add[u] = norm_read<S, V>(p.residual, offset[u], count[u]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      A y[V];
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int k = LAST ? i : 0;
        A z = (c.alive >> k & 1 ? S::load(x[u].e[i]) - c.mean[k] : A(0)) * c.scale[k] + c.shift[k];
        if (p.residual) z += S::load(add[u].e[i]);
        y[i] = norm_activate<ACT>(p, z);
      }
      if (count[u] > 0) norm_write<S, V>(p.y, offset[u], count[u], y);
    }
  }
}

// WRITE == false: partial sums of g and g * (x - mean). WRITE == true: the gradients of x and of the residual.
template <class S, int V, bool LAST, NormAct ACT, bool WRITE>
LP_DEVICE void norm_backward(const BatchNorm& p, const NormPlan& l, const typename NormSum<S>::type* slopes,
                             typename NormSum<S>::type* partial) {
  using A = typename NormSum<S>::type;
  constexpr int kUnroll = 2;
  const NormThread<V, LAST> at(l);
  NormParameters<A, LAST ? V : 1, WRITE> c;
  c.load(p, l, WRITE ? slopes : nullptr);
  A s1[V] = {}, s2[V] = {};
  const bool add = ACT != NormAct::none && p.residual;
  for (int64_t line = at.line; at.active && line < at.end; line += int64_t(kUnroll) * l.rows) {
    NormVector<S, V> x[kUnroll], dy[kUnroll], residual[kUnroll];
    int64_t offset[kUnroll];
    int count[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t row = line + int64_t(u) * l.rows;
      offset[u] = norm_offset<V, LAST>(l, row, at.column);
      count[u] = row < at.end ? norm_count<V, LAST>(l, offset[u]) : 0;
      x[u] = norm_read<S, V>(p.x, offset[u], count[u]);
      dy[u] = norm_read<S, V>(p.grad_y, offset[u], count[u]);
      if (add) residual[u] = norm_read<S, V>(p.residual, offset[u], count[u]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      A g[V], grad_x[WRITE ? V : 1];
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int k = LAST ? i : 0;
        const bool alive = c.alive >> k & 1;
        const A d = alive ? S::load(x[u].e[i]) - c.mean[k] : A(0);
        g[i] = S::load(dy[u].e[i]);
        if constexpr (ACT != NormAct::none) {
          A z = d * c.scale[k] + c.shift[k];
          if (add) z += S::load(residual[u].e[i]);
          g[i] = norm_activation_grad<ACT>(p, z, g[i]);
        }
        if constexpr (WRITE) {
          const A dx = c.scale[k] * g[i] - (c.constant[k] + c.linear[k] * d);
          grad_x[i] = alive ? dx : A(0);
        } else {
          const A value = i < count[u] ? g[i] : A(0);
          s1[i] += value;
          s2[i] += value * d;
        }
      }
      if constexpr (WRITE) {
        if (p.grad_x && count[u] > 0) norm_write<S, V>(p.grad_x, offset[u], count[u], grad_x);
        if (p.grad_residual && count[u] > 0) norm_write<S, V>(p.grad_residual, offset[u], count[u], g);
      }
    }
  }
  if constexpr (!WRITE) norm_write_sums<A, V, LAST>(l, at, s1, s2, partial);
}

// Adds the parts of eight channels per block, in float64: a channel's lanes take every 32nd part, then add up as a tree.
// Forward: writes mean and var. Backward: the gradients of the vectors, and per channel of the maps the two slopes.
template <class S, int V, bool LAST, bool FORWARD>
LP_DEVICE void norm_combine(const BatchNorm& p, const NormPlan& l, const typename NormSum<S>::type* partial,
                            typename NormSum<S>::type* slopes) {
  using A = typename NormSum<S>::type;
  using E = typename S::Element;
  const int t = simt::thread(), lane = t / kCombineChannels;
  const int64_t c = int64_t(simt::block_x()) * kCombineChannels + t % kCombineChannels;
  const E* x = static_cast<const E*>(p.x);
  double first = 0, second = 0, origin = 0;
  if (c < l.channels) {
    if (FORWARD) origin = double(S::load(x[norm_pivot<V, LAST>(l, 0, c)]));
    for (int64_t i = lane; i < l.parts * l.repeat; i += kCombineLanes) {
      const int64_t part = i / l.repeat, place = i % l.repeat * l.channels + c;
      const int64_t values = FORWARD ? norm_values<V, LAST>(l, part, place) : 1;
      if (values == 0) continue;
      const double a = partial[part * 2 * l.places + place], b = partial[(part * 2 + 1) * l.places + place];
      // About one origin for all parts.
      const double move = FORWARD ? double(S::load(x[norm_pivot<V, LAST>(l, part, place)])) - origin : 0.0;
      first += a + double(values) * move;
      second += b + (2 * a + double(values) * move) * move;
    }
  }
  double* table = reinterpret_cast<double*>(simt::shared());  // [2][thread]
  table[t] = first, table[kNormThreads + t] = second;
  for (int half = kCombineLanes / 2; half > 0; half /= 2) {
    simt::sync_block();
    if (lane < half) {
      table[t] += table[t + half * kCombineChannels];
      table[kNormThreads + t] += table[kNormThreads + t + half * kCombineChannels];
    }
  }
  if (lane > 0 || c >= l.channels) return;
  first = table[t], second = table[kNormThreads + t];
  const double count = double(p.n * p.pixels);
  const int64_t at = norm_place(p, c);
  if (FORWARD) {
    if (at < 0) return;
    const double mean = first / count, var = second / count - mean * mean;
    static_cast<A*>(p.mean)[at] = A(origin + mean);
    static_cast<A*>(p.var)[at] = A(var < 0 ? 0 : var);  // NaN stays
    return;
  }
  slopes[c] = slopes[l.channels + c] = A(0);
  if (at < 0) return;
  const double rstd = 1 / sqrt(double(static_cast<const A*>(p.var)[at]) + p.eps);
  const double gate = vector_at<A>(p.gate, at, A(1)), weight = vector_at<A>(p.weight, at, A(1));
  if (p.grad_weight) static_cast<A*>(p.grad_weight)[at] = A(gate * second * rstd);
  if (p.grad_bias) static_cast<A*>(p.grad_bias)[at] = A(gate * first);
  if (p.grad_gate)
    static_cast<A*>(p.grad_gate)[at] = A(weight * second * rstd + double(vector_at<A>(p.bias, at, A(0))) * first);
  if (!p.training) return;
  const double scale = gate * weight * rstd / count;
  slopes[c] = A(scale * first);
  slopes[l.channels + c] = A(scale * rstd * rstd * second);
}

// Shared memory of the kernels, bytes.
inline int norm_sums_bytes(const NormPlan& l, int lanes, int sum_bytes, bool last) {
  const int own = last ? lanes : 1;
  return int(larger(2 * own * kNormThreads * sum_bytes, norm_table_bytes(l.width, own, 4, sum_bytes)));
}
inline int norm_apply_bytes(const NormPlan& l, int lanes, int sum_bytes, bool last, bool slopes) {
  return norm_table_bytes(l.width, last ? lanes : 1, slopes ? 6 : 4, sum_bytes);
}
constexpr int kCombineBytes = 2 * kNormThreads * int(sizeof(double));

}  // namespace cuda
}  // namespace lp
