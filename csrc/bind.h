// What the bindings of all devices share.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "row_args.h"

namespace py = pybind11;

namespace bgk {

typedef uintptr_t Address;

// A Spec that owns what it points to.
struct OwnedSpec {
  Spec plain{};
  std::vector<Tilt> tilts;
  std::vector<float> omegas;

  Spec get() const {
    Spec spec = plain;
    spec.tilts = tilts.data(), spec.omegas = omegas.data();
    spec.tilt_count = (int32_t)tilts.size(), spec.mixture_count = (int32_t)omegas.size();
    return spec;
  }
};

inline bool known(const Logits& x) { return x.dtype >= kF32 && x.dtype <= kF16; }

inline Status check(const Spec& spec, const Tile& tile) {
  if (!known(tile.student) || !known(tile.teacher)) return kUnknownDType;
  if (spec.rule < kIndex || spec.rule > kSample) return kUnknownRule;
  return spec.tilt_count > kMaxTilts ? kTooManyTilts : kOk;
}

// The primitives of csrc/cuda, as functions of a module.
void bind_cuda(py::module_ m);

}  // namespace bgk
