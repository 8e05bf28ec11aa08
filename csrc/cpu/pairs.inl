// Pass 1, second read: the statistics that need both normalisers first.
#pragma once

#include "cpu/code.inl"
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

template <class Statistic>
__attribute__((noinline)) void add_extra(const Statistic& statistic, const LogProbs& x, int n,
                                         Column<float> to) {
  Vec sums[4] = {};
  for (int i = 0; i < n; i += kLanes) statistic.add(sums, x.s(i), x.t(i));
  for (int k = 0; k < statistic.kSums; ++k) to[k] += sum_of(sums[k]);
}

inline void absorb_pairs_row(const PairArgs& args, int64_t row) {
  if (args.labels[row] == kSkip) return;
  const Spec& spec = args.spec;
  alignas(64) float z[kBlock], v[kBlock];
  const int64_t compared = compared_columns(args.tile);
  const Column<float> floats(args.floats, row);
  for (int64_t first = 0; first < compared; first += kBlock) {
    const int n = block_size(first, compared, compared);
    const Pair pair = read_pair(args.tile, row, first, n, true, z, v);
    const LogProbs x = {pair.z, pair.v, args.lse_s[row], args.lse_t[row], spec.inverse_temperature};
    each_extra<VecMath>(spec, [&](const auto& statistic, int, const Offsets& at) {
      if (statistic.kSecondRead) add_extra(statistic, x, n, floats.from(at.sums));
    });
  }
}

}  // namespace bgk::BGK_TARGET
