#include "cpu/panels.h"

#include <algorithm>

#include "cpu/packing.h"

namespace bgk {
namespace {

// Tails of rows are cut into powers of two and depths that vary with the input into steps, because
// the library behind the micro-kernel generates and keeps one for each size that it sees.
constexpr int64_t kRows = 256, kPackedRows = 64, kDepthStep = 32;

bool packs_rows(const Factors& f) { return f.a.column_stride != 1 || f.k % 2 != 0 || f.k == 0; }

int64_t padded_depth(int64_t k, int64_t step) {
  return std::max<int64_t>(1, parts_of(k, step)) * step;
}

}  // namespace

Panels::Panels(const Factors& factors, int64_t columns)
    : f_(factors),
      packs_rows_(packs_rows(factors)),
      padded_(padded_depth(f_.k, packs_rows_ ? kDepthStep : 2)),
      packed_(allocate<uint16_t>(parts_of(columns, kColumns) * kColumns * padded_)) {}

int64_t Panels::width() { return kColumns; }
int64_t Panels::height() const { return packs_rows_ ? kPackedRows : kRows; }
int64_t Panels::bytes(int64_t depth) {
  return (int64_t)sizeof(uint16_t) * kColumns * padded_depth(depth, kDepthStep);
}

int64_t Panels::parts(Columns packed) const {
  return parts_of(packed.count, kColumns) * parts_of(padded_, kDepth);
}

void Panels::pack(Columns packed, int64_t part) const {
  const int64_t cuts = parts_of(padded_, kDepth), panel = part / cuts, depth = part % cuts * kDepth;
  const int64_t column = panel * kColumns, deep = std::min(kDepth, padded_ - depth);
  pack_pairs(f_.b, packed.first + column, std::min(kColumns, packed.count - column), depth,
             std::clamp<int64_t>(f_.k - depth, 0, deep), deep,
             packed_.get() + column * padded_ + depth * kColumns);
}

int64_t Panels::scratch() const { return packs_rows_ ? kPackedRows * kRowStride : 0; }

void Panels::multiply(int64_t row, int64_t n, Columns packed, Columns columns, bool add, float* c,
                      int64_t stride, uint16_t* scratch) const {
  const uint16_t* panels = packed_.get() + (columns.first - packed.first) * padded_;
  for (int64_t first = 0; first < padded_; first += kDepth) {
    const int64_t deep = std::min(kDepth, padded_ - first);
    const uint16_t* a = f_.a.data + row * f_.a.row_stride + first;
    if (packs_rows_) {
      pack_rows(f_.a, row, n, first, std::clamp<int64_t>(f_.k - first, 0, deep), deep, scratch);
      a = scratch;
    }
    const int64_t lda = packs_rows_ ? kRowStride : f_.a.row_stride;
    for (int64_t at = 0; at < columns.count; at += kColumns)
      block_product(n, std::min(kColumns, columns.count - at), deep, lda, stride, add || first > 0,
                    a, panels + at * padded_ + first * kColumns, c + at);
  }
}

void Panels::block_product(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t stride, bool add,
                           const uint16_t* a, const uint16_t* b, float* c) const {
  for (int64_t size = kRows; m > 0; size /= 2) {
    for (; m >= size; m -= size, a += size * lda, c += size * stride) {
      try {
        f_.kernel(size, n, k, lda, kColumns, stride, add, a, b, c, true);
      } catch (...) {  // switched off since it was chosen
        plain_product(f_.type, size, n, k, lda, add, a, b, kColumns, c, stride);
      }
    }
  }
}

void Panels::release() const {
  if (f_.release) f_.release(true);
}

}  // namespace bgk
