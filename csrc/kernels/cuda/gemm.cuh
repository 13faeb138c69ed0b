// Three ways to run a problem of conv_problems.h: shared-memory tiles, one thread per result, one block per result.
// All are deterministic: no atomics, fixed order of summation.
#pragma once
#include "conv_problems.h"
#include "device.cuh"

namespace lp {
namespace cuda {

constexpr int kTile = 64, kStep = 16, kThreads = 256;

template <class T, class P>
__global__ void __launch_bounds__(kThreads) tiled_kernel(const P p) {
  __shared__ T a_tile[kStep][kTile + 1], b_tile[kStep][kTile + 1];
  const Group g = p.group(blockIdx.z);
  const int64_t rows = p.rows(g), cols = p.cols(g), depth = p.depth(g);
  const int64_t row0 = int64_t(blockIdx.x) * kTile, col0 = int64_t(blockIdx.y) * kTile;
  if (row0 >= rows || col0 >= cols) return;  // the same for the whole block
  const int lane = threadIdx.x % kTile, slice = threadIdx.x / kTile;
  const bool loads_row = row0 + lane < rows, loads_col = col0 + lane < cols;
  const Row load_row = p.row(g, loads_row ? row0 + lane : 0);
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  T acc[4][4] = {};
  for (int64_t k0 = 0; k0 < depth; k0 += kStep) {
    for (int i = slice; i < kStep; i += kThreads / kTile) {
      T a = T(0), b = T(0);
      if (k0 + i < depth) {
        const Depth d = p.at_depth(g, k0 + i);
        if (loads_row) a = p.a(g, load_row, d);
        if (loads_col) b = p.b(g, d, col0 + lane);
      }
      a_tile[i][lane] = a;
      b_tile[i][lane] = b;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kStep; ++k) {
      T a[4], b[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = a_tile[k][tx + 16 * i], b[i] = b_tile[k][ty + 16 * i];
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[i][j] += a[i] * b[j];
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t m = row0 + tx + 16 * i;
    if (m >= rows) continue;
    const Row r = p.row(g, m);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (col0 + ty + 16 * j < cols) p.store(g, r, col0 + ty + 16 * j, acc[i][j]);
  }
}

// For groups with few columns (depthwise), where a tile would be mostly padding.
template <class T, class P>
__global__ void __launch_bounds__(kThreads) direct_kernel(const P p) {
  const Group g = p.group(blockIdx.z);
  const int64_t m = int64_t(blockIdx.x) * kThreads + threadIdx.x, col = blockIdx.y;
  if (m >= p.rows(g) || col >= p.cols(g)) return;
  const Row r = p.row(g, m);
  T acc = T(0);
  for (int64_t k = 0; k < p.depth(g); ++k) {
    const Depth d = p.at_depth(g, k);
    acc += p.a(g, r, d) * p.b(g, d, col);
  }
  p.store(g, r, col, acc);
}

template <class T>
__device__ T block_sum(T value) {
  __shared__ T part[kThreads];
  part[threadIdx.x] = value;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
    __syncthreads();
  }
  const T sum = part[0];
  __syncthreads();
  return sum;
}

// For weight gradients with few outputs per group: the depth (pixels) is what is long.
template <class T, class P>
__global__ void __launch_bounds__(kThreads) reduce_kernel(const P p) {
  const Group g = p.group(blockIdx.z);
  const int64_t col = blockIdx.x, m = blockIdx.y;
  if (m >= p.rows(g) || col >= p.cols(g)) return;
  const Row r = p.row(g, m);
  T acc = T(0);
  for (int64_t k = threadIdx.x; k < p.depth(g); k += kThreads) {
    const Depth d = p.at_depth(g, k);
    acc += p.a(g, r, d) * p.b(g, d, col);
  }
  const T sum = block_sum(acc);
  if (threadIdx.x == 0) p.store(g, r, col, sum);
}

inline unsigned blocks(int64_t count, int64_t per_block) { return unsigned((count + per_block - 1) / per_block); }

// `rows` and `cols` are upper bounds over the groups; a group with fewer leaves its surplus blocks at once.
template <class T, class P>
void run_pixels(const P& p, int64_t rows, int64_t cols, int64_t groups, cudaStream_t stream, const char* what) {
  if (rows == 0 || cols == 0) return;
  if (cols <= 4)
    direct_kernel<T><<<dim3(blocks(rows, kThreads), unsigned(cols), unsigned(groups)), kThreads, 0, stream>>>(p);
  else
    tiled_kernel<T><<<dim3(blocks(rows, kTile), blocks(cols, kTile), unsigned(groups)), kThreads, 0, stream>>>(p);
  check_launch(what);
}

}  // namespace cuda
}  // namespace lp
