// Pass 2: the gradient in a tile's raw student outputs, which it may be written over.
#pragma once

#include "cuda/pairs.cuh"
#include "cuda/rows.cuh"
#include "math/extras.h"
#include "math/row_vjp.h"

namespace bgk::cuda {

// e^(a·lp + b·lq + offset)·(q0 + (q1 + q2·gap)·gap) with gap = lp - lq.
struct TiltTerms {
  float a, b, offset, q0, q1, q2;

  BGK_DEVICE float at(float lp, float lq) const {
    const float gap = lp - lq;
    const float terms = q1 == 0.0f && q2 == 0.0f ? q0 : q0 + (q1 + q2 * gap) * gap;
    return times(fast_exp(tilt_exponent(a, b, lp, lq) + offset), terms);
  }
};

// What the columns of a row have in common, computed in fp64 by a few threads.
struct VjpShared {
  VjpPlan plan;
  LogProbs probs;
  float at_label;
  TiltTerms tilts[kMaxTilts];
  float pairs[3 * kMaxMixtures + 2];
};

BGK_DEVICE TiltTerms tilt_terms(const VjpArgs& args, const Tilt& tilt, int i, int64_t row,
                                const VjpRow& x) {
  const double* from = args.tilts + kTiltColumns * i * args.tile.rows + row;
  const int64_t next = args.tile.rows;
  const double scale = args.tile.student.scale, gap = x.lse_s - x.lse_t;  // u - v = lp - lq + gap
  const double p0 = scale * from[next], p1 = scale * from[2 * next], p2 = scale * from[3 * next];
  const double offset = tilt_exponent<double>(tilt.a, tilt.b, x.lse_s, x.lse_t) - from[0];
  TiltTerms out = {(float)tilt.a, (float)tilt.b, (float)offset, (float)p0, 0.0f, 0.0f};
  if (tilt.moments) {
    out.q0 = (float)(p0 + (p1 + p2 * gap) * gap);
    out.q1 = (float)(p1 + 2.0 * p2 * gap), out.q2 = (float)p2;
  }
  return out;
}

// Where in a tile a label is, or -1.
BGK_DEVICE int column_in(const Tile& tile, int64_t label) {
  const int64_t column = label - tile.first_column;
  return column >= 0 && column < tile.student.columns ? (int)column : -1;
}

// One thread each for the plan and the label, the tilts, and the pairs.
template <class Format>
BGK_DEVICE void prepare(const VjpArgs& args, const Spec& spec, const RowPair<Format>& rows,
                        int64_t row, VjpShared& out) {
  const int64_t rows_count = args.tile.rows;
  const int i = thread();
  if (i == 0) {
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
  if (i < spec.tilt_count) {
    VjpRow x;
    x.lse_s = args.row[row], x.lse_t = args.row[rows_count + row];
    out.tilts[i] = tilt_terms(args, spec.tilts[i], i, row, x);
  }
  if (i < pair_count(spec))
    out.pairs[i] = (float)(args.tile.student.scale * args.pairs[i * rows_count + row]);
}

// The gradient at kColumns columns.
BGK_DEVICE void vjp_base(const VjpPlan& plan, float by, bool compared, const float* z,
                         const float* v, float* g) {
  const VjpColumns& x = plan.x;
  const float a = x.a, d = x.d, m = x.m, c_s = x.s, c_t = x.t;
  if (!compared) {
#pragma unroll
    for (int k = 0; k < kColumns; ++k) g[k] = m + plan.h_beyond * fast_exp(z[k] - x.c_hard);
    return;
  }
  if (plan.curved) {
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      const float lp = z[k] * by - c_s, lq = v[k] * by - c_t;
      g[k] = m + vjp_softmax(lp, lq, fast_exp(lp), a, x.b, x.c);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kColumns; ++k) g[k] = m + a * fast_exp(z[k] * by - c_s);
  }
  if (d != 0.0f) {
#pragma unroll
    for (int k = 0; k < kColumns; ++k) g[k] -= d * fast_exp(v[k] * by - c_t);
  }
  if (x.h != 0.0f) {
#pragma unroll
    for (int k = 0; k < kColumns; ++k) g[k] += x.h * fast_exp(z[k] - x.c_hard);
  }
}

BGK_DEVICE void vjp_extras(const VjpShared& row, const Spec& spec, const float* z, const float* v,
                           float* g) {
#pragma unroll
  for (int k = 0; k < kColumns; ++k) {
    const float lp = row.probs.of_s(z[k]), lq = row.probs.of_t(v[k]), p = fast_exp(lp);
    float sum = 0.0f;
    for (int i = 0; i < spec.tilt_count; ++i) sum += row.tilts[i].at(lp, lq);
    const float* y = row.pairs;
    for (int i = 0; i < spec.mixture_count; ++i, y += 3) {
      const auto x = mixture_terms<ScalarMath>(lp, lq, spec.omegas[i]);
      sum += times(p, y[0] + y[1] * x.ratio + y[2] * x.log_ratio_s);
    }
    if (spec.total_variation) sum += p * (y[0] + y[1] * sign(p - fast_exp(lq)));
    g[k] += sum;
  }
}

// Where a row's gradient goes.
struct Sink {
  char* row;
  DType dtype;

  BGK_DEVICE Sink(const Logits& x, int64_t r)
      : row((char*)x.data + r * x.row_stride * bytes_of(x.dtype)), dtype(x.dtype) {}

  // Whether `count` columns from one on can be stored at once.
  BGK_DEVICE bool aligned(int64_t column, int count) const {
    const int bytes = bytes_of(dtype) * count;
    return ((intptr_t)row + column * bytes_of(dtype)) % (bytes < 16 ? bytes : 16) == 0;
  }
  BGK_DEVICE uint32_t narrowed(float x) const { return dtype == kBF16 ? to_bf16(x) : to_f16(x); }

  BGK_DEVICE void put_one(int64_t column, float g) const {
    if (dtype == kF32) ((float*)row)[column] = g;
    if (dtype != kF32) ((uint16_t*)row)[column] = (uint16_t)narrowed(g);
  }
  template <int kCount>
  BGK_DEVICE void put_vector(int64_t column, const float* g) const {
    uint32_t words[kCount];
    if (dtype == kF32) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) words[k] = as_bits(g[k]);
#pragma unroll
      for (int k = 0; k < kCount; k += 4) store_words<4>(row + 4 * (column + k), words + k);
    } else {
#pragma unroll
      for (int k = 0; k < kCount; k += 2) words[k / 2] = narrowed(g[k]) | narrowed(g[k + 1]) << 16;
      store_words<kCount / 2>(row + 2 * column, words);
    }
  }

  template <class Format>
  BGK_DEVICE void put(const Step& step, const float* g) const {
    if (step.vectors) {
      if constexpr (Format::kVector > 1) {
#pragma unroll
        for (int k = 0; k < kColumns; k += Format::kVector) {
          const int column = step.column<Format>(k);
          if (column < step.stop) put_vector<Format::kVector>(column, g + k);
        }
      }
    } else {
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        const int column = step.column<Format>(k);
        if (column < step.stop) put_one(column, g[k]);
      }
    }
  }
};

// `label`: its column of the tile, or -1.
template <class Format, bool kExtras>
BGK_DEVICE void vjp_range(const Spec& spec, float cap, const RowPair<Format>& rows, const Sink& out,
                          int label, const Range& range, bool compared, const VjpShared& shared) {
  const bool teacher = compared && shared.plan.teacher;
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
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        if (step.column<Format>(k) == label) g[k] = shared.at_label;
      }
    }
    if (kExtras && compared) vjp_extras(shared, spec, z, v, g);
    if (cap != 0.0f) {
#pragma unroll
      for (int k = 0; k < kColumns; ++k) g[k] *= 1.0f - (z[k] / cap) * (z[k] / cap);
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
    vjp_kernel(const __grid_constant__ Launched<VjpArgs> in) {
  __shared__ VjpShared shared;
  const VjpArgs& args = in.args;
  const Spec spec = in.spec();
  const int64_t row = block().x, label = args.labels[row];
  const RowPair<Format> rows(args.tile, row);
  if (label != kSkip) prepare(args, spec, rows, row, shared);
  sync_block();
  vjp_share<Format, kExtras>(spec, args.tile.student.cap, rows, Sink(args.out, row),
                             column_in(args.tile, label), Share(args.tile, block().y, blocks().y),
                             label == kSkip, shared);
}

}  // namespace bgk::cuda
