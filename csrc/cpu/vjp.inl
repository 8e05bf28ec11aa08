// Pass 2: the gradient in a tile's raw student outputs.
#pragma once

#include "cpu/code.inl"
#include "cpu/pairs.inl"
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

BGK_INLINE Vec centred(const Source& x, int i, float by, float centre) {
  x.fetch_ahead(i);
  return x.at(i) * by - centre;
}

// p_s·(A + B·lp - C·lq) - D·p_t + M: kCurved, where B or C is not 0, and kTeacher, where D is not.
template <bool kCurved, bool kTeacher>
inline void base_loop(VjpBlock b, VjpColumns x) {
  for (int i = 0; i < b.n; i += kLanes) {
    const Vec lp = centred(b.z, i, b.inverse_temperature, x.s);
    Vec g = splat(x.m), lq{};
    if (kCurved || kTeacher) lq = centred(b.v, i, b.inverse_temperature, x.t);
    g += kCurved ? vjp_softmax(lp, lq, exp(lp), x.a, x.b, x.c) : x.a * exp(lp);
    if (kTeacher) g -= x.d * exp(lq);
    store(b.d + i, g);
  }
}

// H·e^(z - centre) + constant, or added to what is there.
template <bool kAdd>
inline void hard_loop(VjpBlock b, float h, float centre, float constant) {
  for (int i = 0; i < b.n; i += kLanes) {
    const Vec p = exp(centred(b.z, i, 1.0f, centre));
    store(b.d + i, h * p + (kAdd ? load(b.d + i) : splat(constant)));
  }
}

// Whether one loop is all, so that the gradient may be written over the logits.
inline bool is_direct(const VjpPlan& plan, const VjpArgs& args) {
  return args.out.dtype == kF32 && !plan.extras && args.tile.student.cap == 0.0f &&
         plan.x.h == 0.0f;
}

// All but the extra statistics, whatever column the label is, on compared columns.
inline void base_block(VjpBlock b, const VjpPlan& plan) {
  const VjpColumns& x = plan.x;
  const bool student = x.a != 0.0f || x.h == 0.0f, teacher = x.d != 0.0f;
  if (plan.curved) {
    teacher ? base_loop<true, true>(b, x) : base_loop<true, false>(b, x);
  } else if (teacher) {
    base_loop<false, true>(b, x);
  } else if (student) {
    base_loop<false, false>(b, x);
  }
  if (x.h == 0.0f) return;
  if (plan.curved || teacher || student) return hard_loop<true>(b, x.h, x.c_hard, 0.0f);
  hard_loop<false>(b, x.h, x.c_hard, x.m);
}

// What a row's gradient needs, with the terms of the extras.
struct RowPlan : VjpPlan {
  VjpTerm terms[kMaxExtras];
};

inline RowPlan plan_of(const VjpArgs& args, int64_t row) {
  RowPlan plan = {plan_row(args, row), {}};
  const In factors(args.factors, row);
  each_extra<VecMath>(args.spec, [&](const auto& statistic, int i, const Offsets& at) {
    plan.terms[i] = statistic.prepare(factors.from(at.factors), factors[0], factors[1])
                        .scaled(args.tile.student.scale);
    plan.extras |= plan.terms[i].active();
  });
  plan.teacher |= plan.extras;
  return plan;
}

template <class Statistic>
__attribute__((noinline)) void add_term(const Statistic& statistic, VjpBlock b, const LogProbs& x,
                                        const VjpTerm term) {
  for (int i = 0; i < b.n; i += kLanes)
    store(b.d + i, load(b.d + i) + statistic.term(term, x.s(i), x.t(i)));
}

// `d` is no part of the sources.
inline void extra_blocks(const VjpBlock& b, const Spec& spec, const RowPlan& plan) {
  const LogProbs x(b.z, b.v, plan.row.lse_s, plan.row.lse_t, b.inverse_temperature);
  for (int i = 0; i < spec.extra_count; ++i) {
    if (!plan.terms[i].active()) continue;
    with_statistic<VecMath>(
        spec, i, [&](const auto& statistic) { add_term(statistic, b, x, plan.terms[i]); });
  }
}

// The derivative of cap·tanh(x / cap), from its value.
inline void cap_block(VjpBlock b, float cap) {
  for (int i = 0; i < b.n; i += kLanes) {
    const Vec t = b.z.at(i) * (1.0f / cap);
    store(b.d + i, load(b.d + i) * (1.0f - t * t));
  }
}

inline void vjp_block(const VjpArgs& args, const RowPlan& plan, int64_t at, VjpBlock b,
                      bool compared) {
  const bool here = at >= 0 && at < b.n;
  const float z_y = here ? b.z.x[at] : 0.0f,
              v_y = here && b.v.x ? b.v.x[at] : 0.0f;  // `d` may be their memory
  if (compared) base_block(b, plan);
  if (!compared) hard_loop<false>(b, plan.h_beyond, plan.x.c_hard, plan.x.m);
  if (here) b.d[at] = (float)vjp_label(plan.row, z_y, v_y, args.spec, compared);
  if (compared && plan.extras) extra_blocks(b, args.spec, plan);
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
  const RowPlan plan = plan_of(args, row);
  const bool direct = is_direct(plan, args);
  for (int64_t first = 0; first < width;) {
    const int n = block_size(first, compared, width);
    const Pair pair = read_pair(tile, row, first, n, plan.teacher, z, v);
    VjpBlock b = {pair.z, pair.v, d, n, args.spec.inverse_temperature};
    if (direct && n == padded(n)) b.d = (float*)address(args.out, row, first);
    vjp_block(args, plan, args.labels[row] - tile.first_column - first, b, first < compared);
    store_gradient(args.out, row, first, n, b.d);
    first += n;
  }
}

}  // namespace bgk::BGK_TARGET
