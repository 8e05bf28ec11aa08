// The right factor of a product, packed some columns at a time, by which blocks of rows of the left
// one are multiplied.
#pragma once

#include <stdint.h>

#include <memory>
#include <new>

#include "cpu/factors.h"

namespace bgk {

struct AlignedDelete {
  void operator()(void* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
template <class T>
using Buffer = std::unique_ptr<T[], AlignedDelete>;
template <class T>
Buffer<T> allocate(int64_t count) {
  void* memory = ::operator new[](sizeof(T) * (size_t)count, std::align_val_t(64));
  return Buffer<T>((T*)memory);
}

inline int64_t parts_of(int64_t whole, int64_t size) { return (whole + size - 1) / size; }

// Consecutive columns of the right factor.
struct Columns {
  int64_t first, count;
};

// Calls of one object from several threads do not meet: they pack different parts, and multiply
// into different memory.
class Panels {
 public:
  // Room for `columns` at a time.
  Panels(const Factors& factors, int64_t columns);

  // Columns of a panel, and bytes that one of so many depths takes.
  static int64_t width();
  static int64_t bytes(int64_t depth);
  // Rows of a block: panels are read once for each, and its own rows should stay in the L2 cache.
  int64_t height() const;

  // How many parts of packing some columns there are, and one of them.
  int64_t parts(Columns packed) const;
  void pack(Columns packed, int64_t part) const;

  // Elements of scratch that a thread brings to multiply().
  int64_t scratch() const;
  // Rows [row, row + n) by some of the packed columns, which begin at a panel, into c or added to
  // it; n is a block at most.
  void multiply(int64_t row, int64_t n, Columns packed, Columns columns, bool add, float* c,
                int64_t stride, uint16_t* scratch) const;
  // Gives back what the thread holds.
  void release() const;

 private:
  void block_product(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t stride, bool add,
                     const uint16_t* a, const uint16_t* b, float* c) const;

  const Factors f_;
  const bool packs_rows_;
  const int64_t padded_;  // the depth
  const Buffer<uint16_t> packed_;
};

}  // namespace bgk
