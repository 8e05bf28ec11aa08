// bgkernels.backends.native._C.cuda: as bgkernels.backends.native._C (bind.cpp), with addresses of device memory, how many blocks
// share a row, and (device, stream).
#include "bind.h"
#include "cuda/launch.h"

using namespace pybind11::literals;

namespace bgk {
namespace {

typedef std::pair<int, Address> Place;                   // device, stream
typedef std::tuple<int, Address, Address> PartialState;  // blocks a row, floats, ints

cuda::Where where_of(const Place& place) { return {place.first, place.second}; }

Status check_cuda(const Spec& spec, const Tile& tile) {
  return spec.mixture_count > kMaxMixtures ? kTooManyMixtures : check(spec, tile);
}

int absorb(const OwnedSpec& spec, const Tile& tile, const Columns& state, Address labels,
           const PartialState& parts, const Place& place) {
  const AbsorbArgs args = absorb_args(spec, tile, state, labels);
  const auto& [splits, floats, ints] = parts;
  const Status status = check_cuda(args.spec, tile);
  return status ? status
                : cuda::absorb(args, {splits, (float*)floats, (int64_t*)ints}, where_of(place));
}

int absorb_pairs(const OwnedSpec& spec, const Tile& tile, const Sums& sums, const Normalisers& lse,
                 int splits, const Place& place) {
  const PairArgs args = pair_args(spec, tile, sums, lse);
  const Status status = check_cuda(args.spec, tile);
  return status ? status : cuda::absorb_pairs(args, splits, where_of(place));
}

int vjp(const OwnedSpec& spec, const Tile& tile, const Logits& out, const Factors& factors,
        Address labels, int splits, const Place& place) {
  const VjpArgs args = vjp_args(spec, tile, out, factors, labels);
  const Status status = known(out) ? check_cuda(args.spec, tile) : kUnknownDType;
  return status ? status : cuda::vjp(args, splits, where_of(place));
}

// `divergence`: factors of KL(t ‖ s), KL(s ‖ t), KL(t ‖ m), KL(s ‖ m) and the total variation.
Objective make_objective(const std::array<double, 5>& divergence, int policy, double hard,
                         double soft, double tau, double sharpness, bool reversed,
                         double label_smoothing, double z_loss) {
  const auto& [kl_ts, kl_st, kl_tm, kl_sm, variation] = divergence;
  return {kl_ts, kl_st, kl_tm,     kl_sm,    variation,       (Policy)policy, hard,
          soft,  tau,   sharpness, reversed, label_smoothing, z_loss};
}

// `loss`: scale and losses.
int compose(const OwnedSpec& spec, const Tile& tile, const Logits& out, const Objective& objective,
            const Columns& state, const Sums& sums, Address labels,
            const std::pair<Address, Address>& loss, int ranks, const Place& place) {
  const ComposedArgs args = {absorb_args(spec, tile, state, labels),
                             out,
                             objective,
                             (float*)sums.first,
                             sums.second,
                             (const double*)loss.first,
                             (double*)loss.second};
  const Status status = known(out) ? check_cuda(args.spec, tile) : kUnknownDType;
  return status ? status : cuda::compose(args, ranks, where_of(place));
}

// None, or the reason why not.
const char* separate(const OwnedSpec& spec, const Tile& tile) {
  return cuda::separate(spec.get(), tile);
}

std::pair<int, const char*> residence(const Tile& tile, const Place& place) {
  const cuda::Residence found = cuda::residence(tile, where_of(place));
  return {found.blocks, found.reason};
}

}  // namespace

void bind_cuda(py::module_ m) {
  m.attr("MAX_MIXTURES") = kMaxMixtures;
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def("absorb", &absorb, "spec"_a, "tile"_a, "state"_a, "labels"_a, "parts"_a, "place"_a,
        unlocked);
  m.def("absorb_pairs", &absorb_pairs, "spec"_a, "tile"_a, "sums"_a, "lse"_a, "splits"_a, "place"_a,
        unlocked);
  m.def("vjp", &vjp, "spec"_a, "tile"_a, "out"_a, "factors"_a, "labels"_a, "splits"_a, "place"_a,
        unlocked);
  py::class_<Objective>(m, "Objective", py::module_local())
      .def(py::init(&make_objective), py::kw_only(), "divergence"_a, "policy"_a, "hard"_a, "soft"_a,
           "tau"_a, "sharpness"_a, "reversed"_a, "label_smoothing"_a, "z_loss"_a);
  m.def("compose", &compose, "spec"_a, "tile"_a, "out"_a, "objective"_a, "state"_a, "sums"_a,
        "labels"_a, "loss"_a, "ranks"_a, "place"_a, unlocked);
  m.def("separate", &separate, "spec"_a, "tile"_a);
  m.def("residence", &residence, "tile"_a, "place"_a);
  m.def("probe", &cuda::probe, "device"_a);
  m.def("error", &cuda::error, "status"_a);
}

}  // namespace bgk
