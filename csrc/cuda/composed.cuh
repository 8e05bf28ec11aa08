// Both passes in one launch, for whole rows and objectives of math/objective.h.
#pragma once

#include "cuda/absorb.cuh"
#include "cuda/vjp.cuh"
#include "math/objective.h"

namespace bgk::cuda {

// At the head of dynamic shared memory, where the other blocks of a cluster find it; in the
// resident form the block's share of both rows follows.
struct Composed {
  RowState<float> states[kWarps + 1];
  RowState<float> gathered[kMaxCluster];
  VjpShared vjp;
};
constexpr size_t kComposedBytes = (sizeof(Composed) + 15) / 16 * 16;

BGK_DEVICE void copy_bytes(char* shared, const char* from, int bytes) {
  for (int i = 16 * thread(); i < bytes; i += 16 * kThreads) copy_async(shared + i, from + i);
}

// Copies a block's share of both rows, and lets `rows` read the copy.
template <class Format>
BGK_DEVICE void make_resident(RowPair<Format>& rows, const Share& share, char* shared) {
  const int64_t s_bytes = bytes_of(rows.s.dtype), t_bytes = bytes_of(rows.t.dtype);
  char* t_shared = shared + (share.stop - share.start) * s_bytes;
  copy_bytes(shared, rows.s.row + share.start * s_bytes, (share.stop - share.start) * s_bytes);
  copy_bytes(t_shared, rows.t.row + share.start * t_bytes,
             (share.pair_stop - share.start) * t_bytes);
  rows.s.row = shared - share.start * s_bytes, rows.t.row = t_shared - share.start * t_bytes;
  wait_for_copies();
  sync_block();
}

// The state of the whole row, in every block of the cluster; for its thread 0.
BGK_DEVICE RowState<float>& gather(Composed& shared, const Spec& spec, int ranks) {
  sync_cluster();
  if (thread() < ranks) shared.gathered[thread()] = *of_block(&shared.states[0], thread());
  sync_cluster();  // nobody leaves while others read
  if (thread() == 0) {
    for (int i = 1; i < ranks; ++i) merge<ScalarMath>(shared.gathered[0], shared.gathered[i], spec);
  }
  return shared.gathered[0];
}

// Between the passes: the loss, and what pass 2 needs.
BGK_DEVICE double between(const ComposedArgs& args, const Spec& spec, int64_t row,
                          const RowState<float>& state, VjpShared& out) {
  const int64_t columns = args.tile.student.columns;
  Spec one = spec;
  one.tilt_count = spec.tilt_count > 0;  // no more: so that no index is left to run time
  const RowFinal x = finalize(state, one, columns);
  const LossOfRow y = loss_of_row(args.objective, x, one, columns, args.scale[row]);
  one.tilt_count = 0;  // of the teacher alone: no gradient
  out.plan = plan_row(y.row, args.tile.student.scale, one);
  const Label& label = state.label;
  const bool compared = label.column >= 0 && label.column < spec.compared;
  const double v = compared ? label.v / spec.inverse_temperature : 0.0;
  out.at_label = (float)vjp_label(out.plan.row, label.z, v, spec, compared);
  return y.loss;
}

// Grid: a row a block, or a row a cluster of blocks that hold it in their shared memory.
template <class Format, bool kResident>
__global__ void __launch_bounds__(kThreads, 2)
    composed_kernel(const __grid_constant__ Launched<ComposedArgs> in) {
  const ComposedArgs& args = in.args;
  const Spec spec = in.spec();
  const int ranks = kResident ? cluster_size() : 1, rank = kResident ? cluster_rank() : 0;
  const int64_t row = block().x / ranks, label = args.labels[row];
  Composed& shared = *(Composed*)dynamic_shared();
  RowPair<Format> rows(args.tile, row);
  const Share share(args.tile, rank, ranks);
  const bool skip = label == kSkip, speaker = thread() == 0 && rank == 0;
  if (!skip) {
    if (kResident) make_resident(rows, share, dynamic_shared() + kComposedBytes);
    absorb_share<Format, kPower, false>(args, spec, row, rows, share, shared.states);
    if (thread() == 0) empty_state(shared.states[kWarps], spec.tilt_count);
    sync_block();
    if (warp() == 0) merge_warps(shared.states, spec);
    RowState<float>& state = kResident ? gather(shared, spec, ranks) : shared.states[0];
    if (thread() == 0) {
      const double loss = between(args, spec, row, state, shared.vjp);
      if (speaker) {
        args.losses[row] = loss;
        store_state(state, args.floats + row, args.floats_stride, args.ints + row, args.ints_stride,
                    spec.tilt_count);
      }
    }
    sync_block();
  } else if (speaker) {
    args.losses[row] = 0.0;
  }
  vjp_share<Format, false>(spec, args.tile.student.cap, rows, Sink(args.out, row),
                           column_in(args.tile, label), share, skip, shared.vjp);
}

}  // namespace bgk::cuda
