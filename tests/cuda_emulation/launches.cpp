// Launches every kernel on rows of exact size, for a sanitizer to watch: `launches [file line]`,
// where the arguments name a barrier that is left out. Says which barriers it met.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "cuda/absorb.cu"
#include "cuda/finalize.cu"
#include "cuda/fold.cu"
#include "cuda/pairs.cu"
#include "cuda/scale.cu"
#include "cuda/vjp.cu"

using namespace bgk;

namespace {

constexpr int kRows = 2;
std::mt19937 generator(1);

// Rows of logits, each of exactly `stride` elements.
struct Rows {
  std::vector<char> bytes;

  Rows(int64_t stride, DType dtype) : bytes((size_t)(kRows * stride) * (dtype == kF32 ? 4 : 2)) {
    std::normal_distribution<float> normal(0, 3);
    for (int64_t i = 0; i < kRows * stride; ++i) {
      const float x = normal(generator);
      if (dtype == kF32) ((float*)bytes.data())[i] = x;
      if (dtype == kBF16) ((uint16_t*)bytes.data())[i] = cuda::to_bf16(x);
    }
  }
  Logits of(int64_t stride, int64_t columns, DType dtype) {
    return {bytes.data(), stride, columns, dtype, 1.0f, 0.0f};
  }
};

Spec spec_of(int64_t width, int64_t compared, LabelRule rule, int extras) {
  Spec spec{};
  spec.columns = width, spec.compared = compared;
  spec.temperature = width == compared ? 1.0 : 2.0, spec.inverse = 1.0 / spec.temperature;
  spec.inverse_temperature = (float)spec.inverse;
  spec.shared_softmax = width == compared, spec.logit_sum = true, spec.rule = rule, spec.key = 7;
  // A power sum alone; with it a tilt with moments, a temperature of its own, and two second reads.
  const Extra all[] = {{0, false, 0.0, 0.1},
                       {0, true, 0.3, 0.3},
                       {1, false, 1.5, 0.0},
                       {2, false, 0.5, 0.0},
                       {3, false, 0.0, 0.0}};
  spec.extra_count = extras;
  for (int i = 0; i < extras; ++i) spec.extras[i] = all[i];
  return spec;
}

int launch(DType dtype, int64_t width, int64_t compared, LabelRule rule, int extras, int splits) {
  const Spec spec = spec_of(width, compared, rule, extras);
  const int64_t stride = width + (width == compared ? 0 : 3);
  Rows student(stride, dtype), teacher(stride, dtype), gradient(stride, dtype);
  Tile tile = {student.of(stride, width, dtype), teacher.of(stride, compared, dtype), kRows, 0, 0};
  const int64_t centre_stride = (width + kCodeBlock - 1) / kCodeBlock * 2;
  std::vector<uint32_t> words(kRows * stride);
  std::vector<float> centres(kRows * centre_stride);
  if (dtype == kF32 && rule == kSample)  // some are coded
    tile.code = {{words.data(), stride}, {centres.data(), centre_stride}};
  const auto end =
      cuda::each_extra<cuda::ScalarMath>(spec, [](const auto&, int, const cuda::Offsets&) {});
  std::vector<float> floats(end.sums * kRows), parts(splits * end.sums * kRows);
  std::vector<int64_t> ints(3 * kRows, kNone), part_ints(splits * 3 * kRows);
  for (int r = 0; r < kRows; ++r)
    for (int k : {0, 4, 8, 11, 12, 13}) floats[k * kRows + r] = cuda::kNegInf;
  cuda::each_extra<cuda::ScalarMath>(spec, [&](const auto& x, int, const cuda::Offsets& at) {
    for (int r = 0; x.kMaximum && r < kRows; ++r) floats[at.sums * kRows + r] = cuda::kNegInf;
  });
  const int64_t first = rule == kIndex ? 5 : kNone, second = rule == kIndex ? width - 1 : kNone;
  const std::vector<int64_t> labels = {first, second};
  const cuda::Where where = {0, 0, splits, parts.data(), part_ints.data()};
  const State state = {{floats.data(), kRows}, {ints.data(), kRows}};
  std::vector<double> statistics(end.fields * kRows), factors(end.factors * kRows);
  const std::vector<double> grads(end.fields * kRows, 0.1);
  int failed = cuda::absorb({spec, tile, state, labels.data()}, where);
  const FinalizeArgs finalize = {spec, kRows, state, labels.data(), {statistics.data(), kRows}};
  failed += cuda::finalize(finalize, where);
  failed += cuda::absorb_pairs(
      {spec, tile, state.floats, labels.data(), statistics.data(), statistics.data() + kRows},
      where);
  const Matrix<const double> values = {statistics.data(), kRows};
  failed +=
      cuda::fold({spec, kRows, values, {grads.data(), kRows}, {factors.data(), kRows}}, where);
  failed += cuda::vjp(
      {spec, tile, gradient.of(stride, width, dtype), {factors.data(), kRows}, ints.data()}, where);
  return failed;
}

int scale(DType dtype, bool wide) {
  Rows x(517, dtype);
  const double number = 0.5;
  const float narrow = 0.5f;
  const void* factor = wide ? (const void*)&number : &narrow;
  return cuda::scale({x.bytes.data(), kRows * 517, dtype, factor, wide}, {0, 0, 4});
}

}  // namespace

int main(int count, char** arguments) {
  cuda::Machine& m = cuda::machine();
  if (count > 2) m.muted = {arguments[1], atoi(arguments[2])};
  int failed = 0, steps = 0;
  for (const bool backwards : {false, true}) {
    m.backwards = backwards;
    for (const DType dtype : {kF32, kBF16})
      for (const LabelRule rule : {kIndex, kSample})
        for (const int extras : {0, 1, 5})
          for (const bool whole : {true, false}) {
            const int64_t width = whole ? 1056 : 2341;
            failed += launch(dtype, width, whole ? width : width - 21, rule, extras, whole ? 1 : 3);
            ++steps;
          }
    failed += scale(kF32, true) + scale(kBF16, false);
  }
  for (int i = 0; i < m.site_count; ++i) printf("%s %d\n", m.sites[i].file, m.sites[i].line);
  printf("steps %d\n", steps);
  return failed;
}
