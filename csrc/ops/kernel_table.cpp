// Which kernels the CPU's operators run now.
#include "../kernels/cpu/tap_conv.h"

#include "binding.h"

namespace lp {
namespace {

// What the table that is in use says of itself: the level it was compiled for, and the floats of its vectors.
std::tuple<std::string, int64_t> kernel_table() {
  const CpuKernels& table = cpu_kernels();
  return {table.name, table.lanes};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lightning_prune, m) { m.def("kernel_table() -> (str, int)"); }

STABLE_TORCH_LIBRARY_IMPL(lightning_prune, CompositeExplicitAutograd, m) { m.impl("kernel_table", TORCH_BOX(&kernel_table)); }

}  // namespace lp
