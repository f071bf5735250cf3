// Log-odds among lists of ids in the Python module. Arguments are checked in fastadapt/_ops.
#include "among.h"
#include "bindings.h"

namespace fastadapt {
namespace {

int64_t pairs(py::handle labels, py::handle used, py::handle full, py::handle ids,
              py::handle offsets, py::handle out_ids, py::handle ends, py::handle own,
              py::handle without, int64_t n) {
  const ListedLabels rows{n,
                          pointer<const int64_t>(labels),
                          pointer<const bool>(used),
                          pointer<const bool>(full),
                          pointer<const int32_t>(ids),
                          pointer<const int64_t>(offsets)};
  const PairsOut out{pointer<int64_t>(out_ids), pointer<int64_t>(ends), pointer<int64_t>(own),
                     pointer<double>(without)};
  py::gil_scoped_release release;
  return pairs_among(rows, out);
}

AmongArgs among_of(py::handle z, py::handle ends, py::handle own, int64_t n) {
  return {n, pointer<const double>(z), pointer<const int64_t>(ends), pointer<const int64_t>(own)};
}

void among(py::handle z, py::handle ends, py::handle own, py::handle without, py::handle m,
           int64_t n) {
  const AmongArgs args = among_of(z, ends, own, n);
  const double* others = pointer<const double>(without);
  double* out = pointer<double>(m);
  py::gil_scoped_release release;
  log_odds_among(args, others, out);
}

void among_backward(py::handle dm, py::handle z, py::handle ends, py::handle own, py::handle dz,
                    int64_t n) {
  const AmongArgs args = among_of(z, ends, own, n);
  const double* upstream = pointer<const double>(dm);
  double* out = pointer<double>(dz);
  py::gil_scoped_release release;
  log_odds_among_backward(args, upstream, out);
}

}  // namespace

void define_among(py::module_& m) {
  m.def("pairs_among", &pairs);
  m.def("log_odds_among", &among);
  m.def("log_odds_among_backward", &among_backward);
}

}  // namespace fastadapt
