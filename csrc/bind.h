// What the bindings of all devices share.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
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

// Addresses as they come from Python.
typedef std::tuple<Address, int64_t, Address, int64_t> Columns;  // floats and ints, a stride each
typedef std::pair<Address, int64_t> Sums;                        // and their stride
typedef std::pair<Address, Address> Normalisers;                 // of student and teacher
typedef std::tuple<Address, Address, Address> Factors;           // row, tilts, pairs

inline AbsorbArgs absorb_args(const OwnedSpec& spec, const Tile& tile, const Columns& state,
                              Address labels, int threads = 0) {
  const auto& [floats, floats_stride, ints, ints_stride] = state;
  return {spec.get(),     tile,        (float*)floats,         floats_stride,
          (int64_t*)ints, ints_stride, (const int64_t*)labels, threads};
}

inline PairArgs pair_args(const OwnedSpec& spec, const Tile& tile, const Sums& sums,
                          const Normalisers& lse, int threads = 0) {
  return {spec.get(),
          tile,
          (float*)sums.first,
          sums.second,
          (const double*)lse.first,
          (const double*)lse.second,
          threads};
}

inline VjpArgs vjp_args(const OwnedSpec& spec, const Tile& tile, const Logits& out,
                        const Factors& factors, Address labels, int threads = 0) {
  const auto& [row, tilts, pairs] = factors;
  return {spec.get(),
          tile,
          out,
          (const double*)row,
          (const double*)tilts,
          (const double*)pairs,
          (const int64_t*)labels,
          threads};
}

// Matrix products, and the primitives of csrc/cuda, as functions of a module.
void bind_product(py::module_& m);
void bind_cuda(py::module_ m);

}  // namespace bgk
