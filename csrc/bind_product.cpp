// Matrix products, as functions of the module: addresses and strides in.
#include "bind_product.h"

#include "bind.h"
#include "cpu/product.h"

using namespace pybind11::literals;

namespace bgk {
namespace {

typedef std::tuple<Address, int64_t, bool, bool> ResultAddress;  // stride; bf16; add

void product(const FactorArgs& factors, const ResultAddress& out, int threads) {
  const auto& [to, stride, narrow, add] = out;
  multiply({factors_of(factors), (void*)to, stride, narrow, add, threads});
}

std::string check_product(const MicroKernels& kernels, int dtype) {
  return check_kernel((MicroKernel)kernels.first, (MicroRelease)kernels.second, (OperandType)dtype);
}

}  // namespace

void bind_product(py::module_& m) {
  m.def("product", &product, "factors"_a, "out"_a, "threads"_a,
        py::call_guard<py::gil_scoped_release>());
  m.def("check_product", &check_product, "kernels"_a, "dtype"_a);
}

}  // namespace bgk
