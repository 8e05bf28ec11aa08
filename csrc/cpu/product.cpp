#include "cpu/product.h"

#include <string.h>

#include <algorithm>

#include "cpu/panels.h"
#include "cpu/parallel.h"

namespace bgk {
namespace {

constexpr int64_t kThreadBytes = 4 << 20;  // of panels, so that they stay in caches
constexpr int64_t kMostBytes = 32 << 20;   // the same for all threads, which share panels
constexpr int64_t kLeastWork = 1 << 20;    // multiply-adds that are worth a thread

// Rounds to nearest even; a NaN is cut.
uint16_t narrowed(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t nearest = ((bits >> 16) & 1) + 0x7fff;
  return (uint16_t)((bits + (x == x ? nearest : 0)) >> 16);
}

// A block of fp32 sums into rows of bf16.
void narrow(const float* from, int64_t rows, int64_t width, int64_t from_stride, uint16_t* to,
            int64_t stride) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < width; ++j) to[i * stride + j] = narrowed(from[i * from_stride + j]);
  }
}

}  // namespace

void multiply(const Product& p) {
  const Factors& f = p.factors;
  if (f.m <= 0 || f.n <= 0) return;
  const int64_t panels = parts_of(f.n, Panels::width());
  const int threads = threads_for(f.m * f.n * f.k, kLeastWork, p.threads);
  const int64_t room = std::min(kThreadBytes * threads, kMostBytes) / Panels::bytes(f.k);
  const int64_t group = std::clamp<int64_t>(room, 1, panels), most = group * Panels::width();
  const Panels right(f, most);
  const int64_t height = right.height(), blocks = parts_of(f.m, height);
  // Panels are shared out too where there are few blocks of rows.
  const int64_t splits = std::clamp<int64_t>(parts_of(4 * threads, blocks), 1, group);
  const int64_t share = parts_of(group, splits) * Panels::width();  // columns
  const int64_t scratch = right.scratch(), sum = p.narrow ? height * share : 0;
  const Buffer<uint16_t> rows = allocate<uint16_t>(threads * scratch);
  const Buffer<float> sums = allocate<float>(threads * sum);
  in_parallel(threads, [&](Team& team) {
    uint16_t* const mine = rows.get() + team.thread * scratch;
    float* const wide = sums.get() + team.thread * sum;
    for (int64_t first = 0; first < f.n; first += most) {
      const Columns packed = {first, std::min(most, f.n - first)};
      team.share(right.parts(packed), 1, [&](int64_t i) { right.pack(packed, i); });
      team.share(blocks * parts_of(packed.count, share), 1, [&](int64_t i) {
        const int64_t row = i % blocks * height, n = std::min(height, f.m - row);
        const int64_t skipped = i / blocks * share, at = first + skipped;
        const Columns columns = {at, std::min(share, packed.count - skipped)};
        if (!p.narrow) {
          float* out = (float*)p.out + row * p.stride + at;
          return right.multiply(row, n, packed, columns, p.add, out, p.stride, mine);
        }
        right.multiply(row, n, packed, columns, false, wide, share, mine);
        narrow(wide, n, columns.count, share, (uint16_t*)p.out + row * p.stride + at, p.stride);
      });
    }
    right.release();
  });
}

}  // namespace bgk
