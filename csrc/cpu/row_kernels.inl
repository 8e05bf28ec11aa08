// The primitives of one target: rows are independent and shared out among threads.
#pragma once

#include "cpu/absorb.inl"
#include "cpu/dispatch.h"
#include "cpu/pairs.inl"
#include "cpu/vjp.inl"

namespace bgk::BGK_TARGET {

template <class Args, void (*kRow)(const Args&, int64_t)>
void for_rows(const Args& args) {
  const int64_t rows = args.tile.rows;
  if (args.threads == 1 || rows == 1) {  // a team of one costs as much as a short row
    for (int64_t row = 0; row < rows; ++row) kRow(args, row);
    return;
  }
  // Skipped rows cost nothing and come in runs, so threads take small shares as they go.
  const int64_t share = rows / (8 * args.threads) + 1;
#pragma omp parallel for schedule(dynamic, share) num_threads(args.threads)
  for (int64_t row = 0; row < rows; ++row) kRow(args, row);
}

#define BGK_NAME_OF(target) #target
#define BGK_NAME(target) BGK_NAME_OF(target)

const Kernels kernels = {BGK_NAME(BGK_TARGET), for_rows<AbsorbArgs, absorb_row>,
                         for_rows<PairArgs, absorb_pairs_row>, for_rows<VjpArgs, vjp_row>};

}  // namespace bgk::BGK_TARGET
