// Pass 2: the gradient in a tile's raw student outputs, which it may be written over.
#pragma once

#include "cuda/pairs.cuh"
#include "cuda/sink.cuh"

namespace bgk::cuda {

// What the columns of a row have in common, computed in fp64 by a few threads.
struct VjpShared {
  VjpPlan plan;
  LogProbs probs;
  float at_label;
  VjpTerm terms[kMaxExtras];

  BGK_DEVICE bool extras(const Spec& spec) const {
    bool active = false;
    for (int i = 0; i < spec.extra_count; ++i) active |= terms[i].active();
    return active;
  }
};

// Where in a tile a label is, or -1.
BGK_DEVICE int column_in(const Tile& tile, int64_t label) {
  const int64_t column = label - tile.first_column;
  return column >= 0 && column < tile.student.columns ? (int)column : -1;
}

// One thread for the plan and the label, and one for each extra.
template <class Format>
BGK_DEVICE void prepare(const VjpArgs& args, const RowPair<Format>& rows, int64_t row,
                        VjpShared& out) {
  const Spec& spec = args.spec;
  const In factors(args.factors, row);
  if (thread() == 0) {
    out.plan = plan_row(args, row);
    const VjpRow& x = out.plan.row;
    out.probs = {Centre(x.lse_s), Centre(x.lse_t), spec.inverse_temperature};
    const int label = column_in(args.tile, args.labels[row]);
    if (label >= 0) {
      const bool compared = args.tile.teacher.data && label < args.tile.teacher.columns;
      const float v = compared && out.plan.teacher ? rows.t.at(label) : 0.0f;
      out.at_label = (float)vjp_label(x, rows.s.at(label), v, spec, compared);
    }
  }
  if (thread() >= spec.extra_count) return;
  each_extra<ScalarMath>(spec, [&](const auto& statistic, int i, const Offsets& at) {
    if (i == thread())
      out.terms[i] = statistic.prepare(factors.from(at.factors), factors[0], factors[1])
                         .scaled(args.tile.student.scale);
  });
}

// The gradient at kColumns columns.
BGK_DEVICE void vjp_base(const VjpPlan& plan, float by, bool compared, const float* z,
                         const float* v, float* g) {
  const VjpColumns x = plan.x;
  const float hard = compared ? x.h : plan.h_beyond;
  if (compared && plan.curved) {
    unrolled([&](int k) {
      const float lp = z[k] * by - x.s, lq = v[k] * by - x.t;
      g[k] = x.m + vjp_softmax(lp, lq, fast_exp(lp), x.a, x.b, x.c);
    });
  } else if (compared) {
    unrolled([&](int k) { g[k] = x.m + x.a * fast_exp(z[k] * by - x.s); });
  } else {
    unrolled([&](int k) { g[k] = x.m; });
  }
  if (compared && x.d != 0.0f) unrolled([&](int k) { g[k] -= x.d * fast_exp(v[k] * by - x.t); });
  if (hard != 0.0f) unrolled([&](int k) { g[k] += hard * fast_exp(z[k] - x.c_hard); });
}

BGK_DEVICE void vjp_extras(const VjpShared& row, const Spec& spec, const float* z, const float* v,
                           float* g) {
  for (int i = 0; i < spec.extra_count; ++i) {
    const VjpTerm term = row.terms[i];
    if (!term.active()) continue;
    with_statistic<ScalarMath>(spec, i, [&](const auto& statistic) {
      unrolled([&](int k) {
        const float lp = row.probs.of_s(z[k]), lq = row.probs.of_t(v[k]);
        g[k] += statistic.term(term, lp, lq);
      });
    });
  }
}

// `label`: its column of the tile, or -1.
template <class Format, bool kExtras>
BGK_DEVICE void vjp_range(const Spec& spec, float cap, const RowPair<Format>& rows, const Sink& out,
                          int label, const Range& range, bool compared, const VjpShared& shared) {
  const bool extras = kExtras && compared && shared.extras(spec);
  const bool teacher = compared && (shared.plan.teacher || extras);
  const int steps = range.steps();
  Batch<Format> s, t, next_s, next_t = {};
  Step step, next;
  auto fetch = [&](int i) {
    next = range.step(i);
    rows.s.fetch(next, next_s);
    if (teacher) rows.t.fetch(next, next_t);
  };
  int i = warp();
  if (i < steps) fetch(i);
  for (; i < steps; i += kWarps) {
    step = next, s = next_s, t = next_t;
    if (i + kWarps < steps) fetch(i + kWarps);  // in flight under the arithmetic
    float z[kColumns], v[kColumns], g[kColumns];
    rows.s.real(s, z);
    if (teacher) rows.t.real(t, v);
    vjp_base(shared.plan, spec.inverse_temperature, compared, z, v, g);
    if (step.has(label)) {
      unrolled([&](int k) {
        if (step.column<Format>(k) == label) g[k] = shared.at_label;
      });
    }
    if (kExtras && extras) vjp_extras(shared, spec, z, v, g);
    if (cap != 0.0f) {
      unrolled([&](int k) { g[k] *= 1.0f - (z[k] / cap) * (z[k] / cap); });
    }
    out.put<Format>(step, g);
  }
}

// A block's share of a row; `skip`: its gradient is zero, whatever the logits.
template <class Format, bool kExtras>
BGK_DEVICE void vjp_share(const Spec& spec, float cap, const RowPair<Format>& rows, const Sink& out,
                          int label, const Share& share, bool skip, const VjpShared& shared) {
  for (int compared = 1; compared >= 0; --compared) {  // a loop, so that the code is there once
    const int start = compared ? share.start : share.pair_stop;
    const int stop = compared ? share.pair_stop : share.stop;
    const Range range = rows.range(
        start, stop, compared, [&](int column) { return out.aligned(column, Format::kVector); });
    if (!skip) {
      vjp_range<Format, kExtras>(spec, cap, rows, out, label, range, compared, shared);
      continue;
    }
    const float zero[kColumns] = {};
    for (int i = warp(); i < range.steps(); i += kWarps) out.put<Format>(range.step(i), zero);
  }
}

// Grid (rows, splits).
template <class Format, bool kExtras>
__global__ void __launch_bounds__(kThreads, kExtras ? 2 : 3)
    vjp_kernel(const __grid_constant__ VjpArgs args) {
  __shared__ VjpShared shared;
  const int64_t row = block().x, label = args.labels[row];
  const RowPair<Format> rows(args.tile, row);
  if (label != kSkip) prepare(args, rows, row, shared);
  sync_block();
  vjp_share<Format, kExtras>(args.spec, args.tile.student.cap, rows, Sink(args.out, row),
                             column_in(args.tile, label), Share(args.tile, block().y, blocks().y),
                             label == kSkip, shared);
}

}  // namespace bgk::cuda
