#include "cuda/launch.h"
#include "cuda/rows.cuh"
#include "math/finalize.h"

namespace bgk::cuda {
namespace {

// Between the passes: states to statistics. A thread a row.
__global__ void __launch_bounds__(kThreads, 2)
    finalize_kernel(const __grid_constant__ FinalizeArgs args) {
  const int64_t row = (int64_t)block().x * kThreads + thread();
  if (row < args.rows) finalize_row(args, row);
}

}  // namespace

int finalize(const FinalizeArgs& args, const Where& where) {
  if (args.rows == 0) return kOk;
  if (const int status = use(where.device)) return status;
  return start(finalize_kernel, thread_a_row(args.rows), 0, (Stream)where.stream, args);
}

}  // namespace bgk::cuda
