// bgkernels.backends.native._C: addresses and strides in, a status out. The caller has validated
// the arguments and keeps the tensors alive.
#include "bind.h"

#include <stdlib.h>

#include <optional>
#include <stdexcept>

#include "bind_product.h"
#include "cpu/dispatch.h"
#include "cpu/multiplied.h"

using namespace pybind11::literals;

namespace bgk {
namespace {

typedef std::tuple<int, double, double, bool> ExtraArgs;  // kind, a, b, moments

BoundSpec make_spec(int64_t columns, int64_t compared, double temperature, bool shared_softmax,
                    bool logit_sum, int rule, uint32_t key, std::pair<float, float> student,
                    std::pair<float, float> teacher, const std::vector<ExtraArgs>& extras) {
  if (rule < kIndex || rule > kSample) throw std::invalid_argument("unknown label rule");
  if (extras.size() > kMaxExtras) throw std::invalid_argument("too many extras");
  BoundSpec spec;
  spec.student = {student.first, student.second}, spec.teacher = {teacher.first, teacher.second};
  Spec& x = spec.plain;
  x.columns = columns, x.compared = compared;
  x.temperature = temperature, x.inverse = 1.0 / temperature;
  x.inverse_temperature = (float)x.inverse;
  x.shared_softmax = shared_softmax, x.logit_sum = logit_sum;
  x.rule = (LabelRule)rule, x.key = key;
  for (const auto& [kind, a, b, moments] : extras) {
    if (kind < 0 || kind >= cpu_target()->extra_kinds)
      throw std::invalid_argument("unknown kind of statistic");
    x.extras[x.extra_count++] = {kind, moments, a, b};
  }
  return spec;
}

struct Cpu {
  // Factors and bias of a model's logits, or none.
  typedef std::optional<std::pair<FactorArgs, Address>> Model;
  typedef std::tuple<int, Model, Model> Where;  // threads; student, teacher

  static Multiplied multiplied(const Model& x) {
    return x ? Multiplied{factors_of(x->first), (const float*)x->second} : Multiplied();
  }

  template <class Args>
  static int run(int (*primitive)(const Args&, int), const Args& args, const Where& where) {
    const auto& [threads, s, t] = where;
    if (!s && !t) return primitive(args, threads);
    const Multiplied student = multiplied(s), teacher = multiplied(t);
    return over_factors(primitive, args, {s ? &student : nullptr, t ? &teacher : nullptr}, threads);
  }

  static int absorb(const AbsorbArgs& x, const Where& w) { return run(cpu_target()->absorb, x, w); }
  static int absorb_pairs(const PairArgs& x, const Where& w) {
    return run(cpu_target()->absorb_pairs, x, w);
  }
  static int finalize(const FinalizeArgs& x, const Where& w) {
    return cpu_target()->finalize(x, std::get<0>(w));
  }
  static int fold(const FoldArgs& x, const Where& w) {
    return cpu_target()->fold(x, std::get<0>(w));
  }
  static int vjp(const VjpArgs& x, const Where& w) { return run(cpu_target()->vjp, x, w); }
};

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
  m.attr("MAX_EXTRAS") = kMaxExtras;
  m.attr("CODE_BLOCK") = kCodeBlock;

  py::class_<BoundSpec>(m, "Spec").def(
      py::init(&make_spec), py::kw_only(), "columns"_a, "compared"_a, "temperature"_a,
      "shared_softmax"_a, "logit_sum"_a, "rule"_a, "key"_a, "student"_a, "teacher"_a, "extras"_a);

  bind_primitives<Cpu>(m);
  m.def("cpu_target", [] { return cpu_target()->name; });
  m.def("cpu_targets", &target_names);
  m.def("set_cpu_target", &choose_target, "name"_a);
  bind_product(m);
#ifdef BGK_CUDA
  bind_cuda(m.def_submodule("cuda"));
#endif
}
