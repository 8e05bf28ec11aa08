#include "cuda/absorb.cuh"
#include "cuda/launch.h"

namespace bgk::cuda {
namespace {

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
// About 25 instructions and 2 exponentials a column pair (one more for a power sum), where an H100
// issues about 34 in the time in which its memory delivers those 4 bytes: bound by memory, barely
// so in 16 bits and amply in 32. Cost that is not per column: about 300 shuffles a warp and the
// merge of kWarps states, once a row.
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
