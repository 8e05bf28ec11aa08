#include "cpu/dispatch.h"

#include <stdlib.h>
#include <string.h>

namespace bgk {
namespace {

struct Targets {
  const Kernels* usable[4] = {};

  Targets() {
    int n = 0;
#ifdef BGK_X86
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      usable[n++] = &avx512::kernels;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c"))
      usable[n++] = &avx2::kernels;
#endif
    usable[n] = &baseline::kernels;
  }

  const Kernels* find(const char* name) const {
    for (const Kernels* const* k = usable; *k; ++k) {
      if (strcmp((*k)->name, name) == 0) return *k;
    }
    return nullptr;
  }
};

const Targets& targets() {
  static const Targets all;
  return all;
}

const Kernels*& current() {
  static const char* const forced = getenv("BGKERNELS_CPU_TARGET");
  static const Kernels* target = forced && *forced ? targets().find(forced) : targets().usable[0];
  return target;
}

}  // namespace

const Kernels* const* cpu_targets() { return targets().usable; }

const Kernels* cpu_target() { return current(); }

bool set_cpu_target(const char* name) {
  const Kernels* found = targets().find(name);
  if (found) current() = found;
  return found != nullptr;
}

}  // namespace bgk
