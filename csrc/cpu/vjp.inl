// Pass 2: the gradient in a tile's raw student outputs.
#include "cpu/blocks.h"
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
BGK_INLINE Vec log_prob(const Source& x, int i, float by, float lse) {
  x.fetch_ahead(i);
  return kTempered ? x.at(i) * by - lse : x.at(i) - lse;
}

// One softmax: coefficient·p + constant, or added to what is there.
template <bool kTempered, bool kAdd>
inline void softmax_block(VjpBlock b, Source x, float coefficient, float lse, float constant) {
  for (int i = 0; i < b.n; i += kLanes) {
    const Vec p = exp(log_prob<kTempered>(x, i, b.inverse_temperature, lse));
    store(b.d + i, coefficient * p + (kAdd ? load(b.d + i) : splat(constant)));
  }
}

// Both at once, the common case: A·p_s - D·p_t + M.
template <bool kTempered>
inline void pair_block(VjpBlock b, VjpRow row) {
  for (int i = 0; i < b.n; i += kLanes) {
    const Vec p_s = exp(log_prob<kTempered>(b.z, i, b.inverse_temperature, row.lse_s));
    const Vec p_t = exp(log_prob<kTempered>(b.v, i, b.inverse_temperature, row.lse_t));
    store(b.d + i, row.a * p_s + row.m - row.d * p_t);
  }
}

// p_s·(A + B·lp - C·lq) + M.
template <bool kTempered>
inline void curved_block(VjpBlock b, VjpRow row) {
  for (int i = 0; i < b.n; i += kLanes) {
    const Vec lp = log_prob<kTempered>(b.z, i, b.inverse_temperature, row.lse_s);
    const Vec lq = log_prob<kTempered>(b.v, i, b.inverse_temperature, row.lse_t), p = exp(lp);
    store(b.d + i, vjp_softmax(lp, lq, p, row.a, row.b, row.c) + row.m);
  }
}

// What a row's gradient has in common from block to block.
struct VjpPlan {
  VjpRow row;  // for the label
  VjpRow
      folded;  // for the compared columns: H joins A where both softmaxes differ by a factor only
  bool extras;
  bool teacher;  // whether the gradient depends on the teacher's logits
  bool direct;  // whether one loop over the logits is all, so that the gradient may be written over
                // them at once
};

inline VjpPlan plan_row(const VjpArgs& args, int64_t row) {
  VjpPlan plan;
  static_assert(sizeof(VjpRow) == kCoefficients * sizeof(float), "one field a coefficient");
  float* values = (float*)&plan.row;
  for (int k = 0; k < kCoefficients; ++k) values[k] = args.row[k * args.tile.rows + row];
  // The factor of a linear scale is a factor of every term.
  plan.row = scaled(plan.row, args.tile.student.scale);
  VjpRow& x = plan.folded = plan.row;
  if (args.spec.inverse_temperature == 1.0f && x.h != 0.0f) {
    x.a += x.h * expf(x.lse_s - x.lse_c);
    x.h = 0.0f;
  }
  plan.extras = args.spec.tilt_count || args.spec.mixture_count || args.spec.total_variation;
  plan.direct = args.out.dtype == kF32 && !plan.extras && args.tile.student.cap == 0.0f &&
                x.h == 0.0f && ((x.b == 0.0f && x.c == 0.0f) || x.d == 0.0f);
  plan.teacher = plan.extras || x.b != 0.0f || x.c != 0.0f || x.d != 0.0f || x.d_y != 0.0f;
  return plan;
}

// All but the extra statistics, whatever column the label is, on compared columns.
template <bool kTempered>
inline void base_block(VjpBlock b, const VjpRow& x) {
  if (x.b != 0.0f || x.c != 0.0f) {
    curved_block<kTempered>(b, x);
    if (x.d != 0.0f) softmax_block<kTempered, true>(b, b.v, -x.d, x.lse_t, 0.0f);
  } else if (x.d != 0.0f) {
    pair_block<kTempered>(b, x);
  } else if (x.a != 0.0f || x.h == 0.0f) {
    softmax_block<kTempered, false>(b, b.z, x.a, x.lse_s, x.m);
  } else {
    return softmax_block<false, false>(b, b.z, x.h, x.lse_c, x.m);
  }
  if (x.h != 0.0f) softmax_block<false, true>(b, b.z, x.h, x.lse_c, 0.0f);
}

inline void tilt_block(VjpBlock b, Tilt tilt, const float* coefficient, int64_t stride,
                       float scale) {
  const float lse = coefficient[0], p0 = scale * coefficient[stride],
              p1 = scale * coefficient[2 * stride], p2 = scale * coefficient[3 * stride];
  for (int i = 0; i < b.n; i += kLanes) {
    const Vec u = b.z.at(i) * b.inverse_temperature, v = b.v.at(i) * b.inverse_temperature;
    const Vec weight = exp(tilt_exponent(tilt, u, v) - lse), gap = u - v;
    const Vec terms = tilt.moments ? (p1 + p2 * gap) * gap + p0 : splat(p0);
    store(b.d + i, load(b.d + i) + times(weight, terms));
  }
}

inline void mixture_block(VjpBlock b, VjpRow row, float omega, const float y[3]) {
  for (int i = 0; i < b.n; i += kLanes) {
    const Vec lp = b.z.at(i) * b.inverse_temperature - row.lse_s;
    const Vec lq = b.v.at(i) * b.inverse_temperature - row.lse_t;
    const auto terms = mixture_terms<VecMath>(lp, lq, omega);
    const Vec x = y[0] + y[1] * terms.ratio + y[2] * terms.log_ratio_s;
    store(b.d + i, load(b.d + i) + times(exp(lp), x));
  }
}

inline void variation_block(VjpBlock b, VjpRow row, const float y[2]) {
  for (int i = 0; i < b.n; i += kLanes) {
    const Vec p = exp(b.z.at(i) * b.inverse_temperature - row.lse_s);
    const Vec q = exp(b.v.at(i) * b.inverse_temperature - row.lse_t);
    store(b.d + i, load(b.d + i) + p * (y[0] + y[1] * sign(p - q)));
  }
}

inline void extra_blocks(const VjpBlock& b, const VjpArgs& args, const VjpRow& row, int64_t r) {
  const Spec& spec = args.spec;
  const int64_t rows = args.tile.rows;
  const float scale = args.tile.student.scale;
  for (int k = 0; k < spec.tilt_count; ++k)
    tilt_block(b, spec.tilts[k], args.tilts + kTiltColumns * k * rows + r, rows, scale);
  const float* from = args.pairs + r;
  float y[3];
  auto take = [&](int count) {
    for (int k = 0; k < count; ++k, from += rows) y[k] = scale * *from;
  };
  for (int k = 0; k < spec.mixture_count; ++k) {
    take(3);
    mixture_block(b, row, spec.omegas[k], y);
  }
  if (!spec.total_variation) return;
  take(2);
  variation_block(b, row, y);
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
    softmax_block<false, false>(b, b.z, plan.row.h, plan.row.lse_c, plan.row.m);
  } else if (b.inverse_temperature == 1.0f) {
    base_block<false>(b, plan.folded);
  } else {
    base_block<true>(b, plan.folded);
  }
  if (here) b.d[at] = vjp_label(plan.row, z_y, v_y, args.spec, compared);
  if (compared && plan.extras) extra_blocks(b, args, plan.row, row);
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
  for (int64_t first = 0; first < width;) {
    const int n = block_size(first, compared, width);
    VjpBlock b = {
        read_block(tile.student, row, first, n, z), {}, d, n, args.spec.inverse_temperature};
    if (first < compared && plan.teacher) b.v = read_block(tile.teacher, row, first, n, v);
    if (plan.direct && n == padded(n)) b.d = (float*)address(args.out, row, first);
    vjp_block(args, plan, row, args.labels[row] - tile.first_column - first, b, first < compared);
    store_gradient(args.out, row, first, n, b.d);
    first += n;
  }
}

}  // namespace bgk::BGK_TARGET
