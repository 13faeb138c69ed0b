// Memory for the maps of training steps: kept between steps, in huge pages where the system gives them on request.
#pragma once
#include "binding.h"

namespace lp {

// As new_output. On the CPU, maps that are not small lie in memory that is given out again once their tensors are gone: fresh
// memory costs a page fault every 4 KB, and maps of a network are far more pages than the processor has translations for.
Tensor new_map(const Tensor& like, const Sizes& shape);

}  // namespace lp
