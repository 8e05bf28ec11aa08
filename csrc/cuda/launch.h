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

// Blocks that share a row; their states go to `floats` (splits, 14 + 4·tilts, rows) and `ints`
// (splits, 3, rows). One needs neither.
struct Splits {
  int count;
  float* floats;
  int64_t* ints;
};

int absorb(const AbsorbArgs& args, const Splits& splits, const Where& where);

// Several splits leave (splits, ·, rows) in args.sums, which the caller adds up.
int absorb_pairs(const PairArgs& args, int splits, const Where& where);

int vjp(const VjpArgs& args, int splits, const Where& where);

// All passes of whole rows in one launch. `ranks`: blocks that hold a row in their shared memory,
// as residence() says; 0: none do, and each logit is read again by every pass. kNotComposed where
// separate() has a reason.
int compose(const ComposedArgs& args, int ranks, const Where& where);

// Null, or the reason why rows take separate passes.
const char* separate(const Spec& spec, const Tile& tile);

// Blocks that hold a row in their shared memory, or 0 and the reason why it must be streamed.
struct Residence {
  int blocks;
  const char* reason;  // null where there are blocks
};

Residence residence(const Tile& tile, const Where& where);

// Whether the kernels can run on a device: kOk, or what CUDA says.
int probe(int device);

// What CUDA says of a Status that it caused.
const char* error(int status);

}  // namespace bgk::cuda
