#include "cpu/product.h"

#include <math.h>
#include <string.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <new>
#include <vector>

#include "cpu/parallel.h"
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace bgk {
namespace {

// Of a block of the result, and the depth that is added up at once. Tails of rows are cut into
// powers of two and depths that vary with the input into steps, because the library behind the
// micro-kernel generates and keeps one for each size that it sees.
constexpr int64_t kRows = 64, kColumns = 128, kDepth = 1024, kDepthStep = 32;
constexpr int64_t kRowStride =
    kDepth + 32;  // of packed a: rows fall into different sets of the L1 cache
constexpr int64_t kPanelBytes = 1 << 20;  // of packed b a thread, so that it stays in the L2 cache
constexpr int64_t kLeastWork = 1 << 20;   // multiply-adds that are worth a thread

int64_t parts(int64_t whole, int64_t size) { return (whole + size - 1) / size; }

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

// Transposes from (8, 8) to (8, 8), rows at the given strides.
inline void transpose8(const uint16_t* from, int64_t from_stride, uint16_t* to, int64_t to_stride) {
#if defined(__SSE2__)
  __m128i x[8], y[8];
  for (int i = 0; i < 8; ++i) x[i] = _mm_loadu_si128((const __m128i*)(from + i * from_stride));
  for (int i = 0; i < 4; ++i) {
    y[2 * i] = _mm_unpacklo_epi16(x[2 * i], x[2 * i + 1]);
    y[2 * i + 1] = _mm_unpackhi_epi16(x[2 * i], x[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    x[4 * i] = _mm_unpacklo_epi32(y[4 * i], y[4 * i + 2]);
    x[4 * i + 1] = _mm_unpackhi_epi32(y[4 * i], y[4 * i + 2]);
    x[4 * i + 2] = _mm_unpacklo_epi32(y[4 * i + 1], y[4 * i + 3]);
    x[4 * i + 3] = _mm_unpackhi_epi32(y[4 * i + 1], y[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    __m128i* even = (__m128i*)(to + 2 * i * to_stride);
    __m128i* odd = (__m128i*)(to + (2 * i + 1) * to_stride);
    _mm_storeu_si128(even, _mm_unpacklo_epi64(x[i], x[i + 4]));
    _mm_storeu_si128(odd, _mm_unpackhi_epi64(x[i], x[i + 4]));
  }
#else
  for (int i = 0; i < 8; ++i) {
    for (int j = 0; j < 8; ++j) to[j * to_stride + i] = from[i * from_stride + j];
  }
#endif
}

// Transposes (4, 4) pairs.
inline void transpose4(const uint16_t* from, int64_t from_stride, uint16_t* to, int64_t to_stride) {
#if defined(__SSE2__)
  __m128i x[4], y[4];
  for (int i = 0; i < 4; ++i) x[i] = _mm_loadu_si128((const __m128i*)(from + i * from_stride));
  for (int i = 0; i < 2; ++i) {
    y[2 * i] = _mm_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
    y[2 * i + 1] = _mm_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    __m128i* even = (__m128i*)(to + 2 * i * to_stride);
    __m128i* odd = (__m128i*)(to + (2 * i + 1) * to_stride);
    _mm_storeu_si128(even, _mm_unpacklo_epi64(y[i], y[i + 2]));
    _mm_storeu_si128(odd, _mm_unpackhi_epi64(y[i], y[i + 2]));
  }
#else
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j)
      memcpy(to + j * to_stride + 2 * i, from + i * from_stride + 2 * j, 4);
  }
#endif
}

// Rows [row, row + n) of `a` at depths [first, first + depth), zeros from there up to `padded`.
void pack_rows(const Operand& a, int64_t row, int64_t n, int64_t first, int64_t depth,
               int64_t padded, uint16_t* to) {
  const uint16_t* from = a.data + row * a.row_stride + first * a.column_stride;
  int64_t whole = 0;  // of the depth
  if (a.column_stride == 1) {
    for (int64_t i = 0; i < n; ++i)
      memcpy(to + i * kRowStride, from + i * a.row_stride, sizeof(uint16_t) * (size_t)depth);
    whole = depth;
  } else if (a.row_stride == 1 && n % 8 == 0) {
    whole = depth & -8;
    for (int64_t k = 0; k < whole; k += 8) {
      for (int64_t ahead = k + 32; ahead < std::min(k + 40, whole); ++ahead) {
        for (int64_t i = 0; i < n; i += 32) __builtin_prefetch(from + ahead * a.column_stride + i);
      }
      for (int64_t i = 0; i < n; i += 8)
        transpose8(from + k * a.column_stride + i, a.column_stride, to + i * kRowStride + k,
                   kRowStride);
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t k = whole; k < depth; ++k)
      to[i * kRowStride + k] = from[i * a.row_stride + k * a.column_stride];
    std::fill(to + i * kRowStride + depth, to + i * kRowStride + padded, (uint16_t)0);
  }
}

// Columns [column, column + n) of `b` at depths [first, first + depth), as pairs of rows of
// kColumns, with zeros beyond `depth` up to `padded`, which is even.
void pack_pairs(const Operand& b, int64_t column, int64_t n, int64_t first, int64_t depth,
                int64_t padded, uint16_t* to) {
  const uint16_t* from = b.data + first * b.row_stride + column * b.column_stride;
  auto at = [&](int64_t k, int64_t j) {
    return k < depth ? from[k * b.row_stride + j * b.column_stride] : (uint16_t)0;
  };
  int64_t whole = 0;  // of the depth
  if (b.row_stride == 1) {
    whole = depth & -8;
    const int64_t wide = n & -4;
    for (int64_t k = 0; k < whole; k += 8) {
      uint16_t* pairs = to + k * kColumns;
      for (int64_t j = 0; j < wide; j += 4)
        transpose4(from + j * b.column_stride + k, b.column_stride, pairs + 2 * j, 2 * kColumns);
      for (int64_t j = wide; j < n; ++j) {
        for (int64_t i = 0; i < 8; ++i) pairs[(i / 2 * kColumns + j) * 2 + i % 2] = at(k + i, j);
      }
    }
  } else if (b.column_stride == 1) {
    whole = depth & -2;
    for (int64_t k = 0; k < whole; k += 2) {
      const uint16_t *even = from + k * b.row_stride, *odd = even + b.row_stride;
      uint16_t* pairs = to + k * kColumns;
      int64_t j = 0;
#if defined(__SSE2__)
      for (; j + 8 <= n; j += 8) {
        const __m128i x = _mm_loadu_si128((const __m128i*)(even + j));
        const __m128i y = _mm_loadu_si128((const __m128i*)(odd + j));
        _mm_storeu_si128((__m128i*)(pairs + 2 * j), _mm_unpacklo_epi16(x, y));
        _mm_storeu_si128((__m128i*)(pairs + 2 * j + 8), _mm_unpackhi_epi16(x, y));
      }
#endif
      for (; j < n; ++j) pairs[2 * j] = even[j], pairs[2 * j + 1] = odd[j];
    }
  }
  for (int64_t k = whole; k < padded; k += 2) {
    uint16_t* pairs = to + k * kColumns;
    for (int64_t j = 0; j < n; ++j) pairs[2 * j] = at(k, j), pairs[2 * j + 1] = at(k + 1, j);
  }
}

float widened(uint16_t x, OperandType type) {
  uint32_t bits = (uint32_t)x << 16;
  if (type == kOperandF16) {
    const uint32_t magnitude = (x & 0x7fffu) << 13;
    float finite;
    memcpy(&finite, &magnitude, 4);
    finite *= 0x1p112f;
    memcpy(&bits, &finite, 4);
    if (magnitude >= (0x7c00u << 13)) bits = magnitude | 0x7f800000u;
    bits |= (x & 0x8000u) << 16;
  }
  float y;
  memcpy(&y, &bits, 4);
  return y;
}

// Rounds to nearest even; a NaN is cut.
uint16_t narrowed(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t nearest = ((bits >> 16) & 1) + 0x7fff;
  return (uint16_t)((bits + (x == x ? nearest : 0)) >> 16);
}

// What the micro-kernel computes, in loops.
void plain(OperandType type, int64_t m, int64_t n, int64_t k, int64_t lda, bool add,
           const uint16_t* a, const uint16_t* b, int64_t ldb, float* c, int64_t ldc) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      float sum = add ? c[i * ldc + j] : 0.0f;
      for (int64_t d = 0; d < k; ++d)
        sum += widened(a[i * lda + d], type) * widened(b[(d / 2 * ldb + j) * 2 + d % 2], type);
      c[i * ldc + j] = sum;
    }
  }
}

// One thread's share of the work on a group of panels.
class Worker {
 public:
  Worker(const Product& p, bool packs, uint16_t* rows, float* sums)
      : p_(p), packs_(packs), rows_(rows), sums_(sums) {}

  // Rows of block `block` by `count` panels of kColumns, which lie `panel_size` apart from each
  // other, from column `column` on.
  void multiply(int64_t block, int64_t column, int64_t count, const uint16_t* panels,
                int64_t panel_size, int64_t padded) {
    const int64_t row = block * kRows, n = std::min(kRows, p_.m - row);
    const int64_t width = std::min(count * kColumns, p_.n - column);
    float* out = p_.narrow ? sums_ : (float*)p_.out + row * p_.stride + column;
    const int64_t ldc = p_.narrow ? count * kColumns : p_.stride;
    for (int64_t first = 0; first < padded; first += kDepth) {
      const int64_t deep = std::min(kDepth, padded - first);
      const uint16_t* a = p_.a.data + row * p_.a.row_stride + first;
      if (packs_) {
        pack_rows(p_.a, row, n, first, std::min(deep, p_.k - first), deep, rows_);
        a = rows_;
      }
      const int64_t lda = packs_ ? kRowStride : p_.a.row_stride;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t columns = std::min(kColumns, width - i * kColumns);
        block_product(n, columns, deep, lda, ldc, p_.add || first > 0, a,
                      panels + i * panel_size + first * kColumns, out + i * kColumns);
      }
    }
    if (!p_.narrow) return;
    for (int64_t i = 0; i < n; ++i) {
      uint16_t* to = (uint16_t*)p_.out + (row + i) * p_.stride + column;
      for (int64_t j = 0; j < width; ++j) to[j] = narrowed(out[i * ldc + j]);
    }
  }

 private:
  void block_product(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldc, bool add,
                     const uint16_t* a, const uint16_t* b, float* c) {
    for (int64_t size = kRows; m > 0; size /= 2) {
      for (; m >= size; m -= size, a += size * lda, c += size * ldc) {
        try {
          p_.kernel(size, n, k, lda, kColumns, ldc, add, a, b, c, true);
        } catch (...) {  // switched off since it was chosen
          plain(p_.type, size, n, k, lda, add, a, b, kColumns, c, ldc);
        }
      }
    }
  }

  const Product& p_;
  const bool packs_;
  uint16_t* const rows_;
  float* const sums_;
};

}  // namespace

void multiply(const Product& p) {
  if (p.m <= 0 || p.n <= 0) return;
  const bool packs = p.a.column_stride != 1 || p.k % 2 != 0 || p.k == 0;
  const int64_t step = packs ? kDepthStep : 2,
                padded = std::max<int64_t>(1, parts(p.k, step)) * step;
  const int64_t panel_size = padded * kColumns, panels = parts(p.n, kColumns);
  const int64_t blocks = parts(p.m, kRows);
  const int threads = threads_for(p.m * p.n * p.k, kLeastWork, p.threads);
  const int64_t room = kPanelBytes * threads / (int64_t)sizeof(uint16_t) / panel_size;
  const int64_t group = std::clamp<int64_t>(room, 1, panels);
  // Panels are shared out too where there are few blocks of rows.
  const int64_t splits = std::clamp<int64_t>(parts(4 * threads, blocks), 1, group);
  const int64_t share = parts(group, splits);
  const Buffer<uint16_t> packed = allocate<uint16_t>(group * panel_size);
  const Buffer<uint16_t> rows = allocate<uint16_t>(packs ? threads * kRows * kRowStride : 1);
  const Buffer<float> sums = allocate<float>(p.narrow ? threads * kRows * share * kColumns : 1);
  in_parallel(threads, [&](Team& team) {
    Worker worker(p, packs, rows.get() + (packs ? team.thread * kRows * kRowStride : 0),
                  sums.get() + (p.narrow ? team.thread * kRows * share * kColumns : 0));
    for (int64_t first = 0; first < panels; first += group) {
      const int64_t here = std::min(group, panels - first), cuts = parts(padded, kDepth);
      team.share(here * cuts, 1, [&](int64_t i) {
        const int64_t column = (first + i / cuts) * kColumns, depth = i % cuts * kDepth;
        const int64_t deep = std::min(kDepth, padded - depth);
        pack_pairs(p.b, column, std::min(kColumns, p.n - column), depth,
                   std::clamp<int64_t>(p.k - depth, 0, deep), deep,
                   packed.get() + i / cuts * panel_size + depth * kColumns);
      });
      team.share(blocks * parts(here, share), 1, [&](int64_t i) {
        const int64_t panel = i / blocks * share;
        worker.multiply(i % blocks, (first + panel) * kColumns, std::min(share, here - panel),
                        packed.get() + panel * panel_size, panel_size, padded);
      });
    }
    if (p.release) p.release(true);
  });
}

std::string check_kernel(MicroKernel kernel, MicroRelease release, OperandType type) {
  // Sizes differ, and any of them in the place of any other stays within 64 · 64 elements.
  constexpr int64_t kM = 3, kN = 48, kK = 22, kLda = 24, kLdb = 64, kLdc = 56;
  constexpr size_t kSize = 64 * 64;
  const uint16_t one = type == kOperandBF16 ? 0x3f80 : 0x3c00;
  std::vector<uint16_t> a(kSize, one), b(kSize, one);
  for (size_t i = 0; i < kSize; ++i) a[i] ^= (i * 7 % 5) << 5, b[i] ^= (i * 11 % 7) << 5;
  for (size_t i = 0; i < kSize; i += 3) b[i] |= 0x8000;
  std::vector<float> expected(3 * kSize, -0.375f), result = expected;
  for (bool add : {false, true}) {
    plain(type, kM, kN, kK, kLda, add, a.data(), b.data(), kLdb, expected.data() + kSize, kLdc);
    try {
      kernel(kM, kN, kK, kLda, kLdb, kLdc, add, a.data(), b.data(), result.data() + kSize, true);
      if (release) release(true);
    } catch (const std::exception& error) {
      return error.what();
    } catch (...) {
      return "it throws";
    }
    for (size_t i = 0; i < expected.size(); ++i) {
      if (!(fabsf(result[i] - expected[i]) <= 1e-4f))
        return "its numbers are not those of a small product";
    }
  }
  return {};
}

}  // namespace bgk
