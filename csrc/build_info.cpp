// Plain pybind11 module: what the library was built for and what this CPU offers. Loads without torch.
#include <pybind11/pybind11.h>

#include <string>

#include "kernels/cpu/tap_conv.h"

#ifndef LP_TORCH_VERSION
#define LP_TORCH_VERSION "unknown"
#endif
#ifndef LP_CUDA_VERSION
#define LP_CUDA_VERSION ""
#endif
#ifndef LP_CUDA_ARCHS
#define LP_CUDA_ARCHS ""
#endif
#ifndef LP_CPU_LEVELS
#define LP_CPU_LEVELS "portable"
#endif

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "Build information and CPU features of the lightning-prune extension.";
  m.attr("torch_version") = LP_TORCH_VERSION;
  m.attr("cuda_version") = LP_CUDA_VERSION;
  m.attr("cuda_archs") = LP_CUDA_ARCHS;
  m.attr("cpu_levels_built") = LP_CPU_LEVELS;
  m.attr("compiler") = __VERSION__;
  m.def(
      "cpu_features",
      [] {
        pybind11::dict features;
        features["avx2"] = lp::cpu_has_avx2();
        features["avx512"] = lp::cpu_has_avx512();
        return features;
      },
      "Instruction sets that both this build and this CPU have.");
  m.def("cpu_level", [] { return std::string(lp::cpu_level_name()); }, "The level the kernels use now.");
}
