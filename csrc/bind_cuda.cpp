// bgkernels._C.cuda: as bgkernels._C (bind.cpp), with addresses of device memory, how many blocks
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

int absorb(const OwnedSpec& spec, const Tile& tile, Address floats, int64_t floats_stride,
           Address ints, int64_t ints_stride, Address labels, const PartialState& parts,
           const Place& place) {
  const AbsorbArgs args = {spec.get(),     tile,        (float*)floats,         floats_stride,
                           (int64_t*)ints, ints_stride, (const int64_t*)labels, 0};
  const auto& [splits, part_floats, part_ints] = parts;
  const Status status = check_cuda(args.spec, tile);
  return status ? status
                : cuda::absorb(args, {splits, (float*)part_floats, (int64_t*)part_ints},
                               where_of(place));
}

int absorb_pairs(const OwnedSpec& spec, const Tile& tile, Address sums, int64_t sums_stride,
                 Address lse_s, Address lse_t, int splits, const Place& place) {
  const PairArgs args = {
      spec.get(), tile, (float*)sums, sums_stride, (const double*)lse_s, (const double*)lse_t, 0};
  const Status status = check_cuda(args.spec, tile);
  return status ? status : cuda::absorb_pairs(args, splits, where_of(place));
}

int vjp(const OwnedSpec& spec, const Tile& tile, const Logits& out, Address row, Address tilts,
        Address pairs, Address labels, int splits, const Place& place) {
  const VjpArgs args = {spec.get(),
                        tile,
                        out,
                        (const double*)row,
                        (const double*)tilts,
                        (const double*)pairs,
                        (const int64_t*)labels,
                        0};
  const Status status = known(out) ? check_cuda(args.spec, tile) : kUnknownDType;
  return status ? status : cuda::vjp(args, splits, where_of(place));
}

}  // namespace

void bind_cuda(py::module_ m) {
  m.attr("MAX_MIXTURES") = kMaxMixtures;
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def("absorb", &absorb, "spec"_a, "tile"_a, "floats"_a, "floats_stride"_a, "ints"_a,
        "ints_stride"_a, "labels"_a, "parts"_a, "place"_a, unlocked);
  m.def("absorb_pairs", &absorb_pairs, "spec"_a, "tile"_a, "sums"_a, "sums_stride"_a, "lse_s"_a,
        "lse_t"_a, "splits"_a, "place"_a, unlocked);
  m.def("vjp", &vjp, "spec"_a, "tile"_a, "out"_a, "row"_a, "tilts"_a, "pairs"_a, "labels"_a,
        "splits"_a, "place"_a, unlocked);
  m.def("probe", &cuda::probe, "device"_a);
  m.def("error", &cuda::error, "status"_a);
}

}  // namespace bgk
