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

typedef void (*ComposedKernel)(Launched<ComposedArgs>);

template <class Format>
ComposedKernel pick(int ranks, bool any) {
  if (any)
    return ranks ? composed_kernel<Format, true, true> : composed_kernel<Format, false, true>;
  return ranks ? composed_kernel<Format, true, false> : composed_kernel<Format, false, false>;
}

}  // namespace

// As few as leave a block half of the shared memory, so that two fit a multiprocessor and one
// computes while the other loads; or as many as there can be, where they need all of it.
Residence residence(const Tile& tile, const Where& where) {
  if (!whole_vectors(tile.student) || (tile.teacher.data && !whole_vectors(tile.teacher)))
    return {0, "its rows do not begin and end on 16-byte boundaries"};
  const int64_t most = cluster_shared_bytes(where.device);
  if (most == 0) return {0, "clusters of blocks take compute capability 9.0"};
  auto needed = [&](int ranks) { return (int64_t)kComposedBytes + share_bytes(tile, ranks); };
  for (int ranks = 1; ranks <= kMaxCluster; ranks *= 2)
    if (2 * needed(ranks) + 1024 <= most)  // a block costs 1 KiB more than it asks for
      return {ranks, nullptr};
  if (needed(kMaxCluster) <= most) return {kMaxCluster, nullptr};
  return {0, "a row does not fit the shared memory of 8 blocks"};
}

const char* separate(const Spec& spec, const Tile& tile) {
  if (tile.first_column) return "a tile does not begin with the vocabulary";
  if (tile.teacher.data && size_of(tile.student, tile.teacher) == kMixedSizes)
    return "student and teacher have logits of two sizes";
  if (spec.tilt_count && !is_power(spec))
    return "the objective needs tilts other than one power sum of the teacher";
  if (spec.mixture_count + spec.total_variation > 1)
    return "the objective needs more than one pairwise statistic";
  return nullptr;
}

// Roofline, a row of V columns in bf16. Resident: 4·V bytes read and 2·V written, the least there
// is, in which an H100 issues about 50 instructions a column pair; both passes take about 45, with
// 5 exponentials. Streaming: 10·V bytes moved, of which the second read of 4·V comes from the L2
// cache as far as the rows in work fit it. Both save three launches, and the statistics' way
// through torch, over separate passes. A mixture is one more read, of shared memory or the L2
// cache, of about 70 instructions a column pair, and at most 100 more in pass 2 (counted in SASS
// for sm_90a): bound by arithmetic, four times the floor of memory in 16 bits and twice in 32. A
// label from the teacher costs a comparison a column, and a sample a draw where it could win.
int compose(const ComposedArgs& args, int ranks, const Where& where) {
  const Tile& tile = args.tile;
  const Spec& spec = args.spec;
  if (tile.rows == 0 || tile.student.columns == 0) return kOk;
  if (separate(spec, tile)) return kNotComposed;
  if (const int status = use(where.device)) return status;
  const bool any = spec.rule != kIndex || spec.mixture_count || spec.total_variation;
  const bool halves = bytes_of(tile.student.dtype) == 2;
  const ComposedKernel kernel = halves ? pick<Half>(ranks, any) : pick<Single>(ranks, any);
  const size_t bytes = kComposedBytes + (ranks ? share_bytes(tile, ranks) : 0);
  const int blocks = ranks ? ranks : 1;
  return start(kernel, dim3(tile.rows * blocks), bytes, (Stream)where.stream,
               Launched<ComposedArgs>(args), blocks);
}

}  // namespace bgk::cuda
