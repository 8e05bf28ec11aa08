// Tilts weigh columns by e^(a·u + b·v). In a block these exponents are counted from those of its
// heaviest column: counted from 0, a common offset of the logits would take all digits.
#pragma once

#include "cpu/blocks.h"

namespace bgk::BGK_TARGET {

struct TiltBlock {
  Source z, v;
  float a, b, by;   // by: 1 / temperature
  float z0, v0;     // logits of the heaviest column
  double exponent;  // of that column
  double gap;       // its u - v

  BGK_INLINE Vec du(int i) const { return (z.at(i) - z0) * by; }
  BGK_INLINE Vec dv(int i) const { return (v.at(i) - v0) * by; }
  BGK_INLINE Vec weight(int i) const { return exp(tilt_exponent(a, b, du(i), dv(i))); }
};

// The exponent is -inf where no column has a weight.
inline TiltBlock tilt_block(const Tilt& tilt, Source z, Source v, int n, float by) {
  alignas(64) float w[kBlock];
  TiltBlock out = {z, v, (float)tilt.a, (float)tilt.b, by, 0.0f, 0.0f, kNegInf, 0.0};
  for (int i = 0; i < n; i += kLanes) store(w + i, tilt_exponent(out.a, out.b, z.at(i), v.at(i)));
  const float heaviest = block_max(w, padded(n));
  if (heaviest == kNegInf) return out;
  const int at = first_index(w, padded(n), heaviest);
  // A model without a say may mask the column.
  out.z0 = shift(z.x[at]), out.v0 = shift(v.x[at]);
  out.exponent = by * tilt_exponent<double>(tilt.a, tilt.b, z.x[at], v.x[at]);
  out.gap = by * ((double)out.z0 - out.v0);
  return out;
}

}  // namespace bgk::BGK_TARGET
