// Pass 2: the gradient in a tile's raw student outputs.
#pragma once

#include "cpu/blocks.h"
#include "cpu/pairs.inl"
#include "cpu/tilts.h"
#include "cpu/vec_math.h"
#include "math/extras.h"
#include "math/row_vjp.h"

namespace bgk::BGK_TARGET {

// A block of the row: logits, and where its gradient is built. Passed by value: stores could alias
// anything else.
struct VjpBlock {
  Source z, v;
  float* d;
  int n;
  float inverse_temperature;
};

template <bool kTempered>
BGK_INLINE Vec about(const Source& x, int i, float by, float centre) {
  x.fetch_ahead(i);
  return kTempered ? x.at(i) * by - centre : x.at(i) - centre;
}

// One softmax: coefficient·p + constant, or added to what is there.
template <bool kTempered, bool kAdd>
inline void softmax_block(VjpBlock b, Source x, float coefficient, float centre, float constant) {
  for (int i = 0; i < b.n; i += kLanes) {
    const Vec p = exp(about<kTempered>(x, i, b.inverse_temperature, centre));
    store(b.d + i, coefficient * p + (kAdd ? load(b.d + i) : splat(constant)));
  }
}

// Both at once, the common case: A·p_s - D·p_t + M.
template <bool kTempered>
inline void pair_block(VjpBlock b, VjpColumns x) {
  for (int i = 0; i < b.n; i += kLanes) {
    const Vec p_s = exp(about<kTempered>(b.z, i, b.inverse_temperature, x.s));
    const Vec p_t = exp(about<kTempered>(b.v, i, b.inverse_temperature, x.t));
    store(b.d + i, x.a * p_s + x.m - x.d * p_t);
  }
}

// p_s·(A + B·lp - C·lq) + M.
template <bool kTempered>
inline void curved_block(VjpBlock b, VjpColumns x) {
  for (int i = 0; i < b.n; i += kLanes) {
    const Vec lp = about<kTempered>(b.z, i, b.inverse_temperature, x.s);
    const Vec lq = about<kTempered>(b.v, i, b.inverse_temperature, x.t);
    store(b.d + i, vjp_softmax(lp, lq, exp(lp), x.a, x.b, x.c) + x.m);
  }
}

// Whether one loop is all, so that the gradient may be written over the logits.
inline bool is_direct(const VjpPlan& plan, const VjpArgs& args) {
  return args.out.dtype == kF32 && !plan.extras && args.tile.student.cap == 0.0f &&
         plan.x.h == 0.0f && (!plan.curved || plan.x.d == 0.0f);
}

// All but the extra statistics, whatever column the label is, on compared columns.
template <bool kTempered>
inline void base_block(VjpBlock b, const VjpColumns& x) {
  if (x.b != 0.0f || x.c != 0.0f) {
    curved_block<kTempered>(b, x);
    if (x.d != 0.0f) softmax_block<kTempered, true>(b, b.v, -x.d, x.t, 0.0f);
  } else if (x.d != 0.0f) {
    pair_block<kTempered>(b, x);
  } else if (x.a != 0.0f || x.h == 0.0f) {
    softmax_block<kTempered, false>(b, b.z, x.a, x.s, x.m);
  } else {
    return softmax_block<false, false>(b, b.z, x.h, x.c_hard, x.m);
  }
  if (x.h != 0.0f) softmax_block<false, true>(b, b.z, x.h, x.c_hard, 0.0f);
}

// `from`: lse, P0, P1, P2 of the row, where x = u - v. `d` is no part of the sources.
inline void add_tilt(VjpBlock b, const Tilt& tilt, const double* from, int64_t stride,
                     double scale) {
  const TiltBlock x = tilt_block(tilt, b.z, b.v, b.n, b.inverse_temperature);
  const double p0 = from[stride], p1 = from[2 * stride], p2 = from[3 * stride];
  const double factor = scale * ::exp(x.exponent - from[0]);
  const float q0 = (float)(factor * (p0 + (p1 + p2 * x.gap) * x.gap)),
              q1 = (float)(factor * (p1 + 2.0 * p2 * x.gap)), q2 = (float)(factor * p2);
  const float lost =
      factor == factor ? 0.0f : (float)factor;  // NaN, where nothing has a weight too
  for (int i = 0; i < b.n; i += kLanes) {
    const Vec gap = x.du(i) - x.dv(i);
    const Vec terms = tilt.moments ? (q1 + q2 * gap) * gap + q0 : splat(q0);
    store(b.d + i, load(b.d + i) + times(x.weight(i), terms) + lost);
  }
}

inline void mixture_block(VjpBlock b, LogProbs x, float omega, const float y[3]) {
  const float y0 = y[0], y1 = y[1], y2 = y[2];
  for (int i = 0; i < b.n; i += kLanes) {
    const Vec lp = x.s(i), lq = x.t(i);
    const auto terms = mixture_terms<VecMath>(lp, lq, omega);
    const Vec sum = y0 + y1 * terms.ratio + y2 * terms.log_ratio_s;
    store(b.d + i, load(b.d + i) + times(exp(lp), sum));
  }
}

inline void variation_block(VjpBlock b, LogProbs x, const float y[2]) {
  const float y0 = y[0], y1 = y[1];
  for (int i = 0; i < b.n; i += kLanes) {
    const Vec p = exp(x.s(i)), q = exp(x.t(i));
    store(b.d + i, load(b.d + i) + p * (y0 + y1 * sign(p - q)));
  }
}

inline void extra_blocks(const VjpBlock& b, const VjpArgs& args, const VjpPlan& plan, int64_t r) {
  const Spec& spec = args.spec;
  const int64_t rows = args.tile.rows;
  const float scale = args.tile.student.scale;
  const LogProbs x(b.z, b.v, plan.row.lse_s, plan.row.lse_t, b.inverse_temperature);
  for (int k = 0; k < spec.tilt_count; ++k)
    add_tilt(b, spec.tilts[k], args.tilts + kTiltColumns * k * rows + r, rows, scale);
  const double* from = args.pairs + r;
  float y[3];
  auto take = [&](int count) {
    for (int k = 0; k < count; ++k, from += rows) y[k] = (float)(scale * *from);
  };
  for (int k = 0; k < spec.mixture_count; ++k) {
    take(3);
    mixture_block(b, x, spec.omegas[k], y);
  }
  if (!spec.total_variation) return;
  take(2);
  variation_block(b, x, y);
}

// The derivative of cap·tanh(x / cap), from its value.
inline void cap_block(VjpBlock b, float cap) {
  for (int i = 0; i < b.n; i += kLanes) {
    const Vec t = b.z.at(i) * (1.0f / cap);
    store(b.d + i, load(b.d + i) * (1.0f - t * t));
  }
}

inline void vjp_block(const VjpArgs& args, const VjpPlan& plan, int64_t row, int64_t at, VjpBlock b,
                      bool compared) {
  const bool here = at >= 0 && at < b.n;
  const float z_y = here ? b.z.x[at] : 0.0f,
              v_y = here && b.v.x ? b.v.x[at] : 0.0f;  // `d` may be their memory
  if (!compared) {
    softmax_block<false, false>(b, b.z, plan.h_beyond, plan.x.c_hard, plan.x.m);
  } else if (b.inverse_temperature == 1.0f) {
    base_block<false>(b, plan.x);
  } else {
    base_block<true>(b, plan.x);
  }
  if (here) b.d[at] = (float)vjp_label(plan.row, z_y, v_y, args.spec, compared);
  if (compared && plan.extras) extra_blocks(b, args, plan, row);
  if (args.tile.student.cap != 0.0f) cap_block(b, args.tile.student.cap);
}

inline void vjp_row(const VjpArgs& args, int64_t row) {
  const Tile& tile = args.tile;
  const int64_t compared = compared_columns(tile), width = tile.student.columns;
  if (args.labels[row] == kSkip) {
    __builtin_memset(address(args.out, row, 0), 0,
                     address(args.out, 0, width) - address(args.out, 0, 0));
    return;
  }
  alignas(64) float z[kBlock], v[kBlock], d[kBlock];
  const VjpPlan plan = plan_row(args, row);
  const bool direct = is_direct(plan, args);
  for (int64_t first = 0; first < width;) {
    const int n = block_size(first, compared, width);
    VjpBlock b = {
        read_block(tile.student, row, first, n, z), {}, d, n, args.spec.inverse_temperature};
    if (first < compared && plan.teacher) b.v = read_block(tile.teacher, row, first, n, v);
    if (direct && n == padded(n)) b.d = (float*)address(args.out, row, first);
    vjp_block(args, plan, row, args.labels[row] - tile.first_column - first, b, first < compared);
    store_gradient(args.out, row, first, n, b.d);
    first += n;
  }
}

}  // namespace bgk::BGK_TARGET
