// Run-time choice of the instruction set.
#include <algorithm>
#include <cstdlib>
#include <cstring>
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
#else
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

const char* cpu_level_name() {
  const char* cap = std::getenv("LIGHTNING_PRUNE_CPU_LEVEL");
  if (cap && std::strcmp(cap, "portable") == 0) return "portable";
  if (cpu_has_avx512() && !(cap && std::strcmp(cap, "avx2") == 0)) return "avx512";
  return cpu_has_avx2() ? "avx2" : "portable";
}

}  // namespace lp
