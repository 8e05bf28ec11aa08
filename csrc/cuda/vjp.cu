#include "cuda/launch.h"
#include "cuda/vjp.cuh"

namespace bgk::cuda {
namespace {

BGK_HD bool reach_student(const Spec& spec) {
  bool some = false;
  each_extra<ScalarMath>(spec, [&](const auto& statistic, int, const Offsets&) {
    some |= statistic.reaches_student();
  });
  return some;
}

}  // namespace

// Roofline: a row of V columns in bf16 moves 6·V bytes, 4 read and 2 written (2·V fewer where the
// gradient does not depend on the teacher), in which an H100 issues about 50 instructions a column
// pair; the pair of softmaxes takes about 15 with 2 exponentials. Bound by memory.
int vjp(const VjpArgs& args, const Where& where) {
  const Tile& tile = args.tile;
  if (tile.rows == 0 || tile.student.columns == 0) return kOk;
  if (const int status = use(where.device)) return status;
  const bool extras = reach_student(args.spec);
  const Size size = size_of(tile.student, tile.teacher.data ? tile.teacher : tile.student);
  const auto kernel =
      args.tile.code.words.data ? (extras ? vjp_kernel<Coded, true> : vjp_kernel<Coded, false>)
      : size == kMixedSizes     ? vjp_kernel<Mixed, true>
      : size == kHalves         ? (extras ? vjp_kernel<Half, true> : vjp_kernel<Half, false>)
                                : (extras ? vjp_kernel<Single, true> : vjp_kernel<Single, false>);
  const Shared<VjpArgs> launched = shared(args, tile.student.columns, where);
  return start(kernel, dim3(tile.rows, where.splits), 0, (Stream)where.stream, launched);
}

}  // namespace bgk::cuda
