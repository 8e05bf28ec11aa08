// bgkernels.backends.native._C.cuda: as bgkernels.backends.native._C (bind.cpp), with addresses of
// device memory, how many blocks share a row, and (device, stream).
#include "bind.h"
#include "cuda/launch.h"

using namespace pybind11::literals;

namespace bgk {
namespace {

typedef std::pair<int, Address> Place;  // device, stream

cuda::Where where_of(const Place& place) { return {place.first, place.second}; }

int absorb(const BoundSpec& spec, const Rows& student, const Rows& teacher, const Corner& corner,
           const Numbers& floats, const Numbers& ints, Address labels, int splits,
           Address part_floats, Address part_ints, const Place& place) {
  const AbsorbArgs args = {spec.plain, tile_of(spec, student, teacher, corner),
                           state_of(floats, ints), (const int64_t*)labels, 0};
  const Status status = check(args.tile);
  if (status) return status;
  return cuda::absorb(args, {splits, (float*)part_floats, (int64_t*)part_ints}, where_of(place));
}

int absorb_pairs(const BoundSpec& spec, const Rows& student, const Rows& teacher,
                 const Corner& corner, const Numbers& floats, Address labels, Address lse_s,
                 Address lse_t, int splits, Address part_floats, const Place& place) {
  const PairArgs args = {spec.plain,
                         tile_of(spec, student, teacher, corner),
                         matrix<float>(floats),
                         (const int64_t*)labels,
                         (const double*)lse_s,
                         (const double*)lse_t,
                         0};
  const Status status = check(args.tile);
  if (status) return status;
  return cuda::absorb_pairs(args, {splits, (float*)part_floats, nullptr}, where_of(place));
}

int finalize(const BoundSpec& spec, int64_t rows, const Numbers& floats, const Numbers& ints,
             Address labels, const Numbers& out, const Place& place) {
  return cuda::finalize(
      {spec.plain, rows, state_of(floats, ints), (const int64_t*)labels, matrix<double>(out), 0},
      where_of(place));
}

int fold(const BoundSpec& spec, int64_t rows, const Numbers& statistics, const Numbers& grads,
         Address labels, const Numbers& out, const Place& place) {
  return cuda::fold({spec.plain, rows, matrix<const double>(statistics),
                     matrix<const double>(grads), (const int64_t*)labels, matrix<double>(out), 0},
                    where_of(place));
}

int vjp(const BoundSpec& spec, const Rows& student, const Rows& teacher, const Corner& corner,
        const Rows& out, const Numbers& factors, Address labels, int splits, const Place& place) {
  const VjpArgs args = {spec.plain,
                        tile_of(spec, student, teacher, corner),
                        logits(out),
                        matrix<const double>(factors),
                        (const int64_t*)labels,
                        0};
  const Status status = check(args.out) ? kUnknownDType : check(args.tile);
  return status ? status : cuda::vjp(args, splits, where_of(place));
}

}  // namespace

void bind_cuda(py::module_ m) {
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def("absorb", &absorb, "spec"_a, "student"_a, "teacher"_a, "corner"_a, "floats"_a, "ints"_a,
        "labels"_a, "splits"_a, "part_floats"_a, "part_ints"_a, "place"_a, unlocked);
  m.def("absorb_pairs", &absorb_pairs, "spec"_a, "student"_a, "teacher"_a, "corner"_a, "floats"_a,
        "labels"_a, "lse_s"_a, "lse_t"_a, "splits"_a, "part_floats"_a, "place"_a, unlocked);
  m.def("finalize", &finalize, "spec"_a, "rows"_a, "floats"_a, "ints"_a, "labels"_a, "out"_a,
        "place"_a, unlocked);
  m.def("fold", &fold, "spec"_a, "rows"_a, "statistics"_a, "grads"_a, "labels"_a, "out"_a,
        "place"_a, unlocked);
  m.def("vjp", &vjp, "spec"_a, "student"_a, "teacher"_a, "corner"_a, "out"_a, "factors"_a,
        "labels"_a, "splits"_a, "place"_a, unlocked);
  m.def("probe", &cuda::probe, "device"_a);
  m.def("error", &cuda::error, "status"_a);
}

}  // namespace bgk
