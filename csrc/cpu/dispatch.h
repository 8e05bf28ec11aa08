// Which instruction set runs: chosen once, by what the processor has or by BGKERNELS_CPU_TARGET.
#pragma once

#include "row_args.h"

namespace bgk {

namespace baseline {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}

// Compiled targets that this processor can run, best first; null at the end.
const Kernels* const* cpu_targets();

// The target in use. Null while BGKERNELS_CPU_TARGET names one that cannot run here.
const Kernels* cpu_target();

// Makes `name` the target in use; false where it cannot run here.
bool set_cpu_target(const char* name);

}  // namespace bgk
