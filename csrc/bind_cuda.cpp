// bgkernels.backends.native._C.cuda: as bgkernels.backends.native._C (bind.cpp), with addresses of
// device memory.
#include "bind.h"
#include "cuda/launch.h"

namespace bgk {
namespace {

struct Gpu {
  // Device, stream, blocks that share a row, and memory for the floats and ints of each.
  typedef std::tuple<int, Address, int, Address, Address> Where;

  static cuda::Where of(const Where& where) {
    const auto& [device, stream, splits, floats, ints] = where;
    return {device, stream, splits, (float*)floats, (int64_t*)ints};
  }
  static int absorb(const AbsorbArgs& x, const Where& at) { return cuda::absorb(x, of(at)); }
  static int absorb_pairs(const PairArgs& x, const Where& at) {
    return cuda::absorb_pairs(x, of(at));
  }
  static int finalize(const FinalizeArgs& x, const Where& at) { return cuda::finalize(x, of(at)); }
  static int fold(const FoldArgs& x, const Where& at) { return cuda::fold(x, of(at)); }
  static int vjp(const VjpArgs& x, const Where& at) { return cuda::vjp(x, of(at)); }

  // Data and dtype of a gradient, and how many numbers; the factor, and whether it is a double.
  static int scale(const std::tuple<Address, int, int64_t>& x,
                   const std::pair<Address, bool>& factor, const Where& at) {
    const auto& [data, dtype, count] = x;
    const auto& [number, wide] = factor;
    return cuda::scale({(void*)data, count, (DType)dtype, (const void*)number, wide}, of(at));
  }
};

}  // namespace

void bind_cuda(py::module_ m) {
  bind_primitives<Gpu>(m);
  m.def("scale", &Gpu::scale, py::call_guard<py::gil_scoped_release>());
  m.def("probe", &cuda::probe);
  m.def("error", &cuda::error);
}

}  // namespace bgk
