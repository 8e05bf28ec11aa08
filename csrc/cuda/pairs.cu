#include "cuda/code.cuh"
#include "cuda/launch.h"
#include "cuda/pairs.cuh"

namespace bgk::cuda {
namespace {

struct AddArgs {
  PairArgs into;
  const float* parts;  // (splits, ·, rows)
  int splits;
};

// Adds what several splits left to the state. A thread a row.
__global__ void __launch_bounds__(kThreads) add_kernel(const __grid_constant__ AddArgs args) {
  const PairArgs& into = args.into;
  const int64_t row = (int64_t)block().x * kThreads + thread(), rows = into.tile.rows;
  if (row >= rows || into.labels[row] == kSkip) return;
  const Column<float> to(into.floats, row);
  const int64_t columns = count_sums(into.spec);
  each_extra<ScalarMath>(into.spec, [&](const auto& statistic, int, const Offsets& at) {
    const int end = statistic.kSecondRead ? at.sums + statistic.kSums : 0;
    for (int k = at.sums; k < end; ++k) {
      for (int split = 0; split < args.splits; ++split)
        to[k] += args.parts[(split * columns + k) * rows + row];
    }
  });
}

}  // namespace

// Roofline: 4·V bytes read for a row in bf16, as in absorb(). A mixture costs about 70 instructions
// a column pair, so this kernel is bound by arithmetic in 16 bits, and close to memory in 32.
int absorb_pairs(const PairArgs& args, const Where& where) {
  const Tile& tile = args.tile;
  const int extras = args.spec.extra_count;
  if (tile.rows == 0 || extras == 0 || !tile.teacher.data || tile.teacher.columns == 0) return kOk;
  if (const int status = use(where.device)) return status;
  const Size size = size_of(tile.student, tile.teacher);
  const auto kernel = args.tile.code.words.data ? pairs_kernel<Coded>
                      : size == kHalves         ? pairs_kernel<Half>
                      : size == kSingles        ? pairs_kernel<Single>
                                                : pairs_kernel<Mixed>;
  Shared<PairArgs> launched = shared(args, tile.student.columns, where);
  if (where.splits > 1) launched.floats = {where.floats, tile.rows};
  const Stream stream = (Stream)where.stream;
  const int status = start(kernel, dim3(tile.rows, where.splits, extras), 0, stream, launched);
  if (status || where.splits == 1) return status;
  const AddArgs adding = {args, where.floats, where.splits};
  return start(add_kernel, thread_a_row(tile.rows), 0, stream, adding);
}

}  // namespace bgk::cuda
