#include "map_memory.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>
#include <unordered_map>
#include <vector>
#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#endif

#include "../include/pages.h"

namespace lp {
namespace {

constexpr size_t kLeastArena = size_t(64) << 20, kLeastMap = size_t(64) << 10;
// What is kept beyond the largest demand so far: a share of it, and pages that small networks do not fill.
constexpr size_t kSpareParts = 4, kSpare = 16 * kHugePage;

// Whether the memory behind one huge page went back to the system; its addresses stay.
bool empty([[maybe_unused]] char* page) {
#if defined(__linux__)
  return madvise(page, kHugePage, MADV_DONTNEED) == 0;
#else
  return false;
#endif
}

// Blocks in the first free place of a few arenas, which are addresses. What is kept is counted in huge pages: those that a
// block has lain in since they were last empty. More than a quarter and kSpare above the largest demand so far is given back,
// the highest free pages first, since blocks go to the lowest. So
//   kept <= max(5/4 largest demand + kSpare, live + 2 huge pages per live block),
// the latter because a block has at most two pages that it does not fill.
class MapMemory {
 public:
  // Never destroyed: tensors may outlive static objects.
  static MapMemory& instance() {
    static MapMemory* const memory = new MapMemory();
    return *memory;
  }

  // nullptr if the system has no addresses left for it.
  void* allocate(size_t bytes) {
    // Neighbours begin at different places within a page: maps that are read together would share cache sets.
    const size_t size = round_to(bytes, 64) + 9 * 64;
    const std::lock_guard<std::mutex> lock(mutex_);
    void* data = nullptr;
    for (size_t i = 0; i < arenas_.size() && !data; ++i) data = take(*arenas_[i], size);
    if (!data) {
      if (!grow(size)) return nullptr;
      data = take(*arenas_.back(), size);
    }
    returning_ = false;
    live_ += size;
    peak_ = std::max(peak_, live_);
    empty_down_to(peak_ + peak_ / kSpareParts + kSpare);
    return data;
  }

  void release(void* data) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = taken_.find(data);
    const Block block = found->second;
    taken_.erase(found);
    live_ -= block.size;
    join(block.arena->free, size_t(static_cast<char*>(data) - block.arena->base), block.size);
    if (returning_) return_unused();
  }

  // From here on until the next allocation nothing is kept that no tensor holds.
  void release_unused() {
    const std::lock_guard<std::mutex> lock(mutex_);
    returning_ = true;
    return_unused();
  }

  // In bytes, but for the second: live, live blocks, largest demand, kept.
  std::tuple<int64_t, int64_t, int64_t, int64_t> state() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return {int64_t(live_), int64_t(taken_.size()), int64_t(peak_), int64_t(kept_)};
  }

 private:
  using Ranges = std::map<size_t, size_t>;  // offset -> size, no two of which touch
  struct Arena {
    char* base;
    size_t size;
    Ranges free;
    std::vector<char> kept;  // by huge page
  };
  struct Block {
    Arena* arena;
    size_t size;
  };

  MapMemory() {
#if defined(__linux__)
    // A forked process must not find the lock held by a thread that it does not have. Its memory is its own.
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); }, [] { instance().mutex_.unlock(); });
#endif
  }

  bool grow(size_t size) {
    const size_t least = round_to(size, kHugePage);
    // Addresses cost nothing: twice as many each time, so that there are few arenas.
    size_t whole = std::max({kLeastArena, least, mapped_});
    char* base = reserve_pages(whole);
    if (!base) base = reserve_pages(whole = least);
    if (!base) return false;
    arenas_.push_back(std::make_unique<Arena>(Arena{base, whole, {{0, whole}}, std::vector<char>(whole / kHugePage)}));
    mapped_ += whole;
    return true;
  }

  void* take(Arena& arena, size_t size) {
    const auto at = std::find_if(arena.free.begin(), arena.free.end(), [&](const auto& range) { return range.second >= size; });
    if (at == arena.free.end()) return nullptr;
    const auto [begin, room] = *at;
    arena.free.erase(at);
    if (room > size) arena.free.emplace(begin + size, room - size);
    for (size_t page = begin / kHugePage; page * kHugePage < begin + size; ++page)
      if (!arena.kept[page]) {
        arena.kept[page] = 1;
        kept_ += kHugePage;
      }
    void* const data = arena.base + begin;
    taken_.emplace(data, Block{&arena, size});
    return data;
  }

  static void join(Ranges& free, size_t begin, size_t size) {
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

  void empty_down_to(size_t limit) {
    for (size_t i = arenas_.size(); i-- > 0 && kept_ > limit;) {
      Arena& arena = *arenas_[i];
      for (auto range = arena.free.rbegin(); range != arena.free.rend() && kept_ > limit; ++range) {
        const size_t first = round_to(range->first, kHugePage) / kHugePage;
        for (size_t page = (range->first + range->second) / kHugePage; page-- > first && kept_ > limit;)
          if (arena.kept[page] && empty(arena.base + page * kHugePage)) {
            arena.kept[page] = 0;
            kept_ -= kHugePage;
          }
      }
    }
  }

  void return_unused() {
    empty_down_to(0);
    const auto unused = [this](const std::unique_ptr<Arena>& arena) {
      if (arena->free.size() != 1 || arena->free.begin()->second != arena->size) return false;
      kept_ -= kHugePage * size_t(std::count(arena->kept.begin(), arena->kept.end(), 1));
      mapped_ -= arena->size;
      unmap_pages(arena->base, arena->size);
      return true;
    };
    arenas_.erase(std::remove_if(arenas_.begin(), arenas_.end(), unused), arenas_.end());
    peak_ = live_;
  }

  std::mutex mutex_;
  std::vector<std::unique_ptr<Arena>> arenas_;
  std::unordered_map<void*, Block> taken_;
  size_t live_ = 0, peak_ = 0, kept_ = 0, mapped_ = 0;
  bool returning_ = false;
};

}  // namespace

Tensor new_map(const Tensor& like, const Sizes& shape) {
  const int64_t wanted = product({shape[0], shape[1], shape[2], shape[3], int64_t(like.element_size())});
  if (wanted == std::numeric_limits<int64_t>::max()) fail("no memory for a map of shape ", show(shape));
  const size_t bytes = size_t(wanted);
  if (like.device().type() != torch::headeronly::DeviceType::CPU || bytes < kLeastMap) return new_output(like, shape);
  const int64_t c = shape[1], h = shape[2], w = shape[3];
  const Sizes strides = is_channels_last(like) ? Sizes{h * w * c, 1, w * c, c} : Sizes{c * h * w, h * w, w, 1};
  void* const data = MapMemory::instance().allocate(bytes);
  if (!data) return new_output(like, shape);
  return torch::stable::from_blob(data, shape, strides, like.device(), like.scalar_type(),
                                  [](void* memory) { MapMemory::instance().release(memory); });
}

namespace {

Tensor empty_map(const Tensor& like, const Sizes& shape) {
  if (like.dim() != 4 || shape.size() != 4 || *std::min_element(shape.begin(), shape.end()) < 0)
    fail("empty_map: like must have four dimensions, shape four sizes; got ", show_shape(like), " and ", show(shape));
  return new_map(like, shape);
}

void release_maps() { MapMemory::instance().release_unused(); }

std::tuple<int64_t, int64_t, int64_t, int64_t> map_memory() { return MapMemory::instance().state(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lightning_prune, m) {
  m.def("empty_map(Tensor like, int[] shape) -> Tensor");
  m.def("release_maps() -> ()");
  m.def("map_memory() -> (int, int, int, int)");
}

STABLE_TORCH_LIBRARY_IMPL(lightning_prune, CompositeExplicitAutograd, m) {
  m.impl("empty_map", TORCH_BOX(&empty_map));
  m.impl("release_maps", TORCH_BOX(&release_maps));
  m.impl("map_memory", TORCH_BOX(&map_memory));
}

}  // namespace lp
