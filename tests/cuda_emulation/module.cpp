// The CUDA backend on the host, as a module beside bgkernels.backends.native._C, whose Spec it
// takes.
#include "bind_cuda.cpp"
#include "cuda/absorb.cu"
#include "cuda/finalize.cu"
#include "cuda/fold.cu"
#include "cuda/pairs.cu"
#include "cuda/scale.cu"
#include "cuda/vjp.cu"

PYBIND11_MODULE(cuda_emulated, m) {
  bgk::bind_cuda(m);
  m.def("run_backwards", [](bool yes) { bgk::cuda::machine().backwards = yes; });
  m.def("fail", [](int error) { bgk::cuda::machine().error = error; });
}
