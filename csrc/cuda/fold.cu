#include "cuda/launch.h"
#include "cuda/rows.cuh"
#include "math/fold.h"

namespace bgk::cuda {
namespace {

// Between the passes: derivatives in the statistics to coefficients of pass 2. A thread a row.
__global__ void __launch_bounds__(kThreads) fold_kernel(const __grid_constant__ FoldArgs args) {
  const int64_t row = (int64_t)block().x * kThreads + thread();
  if (row < args.rows) fold_row(args, row);
}

}  // namespace

int fold(const FoldArgs& args, const Where& where) {
  if (args.rows == 0) return kOk;
  if (const int status = use(where.device)) return status;
  return start(fold_kernel, thread_a_row(args.rows), 0, (Stream)where.stream, args);
}

}  // namespace bgk::cuda
