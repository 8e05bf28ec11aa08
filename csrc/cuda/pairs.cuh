// Pass 1, second read: the statistics that need both normalisers first.
#pragma once

#include "cuda/rows.cuh"
#include "math/row_vjp.h"

namespace bgk::cuda {

// Log-probabilities of a row's columns.
struct LogProbs {
  float s, t, rest_s, rest_t;  // log-sum-exps, and what they leave as floats
  float by;

  LogProbs() = default;
  BGK_DEVICE LogProbs(double lse_s, double lse_t, float by)
      : s((float)lse_s),
        t((float)lse_t),
        rest_s((float)(lse_s - s)),
        rest_t((float)(lse_t - t)),
        by(by) {}
  BGK_DEVICE float of_s(float z) const { return (z * by - s) - rest_s; }
  BGK_DEVICE float of_t(float v) const { return (v * by - t) - rest_t; }
};

// Sums of one statistic over a block's share of a row: a line a warp. `next`: the first step,
// fetched.
template <class Statistic, class Format>
BGK_DEVICE void pair_share(const Statistic& statistic, const RowPair<Format>& rows,
                           const LogProbs& probs, const Range& range, Ahead<Format>& next,
                           float (*parts)[4]) {
  float sums[4] = {};
  for (int i = warp(); i < range.steps(); i += kWarps) {
    float z[kColumns], v[kColumns];
    const Step step = next.step;
    rows.real(step, true, next.s, next.t, z, v);
    next.fetch(rows, range, i + kWarps, true);
    unrolled([&](int k) {
      const bool there = step.column<Format>(k) < step.stop;
      const float lp = there ? probs.of_s(z[k]) : kNegInf, lq = there ? probs.of_t(v[k]) : kNegInf;
      statistic.add(sums, lp, lq);
    });
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float sum = warp_sum(sums[k]);
    if (lane() == 0) parts[warp()][k] = sum;
  }
}

// Grid (rows, splits, extras): each statistic reads the row on its own, as an objective seldom has
// two. One split adds to the state; several write their sums, one after another.
template <class Format>
__global__ void __launch_bounds__(kThreads, Format::kWords == 4 ? kMostBlocks : 2)
    pairs_kernel(const __grid_constant__ Shared<PairArgs> args) {
  __shared__ float parts[kWarps][4];
  const int64_t row = block().x, split = block().y;
  if (args.labels[row] == kSkip) return;
  const RowPair<Format> rows(args.tile, row);
  const Share share(args.tile, (int)split, args.each);
  const Range range = rows.range(share.start, share.pair_stop, true);
  Ahead<Format> next;
  next.fetch(rows, range, warp(), true);
  const LogProbs probs(args.lse_s[row], args.lse_t[row], args.spec.inverse_temperature);
  int first = 0, count = 0;
  each_extra<ScalarMath>(args.spec, [&](const auto& statistic, int i, const Offsets& at) {
    if (i != (int)block().z || !statistic.kSecondRead) return;
    first = at.sums, count = statistic.kSums;
    pair_share(statistic, rows, probs, range, next, parts);
  });
  sync_block();
  if (thread() >= count) return;
  float total = 0.0f;
  for (int w = 0; w < kWarps; ++w) total += parts[w][thread()];
  float* to = args.floats.data +
              (split * count_sums(args.spec) + first + thread()) * args.floats.stride + row;
  *to = blocks().y == 1 ? *to + total : total;
}

}  // namespace bgk::cuda
