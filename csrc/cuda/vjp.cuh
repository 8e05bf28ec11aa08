// Pass 2: the gradient in a tile's raw student outputs, which it may be written over.
#pragma once

#include "cuda/code.cuh"
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
    out.probs = LogProbs(x.lse_s, x.lse_t, spec.inverse_temperature);
    const int label = column_in(args.tile, args.labels[row]);
    if (label >= 0) {
      const bool compared = args.tile.teacher.data && label < args.tile.teacher.columns;
      const float v = compared && out.plan.teacher ? rows.teacher_at(label) : 0.0f;
      out.at_label = (float)vjp_label(x, rows.student_at(label), v, spec, compared);
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

// The columns of a block's share where the models are compared, or the others.
template <class Format>
BGK_DEVICE Range range_of(const RowPair<Format>& rows, const Sink& out, const Share& share,
                          bool compared) {
  const int start = compared ? share.start : share.pair_stop;
  const int stop = compared ? share.pair_stop : share.stop;
  return rows.range(start, stop, compared,
                    [&](int column) { return out.aligned(column, Format::kVector); });
}

// `label`: its column of the tile, or -1. `next`: the first step, fetched.
template <class Format, bool kExtras>
BGK_DEVICE void vjp_range(const Spec& spec, float cap, const RowPair<Format>& rows, const Sink& out,
                          int label, const Range& range, bool compared, Ahead<Format>& next,
                          const VjpShared& shared) {
  const bool extras = kExtras && compared && shared.extras(spec);
  const bool teacher = compared && (shared.plan.teacher || extras);
  constexpr bool early = !kExtras || Format::kWords == 4;  // else registers do not suffice
  const int steps = range.steps();
  for (int i = warp(); i < steps; i += kWarps) {
    const Ahead<Format> now = next;
    if (early) next.fetch(rows, range, i + kWarps, teacher);  // in flight under the arithmetic
    float z[kColumns], v[kColumns], g[kColumns];
    rows.real(now.step, teacher, now.s, now.t, z, v);
    vjp_base(shared.plan, spec.inverse_temperature, compared, z, v, g);
    if (now.step.has(label)) {
      unrolled([&](int k) {
        if (now.step.template column<Format>(k) == label) g[k] = shared.at_label;
      });
    }
    if (kExtras && extras) vjp_extras(shared, spec, z, v, g);
    if (cap != 0.0f) {
      unrolled([&](int k) { g[k] *= 1.0f - (z[k] / cap) * (z[k] / cap); });
    }
    out.put<Format>(now.step, g);
    if (!early) next.fetch(rows, range, i + kWarps, teacher);
  }
}

// A block's share of a row. `next`: the first step of the first of its ranges, fetched.
template <class Format, bool kExtras>
BGK_DEVICE void vjp_share(const Spec& spec, float cap, const RowPair<Format>& rows, const Sink& out,
                          int label, const Share& share, Ahead<Format>& next,
                          const VjpShared& shared) {
  for (int compared = 1; compared >= 0; --compared) {  // a loop, so that the code is there once
    const Range range = range_of(rows, out, share, compared);
    if (!compared) next.fetch(rows, range, warp(), false);
    vjp_range<Format, kExtras>(spec, cap, rows, out, label, range, compared, next, shared);
  }
}

// Of a row that takes no part, whatever its logits.
template <class Format>
BGK_DEVICE void put_zeros(const RowPair<Format>& rows, const Sink& out, const Share& share) {
  const float zero[kColumns] = {};
  for (int compared = 1; compared >= 0; --compared) {
    const Range range = range_of(rows, out, share, compared);
    for (int i = warp(); i < range.steps(); i += kWarps) out.put<Format>(range.step(i), zero);
  }
}

// In sm_80 a few more registers are needed, which must not be spilled.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kVjpBlocks = 2;
#else
constexpr int kVjpBlocks = 3;
#endif

// Grid (rows, splits). The first logits are fetched before the barrier, with the teacher's, whether
// the gradient depends on them or not: that is known after it.
template <class Format, bool kExtras>
__global__ void __launch_bounds__(kThreads, !kExtras && Format::kWords == 4 ? kVjpBlocks : 2)
    vjp_kernel(const __grid_constant__ Shared<VjpArgs> args) {
  __shared__ VjpShared shared;
  const int64_t row = block().x, label = args.labels[row];
  const RowPair<Format> rows(args.tile, row);
  const Share share(args.tile, (int)block().y, args.each);
  const Sink out(args.out, row);
  Ahead<Format> first;
  const Range range = range_of(rows, out, share, true);
  first.fetch(rows, range, warp(), true);
  if (label == kSkip) return put_zeros(rows, out, share);
  prepare(args, rows, row, shared);
  sync_block();
  vjp_share<Format, kExtras>(args.spec, args.tile.student.cap, rows, out,
                             column_in(args.tile, label), share, first, shared);
}

}  // namespace bgk::cuda
