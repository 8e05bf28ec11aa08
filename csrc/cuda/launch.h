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

// Both passes of whole rows in one launch. `ranks`: blocks that hold a row in their shared memory,
// as resident_blocks() says; 0: none do, and each logit is read twice. kNotComposed where the
// objective or the dtypes ask for separate passes.
int compose(const ComposedArgs& args, int ranks, const Where& where);

// 0 where rows must be streamed: clusters take compute capability 9.0, vectors rows that begin and
// end on 16-byte boundaries, and the share of a block must fit its shared memory.
int resident_blocks(const Tile& tile, const Where& where);

// Whether the kernels can run on a device: kOk, or what CUDA says.
int probe(int device);

// What CUDA says of a Status that it caused.
const char* error(int status);

}  // namespace bgk::cuda
