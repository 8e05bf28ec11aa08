#include "cpu/multiplied.h"

#include <algorithm>
#include <optional>

#include "cpu/panels.h"
#include "cpu/parallel.h"

namespace bgk {
namespace {

constexpr int64_t kHeight = 64;       // of a block, whose logits should stay in the L2 cache
constexpr int64_t kLeastHeight = 16;  // where there are threads for more blocks
constexpr int64_t kBlocksEach = 4;    // for a thread: they finish at about the same time

// A part of a tile.
struct Part {
  int64_t row, rows, column, columns;
};

Logits part_of(const Logits& x, const Part& at) {
  Logits y = x;
  const int64_t offset = at.row * x.row_stride + at.column;
  if (x.data) y.data = (char*)x.data + offset * (x.dtype == kF32 ? 4 : 2);
  y.columns = std::clamp<int64_t>(x.columns - at.column, 0, at.columns);
  return y;
}

Tile part_of(const Tile& x, const Part& at) {
  Tile y = {part_of(x.student, at), part_of(x.teacher, at),     at.rows,
            x.first_row + at.row,   x.first_column + at.column, x.code};
  if (!x.code.words.data) return y;
  y.code.words.data += at.row * x.code.words.stride + at.column;
  y.code.centres.data += at.row * x.code.centres.stride + at.column / kCodeBlock * 2;
  return y;
}

AbsorbArgs part_of(const AbsorbArgs& x, const Part& at) {
  AbsorbArgs y = x;
  y.tile = part_of(x.tile, at);
  y.state.floats.data += at.row, y.state.ints.data += at.row, y.labels += at.row;
  return y;
}

PairArgs part_of(const PairArgs& x, const Part& at) {
  PairArgs y = x;
  y.tile = part_of(x.tile, at);
  y.floats.data += at.row, y.labels += at.row, y.lse_s += at.row, y.lse_t += at.row;
  return y;
}

VjpArgs part_of(const VjpArgs& x, const Part& at) {
  VjpArgs y = x;
  y.tile = part_of(x.tile, at), y.out = part_of(x.out, at);
  y.factors.data += at.row, y.labels += at.row;
  return y;
}

// A model's logits, if they are multiplied.
class Model {
 public:
  explicit Model(const Multiplied* x) : bias_(x ? x->bias : nullptr) {
    if (x) panels_.emplace(x->factors, std::min(kSpan, x->factors.n));
  }

  int64_t parts(Columns span) const { return panels_ ? panels_->parts(span) : 0; }
  void pack(Columns span, int64_t part) const { panels_->pack(span, part); }
  int64_t scratch() const { return panels_ ? panels_->scratch() : 0; }
  int64_t block(int64_t height) const { return panels_ ? height * kSpan : 0; }

  // Multiplies rows by a span, and has `x` read the block.
  void multiply(const Part& at, Columns span, float* block, uint16_t* scratch, Logits& x) const {
    if (!panels_ || span.count == 0) return;
    for (int64_t i = 0; bias_ && i < at.rows; ++i)
      std::copy_n(bias_ + span.first, span.count, block + i * kSpan);
    panels_->multiply(at.row, at.rows, span, span, bias_ != nullptr, block, kSpan, scratch);
    x.data = block, x.row_stride = kSpan, x.dtype = kF32;
  }
  void release() const {
    if (panels_) panels_->release();
  }

 private:
  std::optional<Panels> panels_;
  const float* const bias_;
};

int64_t height_of(int64_t rows, int threads) {
  int64_t height = kHeight;
  while (height > kLeastHeight && parts_of(rows, height) < kBlocksEach * threads) height /= 2;
  return height;
}

}  // namespace

template <class Args>
int over_factors(int (*primitive)(const Args&, int), const Args& args, const TileFactors& factors,
                 int threads) {
  const Tile& tile = args.tile;
  const int64_t rows = tile.rows, width = tile.student.columns;
  if (rows == 0 || width == 0) return kOk;
  const int64_t height = height_of(rows, threads), blocks = parts_of(rows, height);
  const Model student(factors.student), teacher(factors.teacher);
  const int64_t z_size = student.block(height), size = z_size + teacher.block(height);
  const int64_t scratch = std::max(student.scratch(), teacher.scratch());
  const Buffer<float> logits = allocate<float>(threads * size);
  const Buffer<uint16_t> packed_rows = allocate<uint16_t>(threads * scratch);
  in_parallel(threads, [&](Team& team) {
    float *const z = logits.get() + team.thread * size, *const v = z + z_size;
    uint16_t* const mine = packed_rows.get() + team.thread * scratch;
    for (int64_t first = 0; first < width; first += kSpan) {
      const Columns s = {first, std::min(kSpan, width - first)};
      const Columns t = {first, std::clamp<int64_t>(tile.teacher.columns - first, 0, s.count)};
      const int64_t parts = student.parts(s);
      team.share(parts + teacher.parts(t), 1,
                 [&](int64_t i) { i < parts ? student.pack(s, i) : teacher.pack(t, i - parts); });
      team.share(blocks, 1, [&](int64_t i) {
        const Part at = {i * height, std::min(height, rows - i * height), first, s.count};
        Args part = part_of(args, at);
        student.multiply(at, s, z, mine, part.tile.student);
        teacher.multiply(at, t, v, mine, part.tile.teacher);
        primitive(part, 1);
      });
    }
    student.release(), teacher.release();
  });
  return kOk;
}

template int over_factors(int (*)(const AbsorbArgs&, int), const AbsorbArgs&, const TileFactors&,
                          int);
template int over_factors(int (*)(const PairArgs&, int), const PairArgs&, const TileFactors&, int);
template int over_factors(int (*)(const VjpArgs&, int), const VjpArgs&, const TileFactors&, int);

}  // namespace bgk
