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

inline State state_of(const Numbers& floats, const Numbers& ints) {
  return {matrix<float>(floats), matrix<int64_t>(ints)};
}

inline Logits logits(const Rows& x, const Cap& map = {1.0f, 0.0f}) {
  const auto& [data, row_stride, columns, dtype] = x;
  return {(void*)data, row_stride, columns, (DType)dtype, map.scale, map.cap};
}

inline Tile tile_of(const BoundSpec& spec, const Rows& student, const Rows& teacher,
                    const Corner& corner) {
  const auto& [rows, first_row, first_column] = corner;
  return {logits(student, spec.student), logits(teacher, spec.teacher), rows, first_row,
          first_column};
}

inline Status check(const Logits& x) {
  return x.dtype >= kF32 && x.dtype <= kF16 ? kOk : kUnknownDType;
}

inline Status check(const Tile& tile) {
  const Status status = check(tile.student);
  return status ? status : check(tile.teacher);
}

// Matrix products, and the primitives of csrc/cuda, as functions of a module.
void bind_product(py::module_& m);
void bind_cuda(py::module_ m);

}  // namespace bgk
