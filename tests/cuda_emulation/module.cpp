// The CUDA backend on the host, as a module beside bgkernels.backends.native._C, whose Spec, Logits and Tile it
// takes.
#include "bind_cuda.cpp"
#include "cuda/absorb.cu"
#include "cuda/composed.cu"
#include "cuda/vjp.cu"

PYBIND11_MODULE(cuda_emulated, m) {
  bgk::bind_cuda(m);
  m.def("run_backwards", [](bool yes) { bgk::cuda::machine().backwards = yes; });
  m.def("fail", [](int error) { bgk::cuda::machine().error = error; });
}
