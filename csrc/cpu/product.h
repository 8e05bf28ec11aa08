// Matrix products of 16-bit operands with fp32 results, in blocks over a micro-kernel.
#pragma once

#include "cpu/factors.h"

namespace bgk {

struct Product {
  Factors factors;
  void* out;       // (m, n), inner stride 1
  int64_t stride;  // of the rows of out
  bool narrow;     // out is bf16, not fp32
  bool add;        // to what out holds; not where it is narrow
  int threads;
};

// The same numbers for any number of threads. Throws std::bad_alloc alone.
void multiply(const Product& p);

}  // namespace bgk
