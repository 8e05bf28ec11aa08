// Several states of a row become one.
#pragma once

#include "cuda/rows.cuh"
#include "math/row_state.h"

namespace bgk::cuda {

// Sums over the lanes that have a state, in that of the first.
struct LaneSums {
  bool mine;

  BGK_DEVICE void number(float&) {}
  BGK_DEVICE void index(int64_t&) {}
  BGK_DEVICE void sum(float& x) {
    const float total = warp_sum(mine ? x : 0.0f);
    if (lane() == 0) x = total;
  }
};

// The lowest column of the lanes that name one, or kNone.
BGK_DEVICE int64_t lowest(bool named, int64_t column) {
  const int64_t least = warp_min(named ? column : INT64_MAX);
  return least == INT64_MAX ? kNone : least;
}

// The best label of all lanes; the others are absorbed by those that have them.
template <bool kChoose>
BGK_DEVICE Label<float> merge_labels(RowState<ScalarMath>& x, bool mine, const Spec& spec) {
  Label<float> label = {kNone, kNegInf, kNegInf, kNegInf};
  if (mine) label = x.label;
  const bool there = label.column != kNone;
  const float score = warp_max(label.score);
  const int64_t column = lowest(there && label.score == score, label.column);
  const bool best = there && label.column == column;
  if (kChoose && spec.rule != kIndex && there && !best)
    absorb_column(x, label.column, label.z, label.v, spec);
  const int owner = warp_min(best ? lane() : kWarpSize);
  if (owner == kWarpSize) return {kNone, kNegInf, kNegInf, kNegInf};
  return {column, score, of_lane(label.z, owner), of_lane(label.v, owner)};
}

// Merges `count` states, one a lane of a warp, into the first: all at once they move to maxima in
// common, about which merging is adding. `kChoose`: whether labels may be chosen by their scores.
template <bool kChoose>
BGK_DEVICE void merge_lanes(RowState<ScalarMath>* states, int count, const Spec& spec) {
  const bool mine = lane() < count;
  RowState<ScalarMath>& x = states[mine ? lane() : 0];  // others touch nothing
  const Label<float> label = merge_labels<kChoose>(x, mine, spec);
  const float m_s = warp_max(mine ? x.m_s : kNegInf), m_t = warp_max(mine ? x.m_t : kNegInf);
  const float m_c = warp_max(mine ? x.m_c : kNegInf);
  const int64_t argmax_s = lowest(mine && x.m_s == m_s && x.argmax_s != kNone, x.argmax_s);
  const int64_t argmax_t = lowest(mine && x.m_t == m_t && x.argmax_t != kNone, x.argmax_t);
  if (mine) raise_pair(x, m_s, m_t, spec), raise_hard(x, m_c);
  LaneSums sums = {mine};
  each_column(x, sums);
  each_extra<ScalarMath>(spec, [&](const auto& statistic, int i, const Offsets&) {
    ExtraSums<ScalarMath>& y = x.extras[i];
    if (statistic.kMaximum) {
      const float m = warp_max(mine ? y.m : kNegInf);
      if (mine) statistic.raise_own(y, m);
    }
    each_column(statistic, y, sums);
  });
  if (lane() == 0) x.label = label, x.argmax_s = argmax_s, x.argmax_t = argmax_t;
}

}  // namespace bgk::cuda
