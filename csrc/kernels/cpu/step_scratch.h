// Scratch of one step among many: the thread keeps it between calls, like the workspace of the single operators.
#pragma once
#include <algorithm>
#include <memory>
#include <vector>

#include "../../include/lp_params.h"

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
    const size_t size = (bytes + 63) / 64 * 64 + 64;
    if (blocks_.empty() || used_ + size > sizes_.back()) {
      sizes_.push_back(std::max<size_t>(size, 64 * 1024));
      blocks_.emplace_back(new char[sizes_.back()]);
      used_ = 0;
    }
    used_ += size;
    const uintptr_t at = reinterpret_cast<uintptr_t>(blocks_.back().get()) + used_ - size;
    return reinterpret_cast<void*>((at + 63) & ~uintptr_t(63));
  }
  // After a step: all of it is free, in one block.
  void reset() {
    if (blocks_.size() > 1) {
      size_t total = 0;
      for (size_t s : sizes_) total += s;
      release();
      sizes_.push_back(total);
      blocks_.emplace_back(new char[total]);
    }
    used_ = 0;
  }
  // After the last one.
  void trim() {
    if (!sizes_.empty() && sizes_.back() > (size_t(32) << 20)) release();
  }

 private:
  void release() {
    blocks_.clear();
    sizes_.clear();
    used_ = 0;
  }
  std::vector<std::unique_ptr<char[]>> blocks_;
  std::vector<size_t> sizes_;
  size_t used_ = 0;
};

}  // namespace lp
