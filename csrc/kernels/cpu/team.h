// Threads that go through many short steps together. Waking a pool, or handing each step from one thread to the others, costs
// as much as a small layer, above all between processors that share no cache. So every member runs the whole program and takes
// its own share of each step's tasks; all that passes between members is one word per share: how far it is.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

namespace lp {

// Nobody has to come: whoever is done with its share takes tasks of the others, also of members that are late, and whoever
// comes late finds the work done. So a pool that gives fewer threads than asked for, or calls the members one after the other,
// is only slower.
class Team {
 public:
  explicit Team(int64_t members) : members_(members), shares_(new Share[size_t(members)]) {}

  // One thread's way through the steps. All members call run() with the same numbers of tasks, in the same order.
  class Member {
   public:
    Member(Team& team, int64_t index) : team_(team), index_(index) {}

    // body(task) for every task in [0, tasks), by somebody; returns when all of them are done.
    template <class F>
    void run(int64_t tasks, const F& body) {
      ++step_;
      const int64_t members = team_.members_;
      const int64_t chunk = std::max<int64_t>(1, (tasks + members * kMost - 1) / (members * kMost));
      const int64_t chunks = (tasks + chunk - 1) / chunk;
      const auto first = [&](int64_t share) { return chunks * share / members; };
      const auto part = [&](int64_t at) {
        for (int64_t i = at * chunk; i < std::min(tasks, (at + 1) * chunk); ++i) body(i);
      };
      for (int64_t k = 0; k < members; ++k) {
        const int64_t share = (index_ + k) % members;
        work(team_.shares_[size_t(share)].state, first(share), first(share + 1) - first(share), part);
      }
      for (int64_t share = 0; share < members; ++share) {
        const int64_t count = first(share + 1) - first(share);
        Wait wait;
        while (!complete(team_.shares_[size_t(share)].state.load(std::memory_order_acquire), count) && !team_.abandoned())
          wait();
      }
    }

   private:
    // A share's word: the step, and how many of its parts are taken and done. A word that is behind belongs to a step that is
    // complete; one that is ahead says that this step is.
    static uint64_t step_of(uint64_t word) { return word >> 32; }
    static int64_t taken(uint64_t word) { return int64_t(word >> 16 & 0xffff); }
    static int64_t done(uint64_t word) { return int64_t(word & 0xffff); }
    static constexpr uint64_t kTaken = uint64_t(1) << 16, kDone = 1;
    static constexpr int64_t kMost = 0x7fff;  // parts of a share

    bool complete(uint64_t word, int64_t count) const {
      return count == 0 || step_of(word) > step_ || (step_of(word) == step_ && done(word) == count);
    }
    template <class F>
    void work(std::atomic<uint64_t>& state, int64_t first, int64_t count, const F& part) {
      uint64_t finished = 0;  // kDone behind a part
      for (uint64_t word = state.load(std::memory_order_acquire);;) {
        if (finished == 0 && (count == 0 || step_of(word) > step_ || team_.abandoned())) return;
        const bool fresh = step_of(word) < step_, more = fresh || taken(word) < count;
        if (finished == 0 && !more) return;
        const uint64_t next = (fresh ? step_ << 32 : word) + finished + (more ? kTaken : 0);
        if (!state.compare_exchange_weak(word, next, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
        if (!more) return;
        part(first + taken(next) - 1);
        finished = kDone;
        word = next;
      }
    }

    Team& team_;
    int64_t index_;
    uint64_t step_ = 0;
  };

  // A member fails: nobody waits any more, what the others compute is worth nothing.
  void abandon() { abandoned_.store(true, std::memory_order_relaxed); }

 private:
  // Spins, then makes room for others.
  class Wait {
   public:
    void operator()() {
      if (++count_ < 256) {
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

  struct alignas(128) Share {  // two cache lines: they come in pairs
    std::atomic<uint64_t> state{0};
  };
  bool abandoned() const { return abandoned_.load(std::memory_order_relaxed); }

  int64_t members_;
  std::unique_ptr<Share[]> shares_;
  std::atomic<bool> abandoned_{false};
};

}  // namespace lp
