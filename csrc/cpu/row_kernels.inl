// The primitives of one target: rows are independent and shared out among threads.
#pragma once

#include "cpu/absorb.inl"
#include "cpu/dispatch.h"
#include "cpu/pairs.inl"
#include "cpu/parallel.h"
#include "cpu/vjp.inl"
#include "math/finalize.h"
#include "math/fold.h"

namespace bgk::BGK_TARGET {

constexpr int64_t kLeastPairs = 1 << 14;  // columns of rows that are worth a thread
constexpr int64_t kLeastRows = 256;       // the same where a row is a handful of numbers

template <class Args, void (*kRow)(const Args&, int64_t)>
int for_rows(const Args& args, int64_t rows, int threads) {
  if (rows < threads) threads = (int)rows;
  if (threads <= 1) {  // a team of one costs as much as a short row
    for (int64_t row = 0; row < rows; ++row) kRow(args, row);
    return kOk;
  }
  // Skipped rows cost nothing and come in runs, so threads take small shares as they go.
  const int64_t share = rows / (8 * threads) + 1;
  in_parallel(threads,
              [&](Team& team) { team.share(rows, share, [&](int64_t row) { kRow(args, row); }); });
  return kOk;
}

template <class Args, void (*kRow)(const Args&, int64_t)>
int over_tile(const Args& args, int threads) {
  const int64_t rows = args.tile.rows, columns = args.tile.student.columns;
  return for_rows<Args, kRow>(args, rows, threads_for(rows * columns, kLeastPairs, threads));
}

template <class Args, void (*kRow)(const Args&, int64_t)>
int over_numbers(const Args& args, int threads) {
  return for_rows<Args, kRow>(args, args.rows, threads_for(args.rows, kLeastRows, threads));
}

#define BGK_NAME_OF(target) #target
#define BGK_NAME(target) BGK_NAME_OF(target)

const Kernels kernels = {BGK_NAME(BGK_TARGET),
                         kKinds,
                         over_tile<AbsorbArgs, absorb_row>,
                         over_tile<PairArgs, absorb_pairs_row>,
                         over_numbers<FinalizeArgs, finalize_row>,
                         over_numbers<FoldArgs, fold_row>,
                         over_tile<VjpArgs, vjp_row>};

}  // namespace bgk::BGK_TARGET
