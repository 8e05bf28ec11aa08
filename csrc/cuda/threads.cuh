// All that the kernels ask of the hardware. tests/cuda_emulation/ has a header of the same name
// that runs the same kernels on a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "row_args.h"

#define BGK_DEVICE __device__ __forceinline__

namespace bgk::cuda {

constexpr int kWarpSize = 32, kWarps = 8, kThreads = kWarps * kWarpSize;
typedef cudaStream_t Stream;

BGK_DEVICE int thread() { return threadIdx.x; }
BGK_DEVICE int lane() { return threadIdx.x % kWarpSize; }
BGK_DEVICE int warp() { return threadIdx.x / kWarpSize; }
BGK_DEVICE dim3 block() { return blockIdx; }
BGK_DEVICE dim3 blocks() { return gridDim; }

BGK_DEVICE void sync_block() { __syncthreads(); }
BGK_DEVICE void sync_warp() { __syncwarp(); }
BGK_DEVICE bool any_lane(bool x) { return __any_sync(~0u, x); }

template <class T>
BGK_DEVICE T exchanged(T x, int lanes_apart) {
  return __shfl_xor_sync(~0u, x, lanes_apart);
}

template <class T>
BGK_DEVICE T of_lane(T x, int from) {
  return __shfl_sync(~0u, x, from);
}

BGK_DEVICE char* dynamic_shared() {
  extern __shared__ __align__(16) char bytes[];
  return bytes;
}

// 2^x to 2 ulp, subnormal results flushed. e^x also has the rounding of x·log2 e, which counts for
// large |x|: a relative error of at most 2^-22 + |x|·2^-23.
constexpr float kLog2E = 1.44269504f;
BGK_DEVICE float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
BGK_DEVICE float fast_exp(float x) { return fast_exp2(x * kLog2E); }

BGK_DEVICE uint32_t high_product(uint32_t a, uint32_t b) { return __umulhi(a, b); }

// Words of memory, by one instruction.
template <int kWords>
BGK_DEVICE void load_words(const void* from, uint32_t* to) {
  static_assert(kWords == 4, "16 bytes");
  const uint4 x = *(const uint4*)from;
  to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}

template <int kWords>
BGK_DEVICE void store_words(void* to, const uint32_t* from) {
  static_assert(kWords == 2 || kWords == 4, "8 or 16 bytes");
  if (kWords == 2) *(uint2*)to = make_uint2(from[0], from[1]);
  if (kWords == 4) *(uint4*)to = make_uint4(from[0], from[1], from[2], from[3]);
}

BGK_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
BGK_DEVICE uint32_t as_bits(float x) { return __float_as_uint(x); }
BGK_DEVICE float from_f16(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
BGK_DEVICE uint16_t to_f16(float x) { return __half_as_ushort(__float2half_rn(x)); }
BGK_DEVICE uint16_t to_bf16(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }

// An error as a Status; it is ours to report, and must not turn up in a later call.
inline int as_status(cudaError_t error) {
  if (error == cudaSuccess) return kOk;
  (void)cudaGetLastError();
  return kCudaFailed + error;
}

inline int use(int device) { return as_status(cudaSetDevice(device)); }

inline const char* error_text(int status) {
  return cudaGetErrorString((cudaError_t)(status - kCudaFailed));
}

// Whether this device can run a kernel: whether there is code for it.
template <class Args>
int try_load(void (*kernel)(Args)) {
  cudaFuncAttributes attributes;
  return as_status(cudaFuncGetAttributes(&attributes, (const void*)kernel));
}

constexpr size_t kMoreShared = 48 * 1024;  // from here on, a kernel has to ask

// Starts a kernel of kThreads threads a block.
template <class Args>
int start(void (*kernel)(Args), dim3 grid, size_t shared_bytes, Stream stream, Args args) {
  if (shared_bytes > kMoreShared) {
    const cudaError_t error = cudaFuncSetAttribute(
        (const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes);
    if (error != cudaSuccess) return as_status(error);
  }
  void* pointers[] = {&args};
  return as_status(
      cudaLaunchKernel((const void*)kernel, grid, dim3(kThreads), pointers, shared_bytes, stream));
}

}  // namespace bgk::cuda
