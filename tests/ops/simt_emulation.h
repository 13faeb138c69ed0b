// The instructions of csrc/kernels/cuda/simt.h on the host: every CUDA thread is a fiber, warps and blocks meet as on a GPU.
// Fragment layouts are those of the PTX ISA (ldmatrix, mma.m16n8k16, mma.m16n8k8). Copies arrive only when they are waited
// for, and shared memory starts as NaN, so that a missing wait or barrier shows. Products of warp groups (wgmma.m64nNk16) read
// shared memory as late as they may, and only what copies have shown to them. Bank conflicts are counted.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "kernels/cuda/storage.h"

namespace lp {
namespace cuda {
namespace simt {

struct Copy {
  char* to;
  const char* from;
  int bytes;
};
struct Product {
  uint64_t a, b;  // matrix descriptors
  std::function<void()> run;
};
struct Fiber {
  ucontext_t context;  // to begin with; afterwards jumps, which make no system calls
  jmp_buf place;
  bool begun = false, blocked = false;
  std::unique_ptr<char[]> stack;
  std::vector<Copy> open;
  std::vector<const void*> targets;  // of all copies, in order
  std::deque<std::vector<Copy>> groups;
  std::vector<size_t> arrived;  // pieces of shared memory that products do not see yet
  std::vector<Product> products;
  std::deque<std::vector<std::function<void()>>> product_groups;
  size_t grouped = 0;
  bool may_multiply = false;
  int block_rounds = 0, warp_rounds = 0;
  bool done = false;
};
struct Exchange {  // what the lanes of a warp bring to a collective instruction
  const void* rows[32];
  uint32_t words[32][6];
};
struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Exchange> warps;
  std::vector<char> memory;
  std::vector<char> pending, hidden;  // per 16 bytes: copies on their way, and one that products do not see yet
  ucontext_t start;
  jmp_buf scheduler;
  int current = 0, bx = 0, by = 0;
  int64_t read_conflicts = 0, write_conflicts = 0, misaligned = 0, outside = 0, races = 0;
  const char *x_begin = nullptr, *x_end = nullptr, *w_begin = nullptr, *w_end = nullptr;
};
inline Machine machine;

inline Fiber& self() { return machine.fibers[size_t(machine.current)]; }
inline int thread() { return machine.current; }
inline int block_x() { return machine.bx; }
inline int block_y() { return machine.by; }
inline char* shared() { return machine.memory.data(); }
inline void yield() {
  if (_setjmp(self().place) == 0) _longjmp(machine.scheduler, 1);
}
inline void resume() {
  if (_setjmp(machine.scheduler) != 0) return;
  if (self().begun) _longjmp(self().place, 1);
  self().begun = true;
  swapcontext(&machine.start, &self().context);
}

inline void sync_block() {
  const int round = ++self().block_rounds;
  for (;;) {
    bool all = true;
    for (const Fiber& f : machine.fibers) all = all && f.block_rounds >= round;
    if (all) {
      for (Fiber& f : machine.fibers) f.blocked = false;
      return;
    }
    self().blocked = true;
    yield();
  }
}
inline void sync_warp() {
  const int round = ++self().warp_rounds, first = machine.current / 32 * 32;
  for (;;) {
    bool all = true;
    for (int i = first; i < first + 32; ++i) all = all && machine.fibers[size_t(i)].warp_rounds >= round;
    if (all) return;
    yield();
  }
}
inline size_t piece_of(const void* p) { return size_t(static_cast<const char*>(p) - machine.memory.data()) / 16; }
inline Exchange& warp() { return machine.warps[size_t(machine.current / 32)]; }

// Conflicts of eight 16-byte accesses, one phase of a warp: all 32 banks must be hit once.
inline int conflicts(const void* const* rows) {
  int most = 0, use[8] = {};
  for (int i = 0; i < 8; ++i) {
    const auto offset = static_cast<const char*>(rows[i]) - machine.memory.data();
    if (offset % 16 != 0 || offset < 0 || offset + 16 > int64_t(machine.memory.size())) ++machine.misaligned;
    bool same = false;
    for (int k = 0; k < i; ++k) same = same || rows[k] == rows[i];
    if (!same) most = std::max(most, ++use[offset / 16 % 8]);
  }
  return most - 1;
}

// Misaligned ones trap (-fsanitize=alignment).
inline Piece16 load16(const void* p) { return *static_cast<const Piece16*>(p); }
inline void store16(void* p, const Piece16& v) { *static_cast<Piece16*>(p) = v; }

inline void copy16(void* to, const void* from, int bytes) {
  const char* source = static_cast<const char*>(from);
  if (reinterpret_cast<uintptr_t>(source) % 16 != 0 || bytes < 0 || bytes > 16) ++machine.misaligned;
  const bool in_x = source >= machine.x_begin && source + bytes <= machine.x_end;
  const bool in_w = source >= machine.w_begin && source + bytes <= machine.w_end;
  if (bytes > 0 && !in_x && !in_w) ++machine.outside;
  if (static_cast<char*>(to) + 16 > machine.memory.data() + machine.memory.size()) {
    ++machine.outside;
    return;
  }
  self().targets.push_back(to);
  ++machine.pending[piece_of(to)];
  self().open.push_back(Copy{static_cast<char*>(to), source, bytes});
}
inline void copy16_if(bool active, void* to, const void* from, int bytes) {
  if (active) copy16(to, from, bytes);
}
inline void copy16_unless(uint32_t refused, void* to, const void* from, int bytes) { copy16(to, from, refused ? 0 : bytes); }
inline void copies_end_group() {
  self().groups.push_back(std::move(self().open));
  self().open.clear();
}
template <int GROUPS>
void copies_wait() {
  while (int(self().groups.size()) > GROUPS) {
    for (const Copy& c : self().groups.front()) {
      std::memset(c.to, 0, 16);
      std::memcpy(c.to, c.from, size_t(c.bytes));
      self().arrived.push_back(piece_of(c.to));
      machine.hidden[self().arrived.back()] = 1;
      --machine.pending[self().arrived.back()];
    }
    self().groups.pop_front();
  }
}

// ldmatrix: lane l of matrix i receives the two 16-bit values (2 * (l % 4), + 1) of row l / 4.
template <int MATRICES>
void load_matrices(uint32_t* r, const void* row) {
  const int lane = machine.current % 32;
  warp().rows[lane] = row;
  if (machine.pending[piece_of(row)]) ++machine.races;  // what is read may be the copy or what was there before
  sync_warp();
  if (lane == 0)
    for (int i = 0; i < MATRICES; ++i) machine.read_conflicts += conflicts(warp().rows + 8 * i);
  for (int i = 0; i < MATRICES; ++i)
    std::memcpy(&r[i], static_cast<const char*>(warp().rows[8 * i + lane / 4]) + lane % 4 * 4, 4);
  sync_warp();
}
inline void load4(uint32_t (&r)[4], const void* row) { load_matrices<4>(r, row); }
inline void load2(uint32_t (&r)[2], const void* row) { load_matrices<2>(r, row); }

inline uint32_t rounded_tf32(uint32_t bits) { return (bits + 0x1000u) & ~0x1fffu; }

// Element (i, k) of A: lane (i % 8) * 4 + k' / per, register (i / 8) + 2 * (k / half); k' = k % half; likewise B's (k, j).
template <class S>
void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  constexpr int kPer = S::kLanes / 4, kHalf = S::kLanes, kDepth = 2 * S::kLanes;
  const int lane = machine.current % 32;
  for (int i = 0; i < 4; ++i) warp().words[lane][i] = a[i];
  for (int i = 0; i < 2; ++i) warp().words[lane][4 + i] = b[i];
  sync_warp();
  const auto value = [](uint32_t word, int k) {
    if (kPer == 1) {
      if (word & 0x1fffu) ++machine.misaligned;  // would be cut off
      return float_of_bits(word);
    }
    return float(S::load(typename S::Element(k % 2 ? word >> 16 : word & 0xffff)));
  };
  for (int r = 0; r < 4; ++r) {
    const int i = lane / 4 + r / 2 * 8, j = lane % 4 * 2 + r % 2;
    double sum = c[r];
    for (int k = 0; k < kDepth; ++k) {
      const int inner = k % kHalf / kPer, half = k / kHalf;
      sum += double(value(warp().words[i % 8 * 4 + inner][i / 8 + 2 * half], k)) *
             double(value(warp().words[j * 4 + inner][4 + half], k));
    }
    c[r] = float(sum);
  }
  sync_warp();
}

constexpr unsigned kBase = 1024;  // where shared memory begins in its address space
inline unsigned address(const void* p) { return unsigned(static_cast<const char*>(p) - machine.memory.data()) + kBase; }

inline void show_copies() {
  for (const size_t piece : self().arrived) machine.hidden[piece] = 0;
  self().arrived.clear();
}
inline void products_begin() { self().may_multiply = true; }

// Chunk `chunk` of row `row` of the factor that a descriptor describes.
inline const char* factor_row(uint64_t descriptor, int row, int chunk) {
  const auto field = [&](int bit) { return int64_t(descriptor >> bit & 0x3fff) << 4; };
  const int64_t at = field(0) - kBase + chunk * field(16) + row / 8 * field(32) + row % 8 * 16;
  if (at < 0 || at + 16 > int64_t(machine.memory.size())) {
    ++machine.outside;
    return machine.memory.data();
  }
  if (machine.hidden[size_t(at / 16)] || machine.pending[size_t(at / 16)]) ++machine.races;
  return machine.memory.data() + at;
}

template <class S, int NI>
void multiply_group(float (&sums)[NI][4], uint64_t a, uint64_t b) {
  using E = typename S::Element;
  if (!self().may_multiply || a >> 46 || b >> 46) ++machine.misaligned;  // no fence; a swizzle or an offset of the base
  const int lane = machine.current % 32, warp = machine.current / 32 % 4;
  const auto run = [&sums, a, b, lane, warp] {
    for (int r = 0; r < 4; ++r)
      for (int j = 0; j < NI; ++j) {
        const int row = warp * 16 + lane / 4 + r / 2 * 8, column = j * 8 + lane % 4 * 2 + r % 2;
        double sum = sums[j][r];
        for (int chunk = 0; chunk < 2; ++chunk) {
          E x[8], w[8];
          std::memcpy(x, factor_row(a, row, chunk), 16);
          std::memcpy(w, factor_row(b, column, chunk), 16);
          for (int k = 0; k < 8; ++k) sum += double(S::load(x[k])) * double(S::load(w[k]));
        }
        sums[j][r] = float(sum);
      }
  };
  self().products.push_back(Product{a, b, run});
}
inline void products_end_group() {
  std::vector<std::function<void()>> group;
  for (; self().grouped < self().products.size(); ++self().grouped)
    group.push_back(std::move(self().products[self().grouped].run));
  self().product_groups.push_back(std::move(group));
  self().may_multiply = false;
}
template <int GROUPS, int NI>
void products_wait(float (&)[NI][4]) {
  while (int(self().product_groups.size()) > GROUPS) {
    for (const auto& product : self().product_groups.front()) product();
    self().product_groups.pop_front();
  }
}

// Runs one block. A warp goes on until it ends or waits for the block, so that warps are as far apart as barriers let them
// be; `reverse` lets the last warp and the last lane go first.
inline std::function<void()> body;
inline void entry() {
  body();
  self().done = true;
  self().block_rounds = self().warp_rounds = 1 << 30;
  _longjmp(machine.scheduler, 1);
}
inline void run_block(int threads, int shared_bytes, bool reverse, std::function<void()> function) {
  constexpr size_t kStack = 64 << 10;
  body = std::move(function);
  machine.fibers.resize(size_t(threads));
  machine.warps.resize(size_t(threads / 32));
  machine.memory.assign(size_t(shared_bytes), char(0xff));  // NaN in every type
  machine.hidden.assign(size_t(shared_bytes) / 16 + 1, 0);
  machine.pending = machine.hidden;
  for (Fiber& f : machine.fibers) {
    if (!f.stack) f.stack.reset(new char[kStack]);
    f.done = f.begun = f.blocked = false, f.block_rounds = f.warp_rounds = 0;
    f.open.clear(), f.groups.clear(), f.targets.clear();
    f.arrived.clear(), f.products.clear(), f.product_groups.clear();
    f.grouped = 0, f.may_multiply = false;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, entry, 0);
  }
  const auto order = [&](int i, int count) { return reverse ? count - 1 - i : i; };
  for (bool running = true; running;) {
    running = false;
    for (int w = 0; w < threads / 32; ++w)
      for (bool moved = true; moved;) {
        moved = false;
        for (int lane = 0; lane < 32; ++lane) {
          machine.current = order(w, threads / 32) * 32 + order(lane, 32);
          if (self().done || self().blocked) continue;
          running = moved = true;
          resume();
        }
      }
  }
  for (int i = 0; i < threads; i += 8)
    for (size_t k = 0; k < machine.fibers[size_t(i)].targets.size(); ++k) {
      const void* rows[8];
      for (int j = 0; j < 8; ++j) rows[j] = machine.fibers[size_t(i + j)].targets.at(k);
      machine.write_conflicts += conflicts(rows);
    }
  for (int i = 0; i < threads; ++i) {  // the four warps of a group multiply the same, and everything has ended
    const Fiber &f = machine.fibers[size_t(i)], &first = machine.fibers[size_t(i / 128 * 128)];
    bool same = f.products.size() == first.products.size() && f.product_groups.empty() && f.grouped == f.products.size();
    for (size_t k = 0; same && k < f.products.size(); ++k)
      same = f.products[k].a == first.products[k].a && f.products[k].b == first.products[k].b;
    if (!same) ++machine.misaligned;
  }
}

}  // namespace simt
}  // namespace cuda
}  // namespace lp
