#include "cuda/absorb.cuh"
#include "cuda/launch.h"

namespace bgk::cuda {
namespace {

struct MergeArgs {
  AbsorbArgs into;
  State parts;
  int splits;
};

// Merges what several splits left into the state. A block a row, of which one warp works.
__global__ void __launch_bounds__(kThreads) merge_kernel(const __grid_constant__ MergeArgs args) {
  __shared__ RowState<ScalarMath> states[kMostSplits + 1];
  const AbsorbArgs& into = args.into;
  const int64_t row = block().x;
  if (warp() > 0 || into.labels[row] == kSkip) return;
  if (lane() <= args.splits) {
    const bool part = lane() < args.splits;
    const State from = part ? part_of(args.parts, lane(), into.spec) : into.state;
    load_state(states[lane()], from, row, into.spec);
  }
  merge_lanes<true>(states, args.splits + 1, into.spec);
  sync_warp();  // all have read what the first writes
  if (lane() == 0) store_state(states[0], into.state, row, into.spec);
}

typedef void (*Kernel)(Shared<AbsorbArgs>);

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
// beside its columns: about 50 shuffles a warp, and as many where the states of its warps are
// merged.
int absorb(const AbsorbArgs& args, const Where& where) {
  const int64_t rows = args.tile.rows;
  if (rows == 0 || args.tile.student.columns == 0) return kOk;
  if (const int status = use(where.device)) return status;
  const Spec& spec = args.spec;
  const bool paired = args.tile.teacher.data;
  const Size size = size_of(args.tile.student, paired ? args.tile.teacher : args.tile.student);
  const Extras extras = size == kMixedSizes ? kAny : extras_of(spec);
  if (args.tile.code.words.data && size != kSingles) return kUnknownDType;
  const Kernel kernel = size == kHalves    ? pick<Half>(spec, extras)
                        : size == kSingles ? pick<Single>(spec, extras)
                                           : absorb_kernel<Mixed, kAny, true>;
  const size_t bytes =
      extras == kAny ? spec.extra_count * kThreads * sizeof(ExtraSums<ScalarMath>) : 0;
  if (where.splits > kMostSplits) return kUnknownRule;
  Shared<AbsorbArgs> launched = shared(args, args.tile.student.columns, where);
  if (where.splits > 1) launched.state = {{where.floats, rows}, {where.ints, rows}};
  const Stream stream = (Stream)where.stream;
  const int status = start(kernel, dim3(rows, where.splits), bytes, stream, launched);
  if (status || where.splits == 1) return status;
  const MergeArgs merging = {args, launched.state, where.splits};
  return start(merge_kernel, dim3(rows), 0, stream, merging);
}

int probe(int device) {
  const int status = use(device);
  return status ? status : try_load(merge_kernel);
}

const char* error(int status) { return error_text(status); }

}  // namespace bgk::cuda
