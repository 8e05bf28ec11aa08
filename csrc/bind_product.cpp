// Matrix products, as functions of the module: addresses and strides in.
#include "bind.h"
#include "cpu/product.h"

using namespace pybind11::literals;

namespace bgk {
namespace {

typedef std::pair<Address, Address> MicroKernels;                // and what releases it, or 0
typedef std::tuple<Address, int64_t, int64_t> OperandAddress;    // strides of rows and columns
typedef std::tuple<Address, int64_t, bool, bool> ResultAddress;  // stride; bf16; add
typedef std::tuple<int64_t, int64_t, int64_t> Sizes;             // m, n, k

Operand operand(const OperandAddress& x) {
  return {(const uint16_t*)std::get<0>(x), std::get<1>(x), std::get<2>(x)};
}

void product(const MicroKernels& kernels, int dtype, const Sizes& sizes, const OperandAddress& a,
             const OperandAddress& b, const ResultAddress& out, int threads) {
  const auto& [m, n, k] = sizes;
  const auto& [to, stride, narrow, add] = out;
  const Factors factors = {(MicroKernel)kernels.first,
                           (MicroRelease)kernels.second,
                           (OperandType)dtype,
                           m,
                           n,
                           k,
                           operand(a),
                           operand(b)};
  multiply({factors, (void*)to, stride, narrow, add, threads});
}

std::string check_product(const MicroKernels& kernels, int dtype) {
  return check_kernel((MicroKernel)kernels.first, (MicroRelease)kernels.second, (OperandType)dtype);
}

}  // namespace

void bind_product(py::module_& m) {
  m.def("product", &product, "kernels"_a, "dtype"_a, "sizes"_a, "a"_a, "b"_a, "out"_a, "threads"_a,
        py::call_guard<py::gil_scoped_release>());
  m.def("check_product", &check_product, "kernels"_a, "dtype"_a);
}

}  // namespace bgk
