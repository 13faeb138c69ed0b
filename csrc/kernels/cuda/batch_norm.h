// How batch normalisation divides a map among blocks and threads, and what a channel's values mean. Free of CUDA calls, so
// that a test runs the same arithmetic on the host.
#pragma once
#include <initializer_list>

#include "conv_problems.h"
#include "storage.h"

namespace lp {
namespace cuda {

template <class S>
struct NormSum {
  using type = float;
};
template <>
struct NormSum<F64> {
  using type = double;
};

constexpr int kNormThreads = 256, kNormColumns = 64, kNormBlocksPerProcessor = 4;
constexpr int kNormLeastSteps = 8;  // of a thread: fewer would leave more partial sums than they save time
constexpr int kCombineChannels = 8, kCombineLanes = kNormThreads / kCombineChannels;

// A map as lines of 16-byte vectors. Channels last, a line is as many pixels as fill whole vectors, whatever the number of
// channels: neighbouring threads read neighbouring vectors, and the last line may be cut off. Contiguous, a line is one
// vector of one channel. Blocks take `width` columns of a range of lines, `rows` lines at a time.
struct NormPlan {
  int64_t lines, length, total;  // length: elements of a line (channels last), or vectors of a plane
  int64_t channels, repeat;      // repeat: pixels of a line
  int64_t columns, places;       // places: sums per part
  int width, rows, slabs, parts;
  int64_t lines_per_part;

  LP_HD int64_t begin(int64_t part) const { return part * lines_per_part; }
  LP_HD int64_t end(int64_t part) const {
    const int64_t e = begin(part) + lines_per_part;
    return e < lines ? e : lines;
  }
};

LP_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
LP_HD int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
LP_HD int64_t share_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// `lanes`: elements of a vector; contiguous maps need planes of whole ones.
inline NormPlan norm_plan(const BatchNorm& p, int lanes, int processors) {
  NormPlan l{};
  l.channels = p.channels;
  l.repeat = 1;
  l.total = p.n * p.pixels * p.channels;
  if (p.channels_last) {
    while (l.repeat * p.channels % lanes) l.repeat *= 2;
    l.length = l.repeat * p.channels;
    l.lines = share_of(l.total, l.length);
    l.columns = l.length / lanes;
    l.places = l.length;
    l.slabs = int(share_of(l.columns, kNormColumns));
  } else {
    l.length = p.pixels / lanes;
    l.lines = p.n * l.length;
    l.columns = l.places = p.channels;
    l.slabs = int(p.channels);
  }
  l.width = int(share_of(l.columns, l.slabs));
  l.rows = kNormThreads / l.width;
  const int64_t most = share_of(int64_t(processors) * kNormBlocksPerProcessor, l.slabs);
  const int64_t parts = larger(1, smaller(most, share_of(l.lines, int64_t(l.rows) * kNormLeastSteps)));
  l.lines_per_part = share_of(share_of(l.lines, parts), l.rows) * l.rows;
  l.parts = int(share_of(l.lines, l.lines_per_part));
  return l;
}

// Whether maps begin at 16-byte boundaries, and planes are whole vectors.
inline bool norm_takes_vectors(const BatchNorm& p, int lanes) {
  for (const void* map : {p.x, p.residual, p.grad_y, static_cast<const void*>(p.y), static_cast<const void*>(p.grad_x),
                          static_cast<const void*>(p.grad_residual)})
    if (reinterpret_cast<uintptr_t>(map) % 16) return false;
  return p.channels_last || p.pixels % lanes == 0;
}

// First element of a vector, and how many of its lanes exist.
template <int V, bool LAST>
LP_HD int64_t norm_offset(const NormPlan& l, int64_t line, int64_t column) {
  if (LAST) return line * l.length + column * V;
  const uint32_t image = uint32_t(line) / uint32_t(l.length), vector = uint32_t(line) % uint32_t(l.length);
  return (image * l.channels + column) * l.length * V + int64_t(vector) * V;
}
template <int V, bool LAST>
LP_HD int norm_count(const NormPlan& l, int64_t offset) {
  return LAST ? int(larger(0, smaller(V, l.total - offset))) : V;
}

// Values of a place in a part, and where its pivot is: the first of them.
template <int V, bool LAST>
LP_HD int64_t norm_values(const NormPlan& l, int64_t part, int64_t place) {
  const int64_t lines = l.end(part) - l.begin(part);
  if (!LAST) return lines * V;
  return lines - (l.end(part) == l.lines && (l.lines - 1) * l.length + place >= l.total);
}
template <int V, bool LAST>
LP_HD int64_t norm_pivot(const NormPlan& l, int64_t part, int64_t place) {
  return LAST ? l.begin(part) * l.length + place : norm_offset<V, false>(l, l.begin(part), place);
}

// Where channel c of the maps is in the vectors; -1: it is dead, or a list that cannot be checked without a wait is wrong.
LP_HD int64_t norm_place(const BatchNorm& p, int64_t c) {
  if (p.place) return valid(p.place[c], p.vector_channels) ? p.place[c] : -1;
  if (p.live.count == p.channels) return c;
  const int64_t i = lower_bound(p.live, c);
  return i < p.live.count && p.live[i] == c ? c : -1;
}

template <class A>
LP_HD A vector_at(const void* vector, int64_t at, A otherwise) {
  return vector ? static_cast<const A*>(vector)[at] : otherwise;
}

// z = (x - mean) * scale + shift; dx = scale * g - constant - linear * (x - mean). Zero for dead channels.
template <class A>
struct NormChannel {
  A mean, scale, shift, constant, linear;
  bool alive;
};

template <class A>
LP_HD A norm_rstd(const BatchNorm& p, int64_t at) {
  return A(1) / A(sqrt(static_cast<const A*>(p.var)[at] + A(p.eps)));
}

template <class A>
LP_HD NormChannel<A> norm_channel(const BatchNorm& p, int64_t c, const A* slopes) {
  NormChannel<A> r{};
  const int64_t at = norm_place(p, c);
  if (at < 0) return r;
  const A gate = vector_at<A>(p.gate, at, A(1));
  r.alive = true;
  r.mean = static_cast<const A*>(p.mean)[at];
  r.scale = gate * vector_at<A>(p.weight, at, A(1)) * norm_rstd<A>(p, at);
  r.shift = gate * vector_at<A>(p.bias, at, A(0));
  if (slopes) {
    r.constant = slopes[c];
    r.linear = slopes[p.channels + c];
  }
  return r;
}

}  // namespace cuda
}  // namespace lp
