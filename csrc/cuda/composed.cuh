// All passes in one launch, for whole rows and objectives of math/objective.h.
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
  RowFinal final;
  float parts[kWarps][3];  // of the pairwise statistic
  float sums[3];
  int64_t label;
  VjpShared vjp;
};
constexpr size_t kComposedBytes = (sizeof(Composed) + 15) / 16 * 16;

// The tilt of routing is of the teacher alone: no gradient comes from it.
BGK_DEVICE Spec without_tilts(Spec spec) {
  spec.tilt_count = 0;
  return spec;
}

// What a kernel is not for cannot be asked of it: so that no code is there for it, and no index is
// left to run time.
template <bool kGeneral>
BGK_DEVICE Spec narrowed(Spec spec) {
  spec.tilt_count = spec.tilt_count > 0;
  spec.mixture_count = kGeneral && spec.mixture_count > 0;
  spec.total_variation = kGeneral && spec.total_variation;
  return spec;
}

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

// What the second read needs of the statistics, or pass 2 where there is none.
BGK_DEVICE void end_statistics(const ComposedArgs& args, const Spec& spec,
                               const RowState<float>& state, Composed& shared) {
  shared.final = finalize(state, spec, args.tile.student.columns);
  shared.label = state.label.column;
  shared.vjp.probs = {Centre(shared.final.lse_s), Centre(shared.final.lse_t),
                      spec.inverse_temperature};
}

// Pass 1, second read: the block's sums of the only pairwise statistic, then the whole row's, in
// every block of the cluster.
template <class Format, bool kResident>
BGK_DEVICE void gather_pairs(const Spec& spec, const RowPair<Format>& rows, const Share& share,
                             Composed& shared, int ranks) {
  pair_share(spec, 0, rows, shared.vjp.probs, share, shared.parts);
  sync_block();
  if (thread() < 3) shared.sums[thread()] = sum_of_warps(shared.parts, thread());
  if (!kResident) return sync_block();
  sync_cluster();
  float total = 0.0f;
  if (thread() < 3) {
    for (int i = 0; i < ranks; ++i) total += *of_block(&shared.sums[thread()], i);
  }
  sync_cluster();  // nobody leaves, or writes, while others read
  if (thread() < 3) shared.sums[thread()] = total;
  sync_block();
}

// Between the passes: the loss, and what pass 2 needs.
BGK_DEVICE double between(const ComposedArgs& args, const Spec& spec, int64_t row,
                          const RowState<float>& state, Composed& shared) {
  const double sums[3] = {shared.sums[0], shared.sums[1], shared.sums[2]};
  const double scale = args.tile.student.scale;
  const LossOfRow y = loss_of_row(args.objective, shared.final, sums, spec,
                                  args.tile.student.columns, args.scale[row]);
  VjpShared& out = shared.vjp;
  out.plan = plan_row(y.row, scale, without_tilts(spec));
  const Label& label = state.label;
  const bool compared = label.column >= 0 && label.column < spec.compared;
  const double v = compared ? label.v / spec.inverse_temperature : 0.0;
  out.at_label = (float)vjp_label(out.plan.row, label.z, v, spec, compared);
  for (int k = 0; k < 3; ++k) out.pairs[k] = (float)(scale * y.pairs[k]);
  return y.loss;
}

// What the caller learns of a row.
BGK_DEVICE void report(const ComposedArgs& args, const Spec& spec, int64_t row, double loss,
                       RowState<float>& state, const Composed& shared) {
  args.losses[row] = loss;
  store_state(state, args.floats + row, args.floats_stride, args.ints + row, args.ints_stride,
              spec.tilt_count);
  for (int k = 0; k < pair_count(spec); ++k) args.sums[k * args.sums_stride + row] = shared.sums[k];
}

// Grid: a row a block, or a row a cluster of blocks that hold it in their shared memory. kGeneral:
// labels may come from the teacher, and the divergence from a pairwise statistic.
template <class Format, bool kResident, bool kGeneral>
__global__ void __launch_bounds__(kThreads, 2)
    composed_kernel(const __grid_constant__ Launched<ComposedArgs> in) {
  const ComposedArgs& args = in.args;
  const Spec spec = narrowed<kGeneral>(in.spec());
  const int ranks = kResident ? cluster_size() : 1, rank = kResident ? cluster_rank() : 0;
  const int64_t row = block().x / ranks;
  Composed& shared = *(Composed*)dynamic_shared();
  RowPair<Format> rows(args.tile, row);
  const Share share(args.tile, rank, ranks);
  const bool skip = args.labels[row] == kSkip, speaker = thread() == 0 && rank == 0;
  if (!skip) {
    if (kResident) make_resident(rows, share, dynamic_shared() + kComposedBytes);
    absorb_share<Format, kPower, kGeneral>(args, spec, row, rows, share, shared.states);
    if (thread() == 0) empty_state(shared.states[kWarps], spec.tilt_count);
    sync_block();
    if (warp() == 0) merge_warps(shared.states, spec);
    RowState<float>& state = kResident ? gather(shared, spec, ranks) : shared.states[0];
    if (thread() == 0) end_statistics(args, spec, state, shared);
    if (kGeneral && pair_count(spec)) {
      sync_block();
      gather_pairs<Format, kResident>(spec, rows, share, shared, ranks);
    }
    if (thread() == 0) {
      const double loss = between(args, spec, row, state, shared);
      if (speaker) report(args, spec, row, loss, state, shared);
    }
    sync_block();
  } else if (speaker) {
    args.losses[row] = 0.0;
  }
  const int label = skip ? -1 : column_in(args.tile, shared.label);
  vjp_share<Format, kGeneral>(without_tilts(spec), args.tile.student.cap, rows, Sink(args.out, row),
                              label, share, skip, shared.vjp);
}

}  // namespace bgk::cuda
