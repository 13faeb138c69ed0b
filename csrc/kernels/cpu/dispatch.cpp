// The kernel table for the level that cpu_level.cpp chose.
#include <cstring>

#include "tap_conv.h"

namespace lp {

const CpuKernels& cpu_kernels() {
#if defined(LP_HAVE_X86_LEVELS)
  const char* level = cpu_level_name();
  if (std::strcmp(level, "avx512") == 0) return cpu_kernels_avx512();
  if (std::strcmp(level, "avx2") == 0) return cpu_kernels_avx2();
#endif
  return cpu_kernels_portable();
}

}  // namespace lp
