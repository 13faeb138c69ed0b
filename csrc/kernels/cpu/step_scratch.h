// Scratch of one step among many: the thread keeps it between calls, like the workspace of the single operators.
#pragma once
#include <algorithm>
#include <vector>

#include "../../include/lp_params.h"
#include "../../include/pages.h"

namespace lp {

class StepScratch {
 public:
  static StepScratch& of_thread() {
    thread_local StepScratch scratch;
    return scratch;
  }
  Env env(int threads, decltype(Env::parallel) parallel, void* member = nullptr) {
    const auto allocate = [](void* owner, size_t bytes) { return static_cast<StepScratch*>(owner)->allocate(bytes); };
    return Env{threads, parallel, allocate, this, member};
  }
  void* allocate(size_t bytes) {
    const size_t size = round_to(bytes, 64);
    if (blocks_.empty() || used_ + size > blocks_.back().size()) {
      blocks_.emplace_back(std::max<size_t>(size, 64 * 1024));
      used_ = 0;
    }
    used_ += size;
    return blocks_.back().data() + used_ - size;
  }
  // After a step: all of it is free, in one block.
  void reset() {
    if (blocks_.size() > 1) {
      size_t total = 0;
      for (const Pages& block : blocks_) total += block.size();
      blocks_.clear();
      blocks_.emplace_back(total);
    }
    used_ = 0;
  }
  // After the last one.
  void trim() {
    if (blocks_.empty() || blocks_.back().size() <= (size_t(32) << 20)) return;
    blocks_.clear();
    used_ = 0;
  }

 private:
  std::vector<Pages> blocks_;
  size_t used_ = 0;
};

}  // namespace lp
