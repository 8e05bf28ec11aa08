// The primitives of one target: rows are independent and shared out among threads.
#pragma once

#include "cpu/absorb.inl"
#include "cpu/coding.inl"
#include "cpu/dispatch.h"
#include "cpu/pairs.inl"
#include "cpu/vjp.inl"
#include "math/finalize.h"
#include "math/fold.h"

namespace bgk::BGK_TARGET {

// `least`: rows that are worth a thread.
template <class Args, void (*kRow)(const Args&, int64_t)>
int for_rows(const Args& args, int64_t rows, int64_t least, int threads) {
  const int64_t worth = (rows + least - 1) / least;
  if (worth < threads) threads = (int)worth;
  if (threads <= 1) {  // a team of one costs as much as a short row
    for (int64_t row = 0; row < rows; ++row) kRow(args, row);
    return kOk;
  }
  // Skipped rows cost nothing and come in runs, so threads take small shares as they go.
  const int64_t share = rows / (8 * threads) + 1;
#pragma omp parallel for schedule(dynamic, share) num_threads(threads)
  for (int64_t row = 0; row < rows; ++row) kRow(args, row);
  return kOk;
}

template <class Args, void (*kRow)(const Args&, int64_t)>
int over_tile(const Args& args, int threads) {
  return for_rows<Args, kRow>(args, args.tile.rows, 1, threads);
}

template <class Args, void (*kRow)(const Args&, int64_t)>
int over_numbers(const Args& args, int threads) {
  return for_rows<Args, kRow>(args, args.rows, 256, threads);
}

inline int decode_rows(const DecodeArgs& args, int threads) {
  return for_rows<DecodeArgs, decode_row>(args, args.rows, 1, threads);
}

#define BGK_NAME_OF(target) #target
#define BGK_NAME(target) BGK_NAME_OF(target)

const Kernels kernels = {BGK_NAME(BGK_TARGET),
                         kKinds,
                         over_tile<AbsorbArgs, absorb_row>,
                         over_tile<PairArgs, absorb_pairs_row>,
                         over_numbers<FinalizeArgs, finalize_row>,
                         over_numbers<FoldArgs, fold_row>,
                         over_tile<VjpArgs, vjp_row>,
                         over_tile<EncodeArgs, encode_row>,
                         decode_rows};

}  // namespace bgk::BGK_TARGET
