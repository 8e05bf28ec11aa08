// Pass 1: a block absorbs a row of a tile, or its share of one.
#pragma once

#include "cuda/lane.cuh"

namespace bgk::cuda {

// Merges the states of a block's warps, and the one after them, into the first; warp 0 does it.
BGK_DEVICE void merge_warps(RowState<ScalarMath>* states, const Spec& spec) {
  for (int half = kWarps / 2;; half /= 2) {  // one call, so that the code is there once
    const int apart = half ? half : kWarps;
    if (lane() < half || lane() == 0) merge(states[lane()], states[lane() + apart], spec);
    sync_warp();
    if (half == 0) return;
  }
}

// The state that one of several splits writes.
BGK_DEVICE State part_of(const State& first, int64_t split, const Spec& spec) {
  const Matrix<float>& floats = first.floats;
  const Matrix<int64_t>& ints = first.ints;
  const int64_t columns = count_sums(spec);
  return {{floats.data + split * columns * floats.stride, floats.stride},
          {ints.data + split * 3 * ints.stride, ints.stride}};
}

template <class Format, Extras kExtras, bool kChoose>
BGK_DEVICE void absorb_range(Lane<Format, kExtras, kChoose>& lane, const Range& range,
                             bool paired) {
  const RowPair<Format>& rows = lane.rows;
  const int steps = range.steps();
  Batch<Format> s, t, next_s, next_t;
  auto fetch = [&](int i) {
    const Step step = range.step(i);
    rows.s.fetch(step, next_s);
    if (paired) rows.t.fetch(step, next_t);
  };
  int i = warp();
  if (i < steps) fetch(i);
  for (; i < steps; i += kWarps) {
    s = next_s, t = next_t;
    if (i + kWarps < steps) fetch(i + kWarps);  // in flight under the arithmetic
    lane.take(range.step(i), s, t, paired);
  }
}

// The states of a block's share of a row, one a warp.
template <class Format, Extras kExtras, bool kChoose>
BGK_DEVICE void absorb_share(const AbsorbArgs& args, const Spec& spec, int64_t row,
                             const RowPair<Format>& rows, const Share& share,
                             RowState<ScalarMath>* states) {
  const int64_t label = args.labels[row] - args.tile.first_column;
  const bool here = spec.rule == kIndex && label >= share.start && label < share.stop;
  const int given = here ? (int)label : -1;
  Lane<Format, kExtras, kChoose> x(args, spec, rows, row, given);
  for (int paired = 1; paired >= 0; --paired) {  // a loop, so that the code is there once
    const int start = paired ? share.start : share.pair_stop;
    const int stop = paired ? share.pair_stop : share.stop;
    absorb_range(x, rows.range(start, stop, paired), paired);
  }
  if (here && warp() == 0) {
    const float v = given < share.pair_stop ? rows.t.at(given) : kNegInf;
    x.held = {0.0f, rows.s.at(given), v, given};
  }
  x.finish(states[warp()]);
}

template <class Format, Extras kExtras, bool kChoose>
constexpr int kResidency = Format::kWords == 4 && kExtras != kAny && !kChoose ? kMostBlocks : 2;

// Grid (rows, splits). One split merges into the state; several write theirs, one after another.
template <class Format, Extras kExtras, bool kChoose>
__global__ void __launch_bounds__(kThreads, kResidency<Format, kExtras, kChoose>)
    absorb_kernel(const __grid_constant__ AbsorbArgs args) {
  __shared__ RowState<ScalarMath> states[kWarps + 1];
  const Spec& spec = args.spec;
  const int64_t row = block().x, split = block().y;
  if (args.labels[row] == kSkip) return;
  const State to = blocks().y == 1 ? args.state : part_of(args.state, split, spec);
  RowState<ScalarMath>& before = states[kWarps];
  if (thread() == 0) {
    if (blocks().y == 1) load_state(before, to, row, spec);
    if (blocks().y > 1) empty_state(before, spec);
  }
  const RowPair<Format> rows(args.tile, row);
  const Share share(args.tile, split, blocks().y);
  absorb_share<Format, kExtras, kChoose>(args, spec, row, rows, share, states);
  sync_block();
  if (warp() == 0) merge_warps(states, spec);
  if (thread() == 0) store_state(states[0], to, row, spec);
}

}  // namespace bgk::cuda
