// Run-time choice of the instruction set.
#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>
#if defined(LP_HAVE_X86_LEVELS)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <unistd.h>
#endif

#include "tap_conv.h"

namespace lp {

#if defined(LP_HAVE_X86_LEVELS)
bool cpu_has_avx2() {
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return has;
}
bool cpu_has_avx512() {
  static const bool has = cpu_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return has;
}
bool cpu_halves_vectors() {
  static const bool halves = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    // AMD's family 25 (Zen 4) sends vectors of 64 bytes through units of 32, family 26 (Zen 5) does not.
    return __builtin_cpu_is("amd") && __get_cpuid(1, &a, &b, &c, &d) && (a >> 8 & 0xf) + (a >> 20 & 0xff) == 25;
  }();
  return halves;
}
#else
bool cpu_halves_vectors() { return false; }
bool cpu_has_avx2() { return false; }
bool cpu_has_avx512() { return false; }
#endif

int l1_ways() {
  static const int ways = [] {
    long bytes = 0;
#if defined(_SC_LEVEL1_DCACHE_SIZE)
    bytes = sysconf(_SC_LEVEL1_DCACHE_SIZE);
#endif
    return bytes > 0 ? int(std::clamp(bytes / 4096, 4L, 32L)) : 8;
  }();
  return ways;
}

namespace {

// Letters of either case: what is accepted does not depend on the locale.
bool same_word(const char* given, const char* word) {
  for (; *given && *word; ++given, ++word)
    if ((*given >= 'A' && *given <= 'Z' ? *given - 'A' + 'a' : *given) != *word) return false;
  return *given == *word;
}

}  // namespace

const char* cpu_level_name() {
  const char* cap = std::getenv("LIGHTNING_PRUNE_CPU_LEVEL");
  if (!cap || !*cap || same_word(cap, "avx512")) return cpu_has_avx512() ? "avx512" : cpu_has_avx2() ? "avx2" : "portable";
  if (same_word(cap, "avx2")) return cpu_has_avx2() ? "avx2" : "portable";
  if (same_word(cap, "portable")) return "portable";
  throw std::runtime_error(std::string("LIGHTNING_PRUNE_CPU_LEVEL must be one of portable, avx2, avx512 or unset; got '") +
                           cap + "'");
}

}  // namespace lp
