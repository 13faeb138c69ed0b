// Memory in huge pages, where the system gives them on request.
//
// In small pages, whose places in physical memory are a matter of chance, maps that fill most of the second-level cache push
// each other out of it: depthwise layers over 0.8 MB of maps took 42 or 62 us each with 1 MB of cache, by process.
#pragma once
#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace lp {

constexpr size_t kHugePage = size_t(2) << 20;

inline size_t round_to(size_t v, size_t to) { return (v + to - 1) / to * to; }

// Addresses at a multiple of huge pages, without memory behind them until they are written; nullptr if there are none.
inline char* reserve_pages([[maybe_unused]] size_t size) {
#if defined(__linux__)
  void* found = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (found == MAP_FAILED) return nullptr;
  char* const begin = static_cast<char*>(found);
  char* const base = reinterpret_cast<char*>(round_to(reinterpret_cast<uintptr_t>(begin), kHugePage));
  if (base > begin) munmap(begin, size_t(base - begin));
  if (base < begin + kHugePage) munmap(base + size, size_t(begin + kHugePage - base));
#if defined(MADV_HUGEPAGE)
  madvise(base, size, MADV_HUGEPAGE);  // advice: where there are none, pages are small
#endif
  return base;
#else
  return nullptr;
#endif
}

inline void unmap_pages([[maybe_unused]] char* base, [[maybe_unused]] size_t size) {
#if defined(__linux__)
  munmap(base, size);
#endif
}

// Uninitialised bytes of one owner that begin on a cache line, at least as many as wanted. Blocks that are used together begin
// at different places of a huge page: they would share cache sets.
class Pages {
 public:
  Pages() = default;
  explicit Pages(size_t wanted, size_t place = 0) : size_(wanted) {
    if (wanted >= kLeast) {
      const size_t whole = round_to(place + wanted, kHugePage);
      base_ = reserve_pages(whole);
      if (base_) {
        size_ = whole - place;
        data_ = base_ + place;
        return;
      }
    }
    if (size_) data_ = static_cast<char*>(::operator new(size_, kLine));
  }
  Pages(Pages&& other) noexcept { swap(other); }
  Pages& operator=(Pages&& other) noexcept {
    Pages taken(std::move(other));
    swap(taken);
    return *this;
  }
  ~Pages() {
    if (base_)
      unmap_pages(base_, size_t(data_ - base_) + size_);
    else if (data_)
      ::operator delete(data_, kLine);
  }
  char* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  static constexpr size_t kLeast = size_t(256) << 10;
  static constexpr std::align_val_t kLine{64};
  void swap(Pages& other) noexcept {
    std::swap(base_, other.base_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }
  char *base_ = nullptr, *data_ = nullptr;  // base_: of the pages, if it is in any
  size_t size_ = 0;
};

}  // namespace lp
