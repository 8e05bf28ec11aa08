// Matrices of 16-bit elements that are multiplied, and the micro-kernel that multiplies blocks of
// them, which another library brings. Nothing here knows whose it is.
#pragma once

#include <stdint.h>

#include <string>

namespace bgk {

// out (m, n) = a (m, k) · b (k, n), or added to what is there. `a` has rows of stride lda; `b`
// holds pairs of its rows, element (i, j) at (i/2)·2·ldb + 2·j + i%2. May throw before it writes.
typedef void (*MicroKernel)(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc,
                            bool add, const uint16_t* a, const uint16_t* b, float* c, bool pairs);
// Gives back what a thread that called the micro-kernel holds; may be null.
typedef void (*MicroRelease)(bool pairs);

enum OperandType : int32_t { kOperandBF16 = 1, kOperandF16 = 2 };  // as in row_args.h

// 16-bit elements, any strides.
struct Operand {
  const uint16_t* data;
  int64_t row_stride, column_stride;
};

// a (m, k) · b (k, n).
struct Factors {
  MicroKernel kernel;
  MicroRelease release;
  OperandType type;  // of a and b
  int64_t m, n, k;
  Operand a, b;
};

// What a micro-kernel computes, in loops.
void plain_product(OperandType type, int64_t m, int64_t n, int64_t k, int64_t lda, bool add,
                   const uint16_t* a, const uint16_t* b, int64_t ldb, float* c, int64_t ldc);

// Empty, or what is wrong with a micro-kernel: it throws, or its numbers are not those of a small
// product. Arguments in another order than expected stay within its buffers.
std::string check_kernel(MicroKernel kernel, MicroRelease release, OperandType type);

}  // namespace bgk
