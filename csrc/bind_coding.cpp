// The coding of kept tiles, as functions of the module.
#include "bind.h"
#include "cpu/dispatch.h"

using namespace pybind11::literals;

namespace bgk {
namespace {

typedef std::pair<float, float> Map;  // scale and cap: from raw to real logits

bool encode(const Rows& student, const Rows& teacher, const std::pair<Map, Map>& maps, int64_t rows,
            const Numbers& words, Address labels, int threads) {
  const auto& [s, t] = maps;
  int failed = 0;
  const Tile tile = {logits(student, {s.first, s.second}), logits(teacher, {t.first, t.second}),
                     rows, 0, 0};
  cpu_target()->encode({tile, matrix<float>(words), (const int64_t*)labels, &failed}, threads);
  return !failed;
}

void decode(const Numbers& words, int64_t compared, int64_t rows, const Rows& out, float scale,
            bool teacher, Address labels, int threads) {
  cpu_target()->decode({matrix<const float>(words), rows, compared, logits(out, {scale, 0.0f}),
                        teacher, (const int64_t*)labels},
                       threads);
}

}  // namespace

void bind_coding(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def("encode", &encode, "student"_a, "teacher"_a, "maps"_a, "rows"_a, "words"_a, "labels"_a,
        "threads"_a, unlocked);
  m.def("decode", &decode, "words"_a, "compared"_a, "rows"_a, "out"_a, "scale"_a, "teacher"_a,
        "labels"_a, "threads"_a, unlocked);
  m.attr("CODE_BLOCK") = kCodeBlock;
}

}  // namespace bgk
