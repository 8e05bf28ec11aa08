// Pass 1, second read: the pairwise statistics, which need both normalisers first.
#pragma once

#include "cuda/rows.cuh"
#include "math/extras.h"
#include "math/row_vjp.h"

namespace bgk::cuda {

// Log-probabilities of a row's columns.
struct LogProbs {
  Centre s, t;
  float by;

  BGK_DEVICE float of_s(float z) const { return (z * by - s.value) - (float)s.rest; }
  BGK_DEVICE float of_t(float v) const { return (v * by - t.value) - (float)t.rest; }
};

struct PairTerms {
  float sums[3];

  BGK_DEVICE void add_mixture(float lp, float lq, float omega) {
    const float p = fast_exp(lp);
    const auto x = mixture_terms<ScalarMath>(lp, lq, omega);
    sums[0] += times(fast_exp(lq), x.log_ratio_t);
    sums[1] += times(p, x.log_ratio_s);
    sums[2] += times(p, x.ratio);
  }
  BGK_DEVICE void add_variation(float lp, float lq) {
    const float p = fast_exp(lp), gap = p - fast_exp(lq);
    sums[0] += 0.5f * fabsf(gap);
    sums[1] += p * sign(gap);
  }
};

// Sums of one pairwise statistic, `extra` in the order of the mixtures and the total variation,
// over a block's share of a row: a line a warp.
template <class Format>
BGK_DEVICE void pair_share(const Spec& spec, int extra, const RowPair<Format>& rows,
                           const LogProbs& probs, const Share& share, float (*parts)[3]) {
  const bool mixture = extra < spec.mixture_count;
  const float omega = mixture ? spec.omegas[extra] : 0.0f;
  PairTerms terms = {};
  const Range range = rows.range(share.start, share.pair_stop, true);
  for (int i = warp(); i < range.steps(); i += kWarps) {
    const Step step = range.step(i);
    Batch<Format> s, t;
    float z[kColumns], v[kColumns];
    rows.s.fetch(step, s), rows.t.fetch(step, t);
    rows.s.real(s, z), rows.t.real(t, v);
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      const bool there = step.column<Format>(k) < step.stop;
      const float lp = there ? probs.of_s(z[k]) : kNegInf, lq = there ? probs.of_t(v[k]) : kNegInf;
      mixture ? terms.add_mixture(lp, lq, omega) : terms.add_variation(lp, lq);
    }
  }
  for (int k = 0; k < 3; ++k) {
    const float sum = warp_sum(terms.sums[k]);
    if (lane() == 0) parts[warp()][k] = sum;
  }
}

BGK_DEVICE float sum_of_warps(const float (*parts)[3], int k) {
  float total = 0.0f;
  for (int w = 0; w < kWarps; ++w) total += parts[w][k];
  return total;
}

// Grid (rows, splits, mixtures + total variation): each extra statistic reads the row on its own,
// as an objective seldom has two. One split adds to the sums; several leave theirs beside them, as
// (splits, ·, rows).
template <class Format>
__global__ void __launch_bounds__(kThreads, 3)
    pairs_kernel(const __grid_constant__ Launched<PairArgs> in) {
  __shared__ float parts[kWarps][3];
  const PairArgs& args = in.args;
  const Spec spec = in.spec();
  const int64_t row = block().x, split = block().y;
  const int extra = block().z;
  const RowPair<Format> rows(args.tile, row);
  const LogProbs probs = {Centre(args.lse_s[row]), Centre(args.lse_t[row]),
                          spec.inverse_temperature};
  pair_share(spec, extra, rows, probs, Share(args.tile, block().y, blocks().y), parts);
  sync_block();
  if (thread() >= (extra < spec.mixture_count ? 3 : 2)) return;
  const float total = sum_of_warps(parts, thread());
  float* to =
      args.sums + row + (split * pair_count(spec) + 3 * extra + thread()) * args.sums_stride;
  *to = blocks().y == 1 ? *to + total : total;
}

}  // namespace bgk::cuda
