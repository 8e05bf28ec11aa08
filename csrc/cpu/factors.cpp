#include "cpu/factors.h"

#include <math.h>
#include <string.h>

#include <exception>
#include <vector>

namespace bgk {
namespace {

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

}  // namespace

void plain_product(OperandType type, int64_t m, int64_t n, int64_t k, int64_t lda, bool add,
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
    plain_product(type, kM, kN, kK, kLda, add, a.data(), b.data(), kLdb, expected.data() + kSize,
                  kLdc);
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
