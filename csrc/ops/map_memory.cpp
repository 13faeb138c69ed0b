#include "map_memory.h"

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <unordered_map>
#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace lp {
namespace {

constexpr size_t kHugePage = size_t(2) << 20, kArena = size_t(32) << 20, kLeastMap = size_t(64) << 10;

size_t round_to(size_t v, size_t to) { return (v + to - 1) / to * to; }

char* reserve(size_t size) {
#if defined(__linux__)
  void* found = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (found == MAP_FAILED) throw std::bad_alloc();
  char* const begin = static_cast<char*>(found);
  char* const base = reinterpret_cast<char*>(round_to(reinterpret_cast<uintptr_t>(begin), kHugePage));
  if (base > begin) munmap(begin, size_t(base - begin));
  if (base < begin + kHugePage) munmap(base + size, size_t(begin + kHugePage - base));
#if defined(MADV_HUGEPAGE)
  madvise(base, size, MADV_HUGEPAGE);  // advice: where there are none, pages are small
#endif
  return base;
#else
  return static_cast<char*>(::operator new(size, std::align_val_t(kHugePage)));
#endif
}

void give_back(char* base, [[maybe_unused]] size_t size) {
#if defined(__linux__)
  munmap(base, size);
#else
  ::operator delete(base, std::align_val_t(kHugePage));
#endif
}

class MapMemory {
 public:
  // Never destroyed: tensors may outlive static objects.
  static MapMemory& instance() {
    static MapMemory* const memory = new MapMemory();
    return *memory;
  }

  void* allocate(size_t bytes) {
    // Neighbours begin at different places within a page: maps that are read together would share cache sets.
    const size_t size = round_to(bytes, 64) + 9 * 64;
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& arena : arenas_)
      if (void* at = take(*arena, size)) return at;
    // The arenas that are free are too small for what is wanted now.
    trim();
    const size_t whole = std::max(kArena, round_to(size, kHugePage));
    arenas_.push_back(std::make_unique<Arena>(Arena{reserve(whole), whole, {{0, whole}}}));
    return take(*arenas_.back(), size);
  }

  void release(void* data) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = taken_.find(data);
    const Block block = found->second;
    taken_.erase(found);
    auto& free = block.arena->free;
    size_t begin = size_t(static_cast<char*>(data) - block.arena->base), size = block.size;
    auto next = free.lower_bound(begin);
    if (next != free.end() && next->first == begin + size) {
      size += next->second;
      next = free.erase(next);
    }
    if (next != free.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second == begin) {
        before->second += size;
        return;
      }
    }
    free.emplace_hint(next, begin, size);
  }

  void release_unused() {
    const std::lock_guard<std::mutex> lock(mutex_);
    trim();
  }

 private:
  struct Arena {
    char* base;
    size_t size;
    std::map<size_t, size_t> free;  // offset -> size, no two of which touch
  };
  struct Block {
    Arena* arena;
    size_t size;
  };

  MapMemory() {
#if defined(__linux__)
    // A forked process must not find the lock held by a thread that it does not have.
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); }, [] { instance().mutex_.unlock(); });
#endif
  }

  // The first place that is large enough, nullptr if there is none.
  void* take(Arena& arena, size_t size) {
    for (auto at = arena.free.begin(); at != arena.free.end(); ++at) {
      const auto [begin, room] = *at;
      if (room < size) continue;
      arena.free.erase(at);
      if (room > size) arena.free.emplace(begin + size, room - size);
      void* const data = arena.base + begin;
      taken_.emplace(data, Block{&arena, size});
      return data;
    }
    return nullptr;
  }

  void trim() {
    const auto unused = [](const std::unique_ptr<Arena>& arena) {
      const bool whole = arena->free.size() == 1 && arena->free.begin()->second == arena->size;
      if (whole) give_back(arena->base, arena->size);
      return whole;
    };
    arenas_.erase(std::remove_if(arenas_.begin(), arenas_.end(), unused), arenas_.end());
  }

  std::mutex mutex_;
  std::vector<std::unique_ptr<Arena>> arenas_;
  std::unordered_map<void*, Block> taken_;
};

}  // namespace

Tensor new_map(const Tensor& like, const Sizes& shape) {
  size_t bytes = like.element_size();
  for (const int64_t size : shape) bytes *= size_t(size);
  if (like.device().type() != torch::headeronly::DeviceType::CPU || bytes < kLeastMap) return new_output(like, shape);
  const int64_t c = shape[1], h = shape[2], w = shape[3];
  const Sizes strides = is_channels_last(like) ? Sizes{h * w * c, 1, w * c, c} : Sizes{c * h * w, h * w, w, 1};
  void* const data = MapMemory::instance().allocate(bytes);
  return torch::stable::from_blob(data, shape, strides, like.device(), like.scalar_type(),
                                  [](void* memory) { MapMemory::instance().release(memory); });
}

void release_maps() { MapMemory::instance().release_unused(); }

STABLE_TORCH_LIBRARY_FRAGMENT(lightning_prune, m) { m.def("release_maps() -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(lightning_prune, CompositeExplicitAutograd, m) { m.impl("release_maps", TORCH_BOX(&release_maps)); }

}  // namespace lp
