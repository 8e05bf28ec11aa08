// What the bindings of all devices share: addresses and strides as they come from Python.
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
typedef std::tuple<Address, int64_t, int64_t, int> Rows;  // data, row stride, columns, dtype
typedef std::tuple<int64_t, int64_t, int64_t> Corner;     // rows; first row and column of the tile
typedef std::pair<Address, int64_t> Numbers;              // data and stride of a Matrix
typedef std::pair<Numbers, Numbers> Codes;                // words and centres

struct Cap {
  float scale, cap;
};

// A Spec, and the maps from raw to real logits, which the models' Logits carry.
struct BoundSpec {
  Spec plain{};
  Cap student, teacher;
};

template <class T>
Matrix<T> matrix(const Numbers& x) {
  return {(T*)x.first, x.second};
}

inline Logits logits(const Rows& x, const Cap& map = {1.0f, 0.0f}) {
  const auto& [data, row_stride, columns, dtype] = x;
  return {(void*)data, row_stride, columns, (DType)dtype, map.scale, map.cap};
}

inline Tile tile_of(const BoundSpec& spec, const Rows& student, const Rows& teacher,
                    const Corner& corner, const Codes& codes) {
  const auto& [rows, first_row, first_column] = corner;
  const Logits s = logits(student, spec.student), t = logits(teacher, spec.teacher);
  const Code code = {matrix<uint32_t>(codes.first), matrix<float>(codes.second)};
  return {s, t, rows, first_row, first_column, code};
}

inline bool readable(const Logits& x) { return x.dtype >= kF32 && x.dtype <= kF16; }
inline bool readable(const Tile& x) { return readable(x.student) && readable(x.teacher); }

// The primitives of a Device, as functions of a module; Where says how and where they run.
template <class Device>
void bind_primitives(py::module_ m) {
  typedef const typename Device::Where& Where;
  const py::call_guard<py::gil_scoped_release> unlocked;
  auto absorb = [](const BoundSpec& spec, const Rows& student, const Rows& teacher,
                   const Corner& corner, const Codes& codes, const Numbers& floats,
                   const Numbers& ints, Address labels, Where where) -> int {
    const State state = {matrix<float>(floats), matrix<int64_t>(ints)};
    const Tile tile = tile_of(spec, student, teacher, corner, codes);
    if (!readable(tile)) return kUnknownDType;
    return Device::absorb({spec.plain, tile, state, (const int64_t*)labels}, where);
  };
  auto absorb_pairs = [](const BoundSpec& spec, const Rows& student, const Rows& teacher,
                         const Corner& corner, const Codes& codes, const Numbers& floats,
                         Address labels, Address lse_s, Address lse_t, Where where) -> int {
    const Tile tile = tile_of(spec, student, teacher, corner, codes);
    if (!readable(tile)) return kUnknownDType;
    return Device::absorb_pairs({spec.plain, tile, matrix<float>(floats), (const int64_t*)labels,
                                 (const double*)lse_s, (const double*)lse_t},
                                where);
  };
  auto finalize = [](const BoundSpec& spec, int64_t rows, const Numbers& floats,
                     const Numbers& ints, Address labels, const Numbers& out, Where where) -> int {
    const State state = {matrix<float>(floats), matrix<int64_t>(ints)};
    return Device::finalize({spec.plain, rows, state, (const int64_t*)labels, matrix<double>(out)},
                            where);
  };
  auto fold = [](const BoundSpec& spec, int64_t rows, const Numbers& statistics,
                 const Numbers& grads, const Numbers& out, Where where) -> int {
    return Device::fold({spec.plain, rows, matrix<const double>(statistics),
                         matrix<const double>(grads), matrix<double>(out)},
                        where);
  };
  auto vjp = [](const BoundSpec& spec, const Rows& student, const Rows& teacher,
                const Corner& corner, const Codes& codes, const Rows& out, const Numbers& factors,
                Address labels, Where where) -> int {
    const Tile tile = tile_of(spec, student, teacher, corner, codes);
    if (!readable(tile) || !readable(logits(out))) return kUnknownDType;
    return Device::vjp(
        {spec.plain, tile, logits(out), matrix<const double>(factors), (const int64_t*)labels},
        where);
  };
  m.def("absorb", absorb, unlocked);
  m.def("absorb_pairs", absorb_pairs, unlocked);
  m.def("finalize", finalize, unlocked);
  m.def("fold", fold, unlocked);
  m.def("vjp", vjp, unlocked);
}

// Matrix products, the coding of kept tiles, and the primitives of csrc/cuda, as functions of a
// module.
void bind_product(py::module_& m);
void bind_cuda(py::module_ m);

}  // namespace bgk
