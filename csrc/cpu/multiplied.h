// Primitives over tiles whose logits are multiplied as they are read: blocks of them exist in the
// cache of the thread that reads them, and nowhere else.
#pragma once

#include "cpu/factors.h"
#include "row_args.h"

namespace bgk {

// Logits a · b, and `bias` of each column, or null.
struct Multiplied {
  Factors factors;
  const float* bias;
};

// Each model's logits; null where they are given, or where there is no such model.
struct TileFactors {
  const Multiplied *student, *teacher;
};

// Calls a primitive for blocks of args.tile, its logits those products. Throws std::bad_alloc
// alone.
template <class Args>
int over_factors(int (*primitive)(const Args&, int threads), const Args& args,
                 const TileFactors& factors, int threads);

}  // namespace bgk
