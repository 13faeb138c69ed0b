// Threads that stay together for many short steps: waking a pool for each step of a segment costs as much as a small layer.
#pragma once
#include <algorithm>
#include <atomic>
#include <thread>

#include "../../include/lp_params.h"

namespace lp {

// One leader calls parallel(); the others help() until it calls finish(). Nobody has to come: whoever is late finds the work
// done, so a pool that gives fewer threads than asked for is only slower.
class Team {
 public:
  using Body = void (*)(int64_t begin, int64_t end, void* ctx);

  // Leader: body(i, i + 1) for i in [0, n); member i takes i if it is there, what is left goes to whoever is free.
  void parallel(int64_t n, Body body, void* ctx) {
    if (n == 1) return body(0, 1, ctx);
    body_ = body;
    ctx_ = ctx;
    n_ = n;
    next_.store(0, std::memory_order_relaxed);
    for (int64_t i = 0; i < std::min(n, kPlaces); ++i) taken_[i].store(false, std::memory_order_relaxed);
    number_.fetch_add(1, std::memory_order_relaxed);
    gate_.store(0, std::memory_order_release);
    work(0);
    // Closed once nobody is inside: from then on the job may change.
    int64_t inside = 0;
    for (Wait wait; !gate_.compare_exchange_weak(inside, kClosed, std::memory_order_acq_rel); inside = 0) wait();
  }
  void finish() { finished_.store(true, std::memory_order_release); }

  // Members 1, 2, ...
  void help(int64_t member) {
    int64_t seen = 0;
    Wait wait;
    while (!finished_.load(std::memory_order_acquire)) {
      int64_t inside = gate_.load(std::memory_order_acquire);
      const int64_t number = number_.load(std::memory_order_relaxed);
      if (inside < 0 || number == seen || !gate_.compare_exchange_strong(inside, inside + 1, std::memory_order_acq_rel)) {
        wait();
        continue;
      }
      seen = number_.load(std::memory_order_relaxed);
      work(member);
      gate_.fetch_sub(1, std::memory_order_release);
      wait = Wait();
    }
  }

 private:
  static constexpr int64_t kClosed = INT64_MIN, kPlaces = 64;

  // Spins, then makes room for others.
  class Wait {
   public:
    void operator()() {
      if (++count_ < 4000) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
        return;
      }
      std::this_thread::yield();
    }

   private:
    int count_ = 0;
  };

  void work(int64_t member) {
    if (member < std::min(n_, kPlaces)) take(member);
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < n_;) take(i);
  }
  void take(int64_t i) {
    if (i >= kPlaces || !taken_[i].exchange(true, std::memory_order_relaxed)) body_(i, i + 1, ctx_);
  }

  Body body_ = nullptr;
  void* ctx_ = nullptr;
  int64_t n_ = 0;
  alignas(64) std::atomic<int64_t> gate_{kClosed};  // helpers inside, or closed
  std::atomic<int64_t> number_{0};                  // of the job
  std::atomic<bool> finished_{false};
  alignas(64) std::atomic<int64_t> next_{0};
  std::atomic<bool> taken_[kPlaces];
};

}  // namespace lp
