#include "cuda/absorb.cuh"
#include "cuda/launch.h"

namespace bgk::cuda {
namespace {

struct MergeArgs {
  AbsorbArgs into;
  State parts;
  int splits;
};

// Merges what several splits left into the state. A thread a row.
__global__ void __launch_bounds__(kThreads) merge_kernel(const __grid_constant__ MergeArgs args) {
  const AbsorbArgs& into = args.into;
  const Spec& spec = into.spec;
  const int64_t row = (int64_t)block().x * kThreads + thread();
  if (row >= into.tile.rows || into.labels[row] == kSkip) return;
  RowState<ScalarMath> total, part;
  load_state(total, into.state, row, spec);
  for (int split = 0; split < args.splits; ++split) {
    load_state(part, part_of(args.parts, split, spec), row, spec);
    merge(total, part, spec);
  }
  store_state(total, into.state, row, spec);
}

typedef void (*Kernel)(AbsorbArgs);

BGK_HD Extras extras_of(const Spec& spec) {
  int first_read = 0, powers = 0;
  each_extra<ScalarMath>(spec, [&](const auto& statistic, int, const Offsets&) {
    first_read += !statistic.kSecondRead, powers += statistic.power() != 0.0;
  });
  return first_read == 0 ? kNoExtra : first_read == 1 && powers == 1 ? kPower : kAny;
}

// Rare combinations share a kernel that decides as it goes.
template <class Format>
Kernel pick(const Spec& spec, Extras extras) {
  const bool choose = spec.rule != kIndex;
  if (extras == kAny) return absorb_kernel<Format, kAny, true>;
  if (extras == kPower)
    return choose ? absorb_kernel<Format, kPower, true> : absorb_kernel<Format, kPower, false>;
  return choose ? absorb_kernel<Format, kNoExtra, true> : absorb_kernel<Format, kNoExtra, false>;
}

}  // namespace

// Roofline, a row of V columns in bf16: 4·V bytes must be read, and nothing of that order written.
// About 35 instructions a column pair, 3 of them exponentials (with a power sum; counted in PTX),
// where an H100 issues about 34 in the time in which its memory delivers those 4 bytes: 16-bit
// logits keep arithmetic and memory equally busy, 32-bit ones are bound by memory. What a row costs
// beside its columns: about 50 shuffles a warp, and the merge of its warps' states.
int absorb(const AbsorbArgs& args, const Where& where) {
  const int64_t rows = args.tile.rows;
  if (rows == 0 || args.tile.student.columns == 0) return kOk;
  if (const int status = use(where.device)) return status;
  const Spec& spec = args.spec;
  const bool paired = args.tile.teacher.data;
  const Size size = size_of(args.tile.student, paired ? args.tile.teacher : args.tile.student);
  const Extras extras = size == kMixedSizes ? kAny : extras_of(spec);
  const Kernel kernel = size == kHalves    ? pick<Half>(spec, extras)
                        : size == kSingles ? pick<Single>(spec, extras)
                                           : absorb_kernel<Mixed, kAny, true>;
  const size_t bytes =
      extras == kAny ? spec.extra_count * kThreads * sizeof(ExtraSums<ScalarMath>) : 0;
  AbsorbArgs launched = args;
  if (where.splits > 1) launched.state = {{where.floats, rows}, {where.ints, rows}};
  const Stream stream = (Stream)where.stream;
  const int status = start(kernel, dim3(rows, where.splits), bytes, stream, launched);
  if (status || where.splits == 1) return status;
  const MergeArgs merging = {args, launched.state, where.splits};
  return start(merge_kernel, thread_a_row(rows), 0, stream, merging);
}

int probe(int device) {
  const int status = use(device);
  return status ? status : try_load(merge_kernel);
}

const char* error(int status) { return error_text(status); }

}  // namespace bgk::cuda
