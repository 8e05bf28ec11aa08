#include "cuda/composed.cuh"
#include "cuda/launch.h"

namespace bgk::cuda {
namespace {

int64_t share_bytes(const Tile& tile, int ranks) {
  const int64_t width = tile.student.columns;
  const int64_t each = ((width + ranks - 1) / ranks + kStep - 1) / kStep * kStep;
  const int64_t columns = each < width ? each : width;
  return columns * (bytes_of(tile.student.dtype) + bytes_of(tile.teacher.dtype));
}

bool whole_vectors(const Logits& x) {
  const int64_t bytes = bytes_of(x.dtype);
  return (intptr_t)x.data % 16 == 0 && x.row_stride * bytes % 16 == 0 &&
         x.columns * bytes % 16 == 0;
}

}  // namespace

// As few as leave a block half of the shared memory, so that two fit a multiprocessor and one
// computes while the other loads; or as many as there can be, where they need all of it.
int resident_blocks(const Tile& tile, const Where& where) {
  if (!whole_vectors(tile.student) || (tile.teacher.data && !whole_vectors(tile.teacher))) return 0;
  const int64_t most = cluster_shared_bytes(where.device);
  auto needed = [&](int ranks) { return (int64_t)kComposedBytes + share_bytes(tile, ranks); };
  for (int ranks = 1; ranks <= kMaxCluster; ranks *= 2)
    if (2 * needed(ranks) + 1024 <= most)
      return ranks;  // a block costs 1 KiB more than it asks for
  return needed(kMaxCluster) <= most ? kMaxCluster : 0;
}

// Roofline, a row of V columns in bf16. Resident: 4·V bytes read and 2·V written, the least there
// is, in which an H100 issues about 50 instructions a column pair; both passes take about 45, with
// 5 exponentials. Streaming: 10·V bytes moved, of which the second read of 4·V comes from the L2
// cache as far as the rows in work fit it. Both save three launches, and the statistics' way
// through torch, over separate passes.
int compose(const ComposedArgs& args, int ranks, const Where& where) {
  const Tile& tile = args.tile;
  if (tile.rows == 0 || tile.student.columns == 0) return kOk;
  const Logits& teacher = tile.teacher.data ? tile.teacher : tile.student;
  const Size size = size_of(tile.student, teacher);
  const Spec& spec = args.spec;
  const bool power = spec.tilt_count == 0 || is_power(spec);
  if (size == kMixedSizes || !power || spec.mixture_count || spec.total_variation ||
      spec.rule != kIndex || tile.first_column)
    return kNotComposed;
  if (const int status = use(where.device)) return status;
  const Launched<ComposedArgs> launched(args);
  const Stream stream = (Stream)where.stream;
  if (ranks == 0)
    return start(size == kHalves ? composed_kernel<Half, false> : composed_kernel<Single, false>,
                 dim3(tile.rows), kComposedBytes, stream, launched);
  return start(size == kHalves ? composed_kernel<Half, true> : composed_kernel<Single, true>,
               dim3(tile.rows * ranks), kComposedBytes + share_bytes(tile, ranks), stream, launched,
               ranks);
}

}  // namespace bgk::cuda
