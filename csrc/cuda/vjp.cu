#include "cuda/launch.h"
#include "cuda/vjp.cuh"

namespace bgk::cuda {

// Roofline: 4·V bytes read for a row in bf16, as in absorb(). A mixture costs about 70 instructions
// a column pair, so this kernel is bound by arithmetic in 16 bits, and close to memory in 32.
int absorb_pairs(const PairArgs& args, int splits, const Where& where) {
  const Tile& tile = args.tile;
  const int extras = args.spec.mixture_count + args.spec.total_variation;
  if (tile.rows == 0 || extras == 0 || !tile.teacher.data || tile.teacher.columns == 0) return kOk;
  if (const int status = use(where.device)) return status;
  const Size size = size_of(tile.student, tile.teacher);
  const auto kernel = size == kHalves    ? pairs_kernel<Half>
                      : size == kSingles ? pairs_kernel<Single>
                                         : pairs_kernel<Mixed>;
  return start(kernel, dim3(tile.rows, splits, extras), 0, (Stream)where.stream,
               Launched<PairArgs>(args));
}

// Roofline: a row of V columns in bf16 moves 6·V bytes, 4 read and 2 written (2·V fewer where the
// gradient does not depend on the teacher), in which an H100 issues about 50 instructions a column
// pair; the pair of softmaxes takes about 15 with 2 exponentials. Bound by memory.
int vjp(const VjpArgs& args, int splits, const Where& where) {
  const Tile& tile = args.tile;
  if (tile.rows == 0 || tile.student.columns == 0) return kOk;
  if (const int status = use(where.device)) return status;
  const Spec& spec = args.spec;
  const bool extras = spec.tilt_count || spec.mixture_count || spec.total_variation;
  const Size size = size_of(tile.student, tile.teacher.data ? tile.teacher : tile.student);
  const auto kernel = size == kMixedSizes ? vjp_kernel<Mixed, true>
                      : size == kHalves
                          ? (extras ? vjp_kernel<Half, true> : vjp_kernel<Half, false>)
                          : (extras ? vjp_kernel<Single, true> : vjp_kernel<Single, false>);
  return start(kernel, dim3(tile.rows, splits), 0, (Stream)where.stream, Launched<VjpArgs>(args));
}

}  // namespace bgk::cuda
