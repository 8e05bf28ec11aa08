// The primitives on a CUDA device: as those of the CPU (row_args.h), with a device and a stream.
// Each starts kernels and waits for nothing; what CUDA answers is the Status.
#pragma once

#include "row_args.h"

namespace bgk::cuda {

// Makes `device` current for the calling thread; the caller restores what was. `stream`: a
// cudaStream_t.
struct Where {
  int device;
  uintptr_t stream;
};

// Blocks that share a row; what each has found goes to `floats` and `ints`, `count` times the
// columns of a state by rows. One needs neither.
struct Splits {
  int count;
  float* floats;
  int64_t* ints;
};

int absorb(const AbsorbArgs& args, const Splits& splits, const Where& where);

// Needs no ints.
int absorb_pairs(const PairArgs& args, const Splits& splits, const Where& where);

int finalize(const FinalizeArgs& args, const Where& where);

int fold(const FoldArgs& args, const Where& where);

int vjp(const VjpArgs& args, int splits, const Where& where);

// Whether the kernels can run on a device: kOk, or what CUDA says.
int probe(int device);

// What CUDA says of a Status that it caused.
const char* error(int status);

}  // namespace bgk::cuda
