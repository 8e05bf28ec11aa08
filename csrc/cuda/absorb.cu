#include "cuda/absorb.cuh"
#include "cuda/launch.h"

namespace bgk::cuda {
namespace {

struct MergeArgs : AbsorbArgs {
  const float* part_floats;
  const int64_t* part_ints;
  int splits;
};

// Merges what several splits left into the state. A thread a row.
__global__ void __launch_bounds__(kThreads)
    merge_kernel(const __grid_constant__ Launched<MergeArgs> in) {
  const MergeArgs& args = in.args;
  const Spec spec = in.spec();
  const int64_t row = (int64_t)block().x * kThreads + thread(), rows = args.tile.rows;
  if (row >= rows || args.labels[row] == kSkip) return;
  const int tilts = spec.tilt_count, columns = kFloatColumns + kTiltColumns * tilts;
  RowState<float> total, part;
  float* floats = args.floats + row;
  int64_t* ints = args.ints + row;
  load_state(total, floats, args.floats_stride, ints, args.ints_stride, tilts);
  for (int64_t split = 0; split < args.splits; ++split) {
    load_state(part, args.part_floats + split * columns * rows + row, rows,
               args.part_ints + split * 3 * rows + row, rows, tilts);
    merge<ScalarMath>(total, part, spec);
  }
  store_state(total, floats, args.floats_stride, ints, args.ints_stride, tilts);
}

typedef void (*Kernel)(Launched<AbsorbArgs>);

Tilts tilts_of(const Spec& spec) {
  return spec.tilt_count == 0 ? kNoTilt : is_power(spec) ? kPower : kAny;
}

// Rare combinations share a kernel that decides as it goes.
template <class Format>
Kernel pick(const Spec& spec, Tilts tilts) {
  const bool choose = spec.rule != kIndex;
  if (tilts == kAny) return absorb_kernel<Format, kAny, true>;
  if (tilts == kPower)
    return choose ? absorb_kernel<Format, kPower, true> : absorb_kernel<Format, kPower, false>;
  return choose ? absorb_kernel<Format, kNoTilt, true> : absorb_kernel<Format, kNoTilt, false>;
}

}  // namespace

// Roofline, a row of V columns in bf16: 4·V bytes must be read, and nothing of that order written.
// About 35 instructions a column pair, 3 of them exponentials (with a power sum; counted in PTX),
// where an H100 issues about 34 in the time in which its memory delivers those 4 bytes: 16-bit
// logits keep arithmetic and memory equally busy, 32-bit ones are bound by memory. What a row costs
// beside its columns: about 50 shuffles a warp, and the merge of its warps' states.
int absorb(const AbsorbArgs& args, const Splits& splits, const Where& where) {
  const int64_t rows = args.tile.rows;
  if (rows == 0 || args.tile.student.columns == 0) return kOk;
  if (const int status = use(where.device)) return status;
  const Spec& spec = args.spec;
  Tilts tilts = tilts_of(spec);
  const bool paired = args.tile.teacher.data;
  const Size size = size_of(args.tile.student, paired ? args.tile.teacher : args.tile.student);
  if (size == kMixedSizes) tilts = kAny;
  const Kernel kernel = size == kHalves    ? pick<Half>(spec, tilts)
                        : size == kSingles ? pick<Single>(spec, tilts)
                                           : absorb_kernel<Mixed, kAny, true>;
  const size_t bytes =
      tilts == kAny ? spec.tilt_count * kTiltColumns * kThreads * sizeof(float) : 0;
  Launched<AbsorbArgs> launched(args);
  if (splits.count > 1) {
    launched.args.floats = splits.floats, launched.args.floats_stride = rows;
    launched.args.ints = splits.ints, launched.args.ints_stride = rows;
  }
  const Stream stream = (Stream)where.stream;
  const int status = start(kernel, dim3(rows, splits.count), bytes, stream, launched);
  if (status || splits.count == 1) return status;
  const MergeArgs merging = {args, splits.floats, splits.ints, splits.count};
  return start(merge_kernel, dim3((rows + kThreads - 1) / kThreads), 0, stream,
               Launched<MergeArgs>(merging));
}

int probe(int device) {
  const int status = use(device);
  return status ? status : try_load(merge_kernel);
}

const char* error(int status) { return error_text(status); }

}  // namespace bgk::cuda
