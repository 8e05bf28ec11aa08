// The primitives on a CUDA device: as those of the CPU (row_args.h), with a device and a stream.
// Each starts kernels and waits for nothing; what CUDA answers is the Status.
#pragma once

#include "row_args.h"

namespace bgk::cuda {

constexpr int kMostSplits = 31;  // their states, and the one before them, are a warp's

// Makes `device` current for the calling thread; the caller restores what was.
struct Where {
  int device;
  uintptr_t stream;  // a cudaStream_t
  int splits;        // blocks that share a row
  float* floats;     // (splits, columns of a state, rows), for what each has found; null for one
  int64_t* ints;     // (splits, 3, rows), of absorb() alone
};

int absorb(const AbsorbArgs& args, const Where& where);
int absorb_pairs(const PairArgs& args, const Where& where);
int finalize(const FinalizeArgs& args, const Where& where);
int fold(const FoldArgs& args, const Where& where);
int vjp(const VjpArgs& args, const Where& where);
int scale(const ScaleArgs& args, const Where& where);  // splits: of its blocks at most

// Whether the kernels can run on a device: kOk, or what CUDA says.
int probe(int device);

// What CUDA says of a Status that it caused.
const char* error(int status);

}  // namespace bgk::cuda
