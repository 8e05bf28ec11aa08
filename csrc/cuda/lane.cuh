// Pass 1: what a lane of a warp does with the columns of a row.
#pragma once

#include "cuda/code.cuh"
#include "math/row_state.h"

namespace bgk::cuda {

// bgkernels/sampling.py: a standard Gumbel number, the same in every backend.
BGK_DEVICE float gumbel(uint32_t column, uint32_t row, uint32_t key) {
#pragma unroll
  for (int round = 0; round < 10; ++round, key += 0x9E3779B9u) {
    const uint32_t high = high_product(column, 0xD256D193u);
    const uint32_t low = column * 0xD256D193u;
    column = high ^ key ^ row, row = low;
  }
  return -logf(-logf(((float)(column >> 9) + 0.5f) * 0x1p-23f));
}
constexpr float kMostNoise = 16.7f;  // no Gumbel number is larger, roundings included

// The extras of the first read: none; Σ e^(b·v) alone, in a register; any, in shared memory.
enum Extras { kNoExtra, kPower, kAny };

// A lane's columns of a step as math/extras.h takes them.
struct Block8 {
  static constexpr int n = kColumns;
  const float (&s)[kColumns];
  const float (&t)[kColumns];

  BGK_DEVICE float du(int k) const { return s[k]; }
  BGK_DEVICE float dv(int k) const { return t[k]; }
};

// The label that a warp holds out, the same in all its lanes. z, v: real logits.
struct Held {
  float score, z, v;
  int column;  // of the tile
};

// One lane's part of the sums, about maxima that its warp has in common: so sharing a row needs no
// exponentials, and the rare rise of a maximum happens to all lanes at once.
template <class Format, Extras kExtras, bool kChoose>
struct Lane {
  const Shared<AbsorbArgs>& args;
  const Spec& spec;
  const RowPair<Format>& rows;
  int64_t row;
  int given;                      // column of the label if it is known, else -1
  ExtraSums<ScalarMath>* shared;  // this lane's sums of the extras, kThreads apart
  float z_top = kNegInf, v_top = kNegInf, m_c = kNegInf;  // maxima of real logits
  int argmax_s = -1, argmax_t = -1;
  Held held = {kNegInf, kNegInf, kNegInf, -1};
  PairSums<float> sums = {};
  float d_c = 0.0f, z_sum = 0.0f, power = 0.0f, power_base2 = 0.0f;
  int power_at = 0;

  BGK_DEVICE Lane(const Shared<AbsorbArgs>& args, const RowPair<Format>& rows, int64_t row,
                  int given)
      : args(args),
        spec(args.spec),
        rows(rows),
        row(row),
        given(given),
        shared((ExtraSums<ScalarMath>*)dynamic_shared() + thread()) {
    if (kExtras == kNoExtra) return;
    each_extra<ScalarMath>(spec, [&](const auto& statistic, int i, const Offsets&) {
      if (kExtras == kAny) sums_of(i) = {kNegInf, {}};
      if (kExtras == kPower && statistic.power() != 0.0)
        power_at = i, power_base2 = (float)statistic.power() * kLog2E;
    });
  }

  BGK_DEVICE float by() const { return spec.inverse_temperature; }
  BGK_DEVICE float m_s() const { return z_top * by(); }
  BGK_DEVICE float m_t() const { return v_top * by(); }
  BGK_DEVICE ExtraSums<ScalarMath>& sums_of(int i) const { return shared[i * kThreads]; }

  // The lanes' logits of a step. `slot` holds another column than it should: the label that lost.
  struct Logits8 {
    const Step& step;
    float z[kColumns], v[kColumns];
    int slot = -1, slot_column = -1;
    uint32_t kept = (1u << kColumns) - 1;  // columns that are there

    BGK_DEVICE explicit Logits8(const Step& step) : step(step) {}
    BGK_DEVICE int column(int k) const {
      return kChoose && k == slot ? slot_column : step.column<Format>(k);
    }
    // The warp's first column where x is `top`.
    BGK_DEVICE int first(const float* x, float top) const {
      int found = INT32_MAX;
      unrolled([&](int k) {
        const int at = column(k);
        found = x[k] == top && at < found ? at : found;
      });
      return warp_min(found);
    }
  };

  BGK_DEVICE static float largest(const float* x) {
    float most = x[0];
#pragma unroll
    for (int k = 1; k < kColumns; ++k) most = fmaxf(most, x[k]);
    return most;
  }

  BGK_DEVICE void take(const Step& step, const Batch<Format>& s, const Batch<Format>& t,
                       bool paired) {
    Logits8 x(step);
    rows.real(step, paired, s, t, x.z, x.v);
    if (Format::kVector == 4 && args.tile.code.words.data)
      CodeSink(args.tile.code, row).put<Format>(step, paired, x.z, x.v);
    if (!step.whole() || step.has(given)) {
      unrolled([&](int k) {
        const int column = step.column<Format>(k);
        if (column < step.stop && column != given) return;
        x.z[k] = x.v[k] = kNegInf, x.kept &= ~(1u << k);
      });
    }
    if (kChoose && paired && spec.rule != kIndex) choose(x);
    if (spec.logit_sum) {
      unrolled([&](int k) { z_sum += x.kept >> k & 1 ? x.z[k] : 0.0f; });
    }
    const float z_most = largest(x.z);
    if (paired) take_pair(x, z_most);
    // At T = 1 the cross-entropy's terms are the comparison's: finish() takes them from there.
    if (!paired || by() != 1.0f) take_hard(x.z, z_most);
  }

  BGK_DEVICE void take_hard(const float* z, float most) {
    if (any_lane(most > m_c)) {
      const float top = fmaxf(m_c, warp_max(most));
      d_c *= expf(moved(m_c, top));
      m_c = top;
    }
    const float centre = shift(m_c);
    unrolled([&](int k) { d_c += fast_exp(z[k] - centre); });
  }

  BGK_DEVICE void take_pair(Logits8& x, float z_most) {
    const float v_most = largest(x.v);
    if (any_lane(z_most > z_top || v_most > v_top)) raise(x, z_most, v_most);
    const float c_s = shift(m_s()), c_t = shift(m_t());
    float du[kColumns], dv[kColumns];
    unrolled([&](int k) {
      du[k] = x.z[k] * by() - c_s, dv[k] = x.v[k] * by() - c_t;
      const float e_s = fast_exp(du[k]), e_t = fast_exp(dv[k]), gap = du[k] - dv[k];
      sums.d_s += e_s, sums.d_t += e_t;
      if (e_s != 0.0f) sums.h_s += e_s * du[k], sums.k_s += e_s * gap;
      if (e_t != 0.0f) sums.h_t += e_t * dv[k], sums.k_t -= e_t * gap;
      if (kExtras == kPower) power += fast_exp2(dv[k] * power_base2);
    });
    if (kExtras == kAny) {
      const Block8 block = {du, dv};
      each_extra<ScalarMath>(spec, [&](const auto& statistic, int i, const Offsets&) {
        if (!statistic.kSecondRead) statistic.absorb(sums_of(i), block);
      });
    }
  }

  BGK_DEVICE void raise(const Logits8& x, float z_most, float v_most) {
    const float z = fmaxf(z_top, warp_max(z_most)), v = fmaxf(v_top, warp_max(v_most));
    if (z > z_top) argmax_s = x.first(x.z, z);
    if (v > v_top) argmax_t = x.first(x.v, v);
    const float by_s = moved(m_s(), z * by()), by_t = moved(m_t(), v * by());
    recentre(sums, by_s, by_t);
    if (kExtras == kPower) power *= exp2f(power_base2 * by_t);
    if (kExtras == kAny) {
      each_extra<ScalarMath>(spec, [&](const auto& statistic, int i, const Offsets&) {
        statistic.raise(sums_of(i), by_s, by_t);
      });
    }
    z_top = z, v_top = v;
  }

  // Changes places with a better label among these columns, if there is one.
  BGK_DEVICE void choose(Logits8& x) {
    float scores[kColumns];
    if (spec.rule == kSample &&
        !any_lane(largest(x.v) + kMostNoise > held.score || held.column < 0))
      return;
    unrolled([&](int k) {
      const int64_t column = args.tile.first_column + x.column(k);
      scores[k] = x.v[k];
      if (spec.rule == kSample)
        scores[k] += gumbel((uint32_t)column, (uint32_t)(args.tile.first_row + row), spec.key);
    });
    const float best = largest(scores);
    if (!any_lane(best > held.score || held.column < 0)) return;
    const float top = fmaxf(held.score, warp_max(best));
    const int column = x.first(scores, top);
    if (column == INT32_MAX) return;  // NaN
    Held found = {top, 0.0f, 0.0f, column};
    int owner = kWarpSize;
    unrolled([&](int k) {
      if (x.column(k) != column) return;
      found.z = x.z[k], found.v = x.v[k], owner = lane();
      x.z[k] = held.z, x.v[k] = held.v, x.slot = k;
      if (held.column < 0) x.kept &= ~(1u << k);
    });
    x.slot_column = held.column;
    if (held.column >= 0) {  // the one that lost is absorbed with this step
      if (held.z == z_top && held.column < argmax_s) argmax_s = held.column;
      if (held.v == v_top && held.column < argmax_t) argmax_t = held.column;
    }
    owner = warp_min(owner);
    held = {top, of_lane(found.z, owner), of_lane(found.v, owner), column};
  }

  // The warp's state.
  BGK_DEVICE void finish(RowState<ScalarMath>& out) {
    PairSums<float>& x = sums;
    x.d_s = warp_sum(x.d_s), x.h_s = warp_sum(x.h_s), x.k_s = warp_sum(x.k_s);
    x.d_t = warp_sum(x.d_t), x.h_t = warp_sum(x.h_t), x.k_t = warp_sum(x.k_t);
    d_c = warp_sum(d_c), z_sum = warp_sum(z_sum), power = warp_sum(power);
    const int64_t first = args.tile.first_column;
    if (lane() == 0) {
      empty_state(out, spec);
      out.m_s = m_s(), out.m_t = m_t(), out.m_c = m_c;
      out.pair = x, out.d_c = d_c, out.z_sum = z_sum;
      if (argmax_s >= 0) out.argmax_s = first + argmax_s;
      if (argmax_t >= 0) out.argmax_t = first + argmax_t;
      if (held.column >= 0) out.label = {first + held.column, held.score, held.z, held.v * by()};
      if (by() == 1.0f && !spec.shared_softmax) {
        raise_hard(out, fmaxf(m_c, out.m_s));
        out.d_c += x.d_s * expf(moved(out.m_s, out.m_c));
      }
      if (kExtras == kPower) out.extras[power_at] = {0.0f, {power}};
    }
    if (kExtras != kAny) return;
    each_extra<ScalarMath>(spec, [&](const auto& statistic, int i, const Offsets&) {
      ExtraSums<ScalarMath> y = sums_of(i);
      statistic.raise_own(y, warp_max(y.m));
#pragma unroll
      for (float& sum : y.x) sum = warp_sum(sum);
      if (lane() == 0) out.extras[i] = y;
    });
  }
};

}  // namespace bgk::cuda
