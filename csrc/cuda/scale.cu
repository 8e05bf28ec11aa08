#include "cuda/launch.h"
#include "cuda/sink.cuh"

namespace bgk::cuda {
namespace {

BGK_DEVICE float times_wide(float x, double factor) { return (float)((double)x * factor); }

// A gradient times a number that only the device knows; nothing is touched where it is 1. Threads
// take 16 bytes in turn.
template <class Format>
__global__ void __launch_bounds__(kThreads) scale_kernel(const __grid_constant__ ScaleArgs args) {
  const double factor = args.wide ? *(const double*)args.factor : *(const float*)args.factor;
  if (factor == 1.0) return;
  constexpr int kVector = Format::kVector;
  const Logits as_row = {args.data, 0, 0, args.dtype, 1.0f, 0.0f};
  const Source<Format> from(as_row, 0);
  const Sink to(as_row, 0);
  const int64_t first = (int64_t)block().x * kThreads + thread();
  const int64_t step = (int64_t)blocks().x * kThreads, whole = args.count / kVector;
  for (int64_t i = first; i < whole; i += step) {
    uint32_t words[4];
    float x[kVector];
    load_words<4>(from.row + 16 * i, words);
#pragma unroll
    for (int k = 0; k < kVector; ++k)
      x[k] = times_wide(from.widened(Format::bits(words, k)), factor);
    to.put_vector<kVector>(kVector * i, x);
  }
  const int64_t last = whole * kVector + first;
  if (last >= args.count) return;
  to.put_one(last, times_wide(from.widened(Format::load(from.row, last, args.dtype)), factor));
}

}  // namespace

// Roofline: bound by memory, a read and a write of each element; nothing where the factor is 1.
int scale(const ScaleArgs& args, const Where& where) {
  if (args.count == 0) return kOk;
  if (const int status = use(where.device)) return status;
  const auto kernel = args.dtype == kF32 ? scale_kernel<Single> : scale_kernel<Half>;
  const int64_t blocks = (args.count + 8 * kThreads - 1) / (8 * kThreads);
  const dim3 grid(blocks < where.splits ? blocks : where.splits);
  return start(kernel, grid, 0, (Stream)where.stream, args);
}

}  // namespace bgk::cuda
