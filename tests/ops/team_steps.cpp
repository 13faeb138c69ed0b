// Runs steps of tasks in a team (csrc/kernels/cpu/team.h) and counts what went wrong.
#include "kernels/cpu/team.h"

#include <chrono>
#include <vector>

// `members` members on `threads` threads, each of which calls its members one after the other, `late` microseconds after the
// thread before it. Member `failing` (or -1) leaves before the middle step. Returns how many tasks ran not exactly once or
// before all tasks of the step before; with a member that fails: how many ran more than once.
extern "C" int64_t run_steps(int64_t members, int64_t threads, const int64_t* tasks, int64_t steps, int64_t late,
                             int64_t failing) {
  std::vector<std::unique_ptr<std::atomic<int>[]>> runs;
  std::vector<std::atomic<int64_t>> finished(static_cast<size_t>(steps));
  for (int64_t s = 0; s < steps; ++s) runs.emplace_back(new std::atomic<int>[size_t(tasks[s]) + 1]());
  std::atomic<int64_t> wrong{0};
  lp::Team team(members);
  const auto steps_of = [&](int64_t index) {
    lp::Team::Member member(team, index);
    for (int64_t s = 0; s < steps; ++s) {
      if (index == failing && s == steps / 2) return team.abandon();
      member.run(tasks[s], [&](int64_t task) {
        ++runs[size_t(s)][size_t(task)];
        if (s > 0 && finished[size_t(s - 1)].load() != tasks[s - 1]) ++wrong;
        ++finished[size_t(s)];
      });
      if (failing < 0 && finished[size_t(s)].load() != tasks[s]) ++wrong;
    }
  };
  std::vector<std::thread> pool;
  for (int64_t t = 0; t < threads; ++t)
    pool.emplace_back([&, t] {
      std::this_thread::sleep_for(std::chrono::microseconds(t * late));
      for (int64_t index = t; index < members; index += threads) steps_of(index);
    });
  for (std::thread& thread : pool) thread.join();
  int64_t twice = 0;
  for (int64_t s = 0; s < steps; ++s)
    for (int64_t i = 0; i < tasks[s]; ++i) {
      wrong += runs[size_t(s)][size_t(i)] != 1;
      twice += runs[size_t(s)][size_t(i)] > 1;
    }
  return failing < 0 ? wrong.load() : twice;
}
