// Pass 1: a block absorbs a row of a tile, or its share of one.
#pragma once

#include "cuda/lane.cuh"
#include "cuda/merge.cuh"

namespace bgk::cuda {

// The state that one of several splits writes.
BGK_DEVICE State part_of(const State& first, int64_t split, const Spec& spec) {
  const Matrix<float>& floats = first.floats;
  const Matrix<int64_t>& ints = first.ints;
  const int64_t columns = count_sums(spec);
  return {{floats.data + split * columns * floats.stride, floats.stride},
          {ints.data + split * 3 * ints.stride, ints.stride}};
}

// `next`: the first step, fetched.
template <class Format, Extras kExtras, bool kChoose>
BGK_DEVICE void absorb_range(Lane<Format, kExtras, kChoose>& lane, const Range& range, bool paired,
                             Ahead<Format>& next) {
  const int steps = range.steps();
  for (int i = warp(); i < steps; i += kWarps) {
    const Ahead<Format> now = next;
    next.fetch(lane.rows, range, i + kWarps, paired);  // in flight under the arithmetic
    lane.take(now.step, now.s, now.t, paired);
  }
}

// The states of a block's share of a row, one a warp. `next`: the first step of the columns that
// are compared, fetched.
template <class Format, Extras kExtras, bool kChoose>
BGK_DEVICE void absorb_share(const Shared<AbsorbArgs>& args, int64_t row,
                             const RowPair<Format>& rows, const Share& share, Range range,
                             Ahead<Format>& next, RowState<ScalarMath>& out) {
  const int64_t label = args.labels[row] - args.tile.first_column;
  const bool here = args.spec.rule == kIndex && label >= share.start && label < share.stop;
  const int given = here ? (int)label : -1;
  Lane<Format, kExtras, kChoose> x(args, rows, row, given);
  for (int paired = 1; paired >= 0; --paired) {  // a loop, so that the code is there once
    if (!paired) {
      range = rows.range(share.pair_stop, share.stop, false);
      next.fetch(rows, range, warp(), false);
    }
    absorb_range(x, range, paired, next);
  }
  if (here && warp() == 0) {
    const float v = given < share.pair_stop ? rows.t.at(given) : kNegInf;
    x.held = {0.0f, rows.s.at(given), v, given};
  }
  x.finish(out);
}

template <class Format, Extras kExtras, bool kChoose>
constexpr int kResidency = Format::kWords == 4 && kExtras != kAny && !kChoose ? kMostBlocks : 2;

// Grid (rows, splits). One split merges into the state; several write theirs, one after another.
// The first logits are asked for before anything else that takes time.
template <class Format, Extras kExtras, bool kChoose>
__global__ void __launch_bounds__(kThreads, kResidency<Format, kExtras, kChoose>)
    absorb_kernel(const __grid_constant__ Shared<AbsorbArgs> args) {
  __shared__ RowState<ScalarMath> states[kWarps + 1];
  const Spec& spec = args.spec;
  const int64_t row = block().x, split = block().y;
  if (args.labels[row] == kSkip) return;
  const RowPair<Format> rows(args.tile, row);
  const Share share(args.tile, (int)split, args.each);
  const bool coded = Format::kVector == 4 && args.tile.code.words.data;
  const Range range = rows.range(
      share.start, share.pair_stop, true,
      [&](int column) {
        return !coded || (column == share.start && CodeSink(args.tile.code, row).aligned());
      },
      coded ? kStep : Format::kVector);
  Ahead<Format> next;
  next.fetch(rows, range, warp(), true);
  const bool alone = blocks().y == 1;
  if (alone && thread() == kThreads - 1) load_state(states[kWarps], args.state, row, spec);
  absorb_share<Format, kExtras, kChoose>(args, row, rows, share, range, next, states[warp()]);
  sync_block();
  if (warp() > 0) return;
  merge_lanes<kChoose>(states, kWarps + alone, spec);
  if (lane() == 0)
    store_state(states[0], alone ? args.state : part_of(args.state, split, spec), row, spec);
}

}  // namespace bgk::cuda
