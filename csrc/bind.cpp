// bgkernels.backends.native._C: addresses and strides in, a status out. The caller has validated the arguments and
// keeps the tensors alive.
#include "bind.h"

#include <stdlib.h>

#include <optional>
#include <stdexcept>

#include "cpu/dispatch.h"

using namespace pybind11::literals;

namespace bgk {
namespace {

OwnedSpec make_spec(int64_t compared, double temperature, bool shared_softmax, bool logit_sum,
                    int rule, uint32_t key,
                    const std::vector<std::tuple<double, double, bool>>& tilts,
                    std::vector<float> omegas, bool total_variation) {
  OwnedSpec spec;
  spec.plain.compared = compared;
  spec.plain.inverse_temperature = (float)(1.0 / temperature);
  spec.plain.shared_softmax = shared_softmax, spec.plain.logit_sum = logit_sum;
  spec.plain.rule = (LabelRule)rule, spec.plain.key = key;
  spec.plain.total_variation = total_variation;
  for (const auto& [a, b, moments] : tilts) spec.tilts.push_back({a, b, moments});
  spec.omegas = std::move(omegas);
  return spec;
}

Logits make_logits(Address data, int64_t row_stride, int64_t columns, int dtype, float scale,
                   float cap) {
  return {(void*)data, row_stride, columns, (DType)dtype, scale, cap};
}

Tile make_tile(const Logits& student, const std::optional<Logits>& teacher, int64_t rows,
               int64_t first_row, int64_t first_column) {
  return {student, teacher.value_or(Logits{}), rows, first_row, first_column};
}

int absorb(const OwnedSpec& spec, const Tile& tile, const Columns& state, Address labels,
           int threads) {
  const AbsorbArgs args = absorb_args(spec, tile, state, labels, threads);
  const Status status = check(args.spec, tile);
  if (status == kOk) cpu_target()->absorb(args);
  return status;
}

int absorb_pairs(const OwnedSpec& spec, const Tile& tile, const Sums& sums, const Normalisers& lse,
                 int threads) {
  const PairArgs args = pair_args(spec, tile, sums, lse, threads);
  const Status status = check(args.spec, tile);
  if (status == kOk) cpu_target()->absorb_pairs(args);
  return status;
}

int vjp(const OwnedSpec& spec, const Tile& tile, const Logits& out, const Factors& factors,
        Address labels, int threads) {
  const VjpArgs args = vjp_args(spec, tile, out, factors, labels, threads);
  const Status status = known(out) ? check(args.spec, tile) : kUnknownDType;
  if (status == kOk) cpu_target()->vjp(args);
  return status;
}

std::vector<std::string> target_names() {
  std::vector<std::string> names;
  for (const Kernels* const* k = cpu_targets(); *k; ++k) names.push_back((*k)->name);
  return names;
}

std::string listed(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

void choose_target(const std::string& name) {
  if (set_cpu_target(name.c_str())) return;
  throw std::invalid_argument("cpu target must be one of " + listed(target_names()) +
                              " on this machine, got '" + name + "'");
}

}  // namespace
}  // namespace bgk

PYBIND11_MODULE(_C, m) {
  using namespace bgk;
  // An unusable BGKERNELS_CPU_TARGET fails the import, so that `supports()` shows the reason.
  if (!cpu_target())
    throw std::runtime_error("BGKERNELS_CPU_TARGET must be one of " + listed(target_names()) +
                             " on this machine, got '" + getenv("BGKERNELS_CPU_TARGET") + "'");
  m.attr("MAX_TILTS") = kMaxTilts;

  py::class_<OwnedSpec>(m, "Spec").def(py::init(&make_spec), py::kw_only(), "compared"_a,
                                       "temperature"_a, "shared_softmax"_a, "logit_sum"_a, "rule"_a,
                                       "key"_a, "tilts"_a, "omegas"_a, "total_variation"_a);
  py::class_<Logits>(m, "Logits")
      .def(py::init(&make_logits), "data"_a, "row_stride"_a, "columns"_a, "dtype"_a,
           "scale"_a = 1.0f, "cap"_a = 0.0f);
  py::class_<Tile>(m, "Tile").def(py::init(&make_tile), "student"_a, "teacher"_a, "rows"_a,
                                  "first_row"_a, "first_column"_a);

  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def("absorb", &absorb, "spec"_a, "tile"_a, "state"_a, "labels"_a, "threads"_a, unlocked);
  m.def("absorb_pairs", &absorb_pairs, "spec"_a, "tile"_a, "sums"_a, "lse"_a, "threads"_a,
        unlocked);
  m.def("vjp", &vjp, "spec"_a, "tile"_a, "out"_a, "factors"_a, "labels"_a, "threads"_a, unlocked);
  m.def("cpu_target", [] { return cpu_target()->name; });
  m.def("cpu_targets", &target_names);
  m.def("set_cpu_target", &choose_target, "name"_a);
  bind_product(m);
#ifdef BGK_CUDA
  bind_cuda(m.def_submodule("cuda"));
#endif
}
