// Pass 1, second read: the pairwise statistics, which need both normalisers first.
#pragma once

#include "cpu/blocks.h"
#include "cpu/vec_math.h"
#include "math/extras.h"
#include "math/row_vjp.h"

namespace bgk::BGK_TARGET {

// Log-probabilities; the normalisers in two floats each, for differences of large ones.
struct LogProbs {
  Source z, v;
  Centre lse_s, lse_t;
  float by;

  LogProbs(const Source& z, const Source& v, double lse_s, double lse_t, float by)
      : z(z), v(v), lse_s(lse_s), lse_t(lse_t), by(by) {}

  BGK_INLINE Vec s(int i) const { return (z.at(i) * by - lse_s.value) - (float)lse_s.rest; }
  BGK_INLINE Vec t(int i) const { return (v.at(i) * by - lse_t.value) - (float)lse_t.rest; }
};

inline void mixture_sums(const LogProbs& x, int n, float omega, float out[3]) {
  Vec kl_tm{}, kl_sm{}, overlap{};
  for (int i = 0; i < n; i += kLanes) {
    const Vec lp = x.s(i), lq = x.t(i), p = exp(lp);
    const auto terms = mixture_terms<VecMath>(lp, lq, omega);
    kl_tm += times(exp(lq), terms.log_ratio_t);
    kl_sm += times(p, terms.log_ratio_s);
    overlap += times(p, terms.ratio);
  }
  out[0] += sum_of(kl_tm), out[1] += sum_of(kl_sm), out[2] += sum_of(overlap);
}

inline void variation_sums(const LogProbs& x, int n, float out[2]) {
  Vec distance{}, drift{};
  for (int i = 0; i < n; i += kLanes) {
    const Vec p = exp(x.s(i)), gap = p - exp(x.t(i));
    distance += gap * sign(gap);
    drift += p * sign(gap);
  }
  out[0] += 0.5f * sum_of(distance), out[1] += sum_of(drift);
}

inline void absorb_pairs_row(const PairArgs& args, int64_t row) {
  const Spec& spec = args.spec;
  alignas(64) float z[kBlock], v[kBlock];
  const int64_t compared = compared_columns(args.tile);
  for (int64_t first = 0; first < compared; first += kBlock) {
    const int n = block_size(first, compared, compared);
    const LogProbs x = {read_block(args.tile.student, row, first, n, z),
                        read_block(args.tile.teacher, row, first, n, v), args.lse_s[row],
                        args.lse_t[row], spec.inverse_temperature};
    float sums[3];
    float* to = args.sums + row;
    auto put = [&](int count) {
      for (int k = 0; k < count; ++k, to += args.sums_stride) *to += sums[k];
    };
    for (int k = 0; k < spec.mixture_count; ++k) {
      sums[0] = sums[1] = sums[2] = 0.0f;
      mixture_sums(x, n, spec.omegas[k], sums);
      put(3);
    }
    if (!spec.total_variation) continue;
    sums[0] = sums[1] = 0.0f;
    variation_sums(x, n, sums);
    put(2);
  }
}

}  // namespace bgk::BGK_TARGET
