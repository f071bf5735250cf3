// Histories in the Python module. Arguments are checked in fastadapt/sampling, but for ids, which
// are read here.
#include <pybind11/stl.h>

#include <utility>
#include <vector>

#include "bindings.h"
#include "history.h"

namespace fastadapt {
namespace {

using Ids = std::vector<int32_t>;
// (drafts, k, offsets, ids, columns, threads); no ids: only the offsets are made
using ListsTuple = std::tuple<py::handle, int64_t, py::handle, py::handle, py::handle, int>;

// How many ids there are in all lists, and the largest one or -1.
using Told = std::pair<int64_t, int64_t>;

// A number, or a tensor with one for each row.
template <class T>
PerRow<T> per_row(py::handle value) {
  if (PyFloat_Check(value.ptr()) || PyLong_Check(value.ptr())) return {nullptr, py::cast<T>(value)};
  return {pointer<const T>(value), T{}};
}

Told list(History& history, const Rule& rule, const ListsTuple& tuple) {
  const auto& [drafts, k, offsets, ids, columns, threads] = tuple;
  ListsOut out{nullptr, k, pointer<int64_t>(offsets), nullptr, nullptr, threads};
  if (k > 0) out.drafts = pointer<const int64_t>(drafts);
  if (!ids.is_none()) out.ids = pointer<int32_t>(ids), out.columns = pointer<float>(columns);
  py::gil_scoped_release release;
  const int64_t largest = history.list(rule, out);
  return {out.offsets[history.rows() * (k + 1)], largest};
}

Told penalties(History& history, const ListsTuple& out, int counted, int repeats,
               py::handle repetition, py::handle presence, py::handle frequency,
               py::handle window) {
  PenaltyRule rule;
  rule.repeats = static_cast<Counted>(repeats);
  rule.counted = static_cast<Counted>(counted);
  rule.repetition = per_row<double>(repetition);
  rule.presence = per_row<double>(presence);
  rule.frequency = per_row<double>(frequency);
  rule.window = per_row<int64_t>(window);
  return list(history, rule, out);
}

Told n_grams(History& history, const ListsTuple& out, int counted, int64_t n) {
  NGramRule rule;
  rule.counted = static_cast<Counted>(counted);
  rule.n = n;
  return list(history, rule, out);
}

Told min_length(History& history, const ListsTuple& out, int counted, Ids ids, py::handle least) {
  LengthRule rule;
  rule.counted = static_cast<Counted>(counted);
  rule.ids = std::move(ids);
  rule.least = per_row<int64_t>(least);
  return list(history, rule, out);
}

Told dry(History& history, const ListsTuple& out, int counted, py::handle multiplier, double base,
         int64_t allowed_length, Ids breakers, py::handle window, int64_t longest) {
  DryRule rule;
  rule.counted = static_cast<Counted>(counted);
  rule.multiplier = per_row<double>(multiplier);
  rule.base = base;
  rule.allowed_length = allowed_length;
  rule.breakers = std::move(breakers);
  rule.window = per_row<int64_t>(window);
  rule.longest = longest;
  return list(history, rule, out);
}

Told sequences(History& history, const ListsTuple& out, int counted,
               std::vector<const Sequences*> of_rows) {
  SequenceRule rule;
  rule.counted = static_cast<Counted>(counted);
  rule.of_rows = std::move(of_rows);
  return list(history, rule, out);
}

}  // namespace

void define_history(py::module_& m) {
  py::class_<Sequences>(m, "Sequences")
      .def(py::init([](Ids ids, std::vector<int64_t> offsets, std::vector<float> biases) {
        return Sequences{std::move(ids), std::move(offsets), std::move(biases)};
      }));
  py::class_<History>(m, "History")
      .def(py::init([](py::handle tokens, int64_t n, int64_t stride, py::handle counts,
                       py::handle starts, py::handle prompts) {
        return History(pointer<const int64_t>(tokens), n, stride, pointer<const int64_t>(counts),
                       pointer<const int64_t>(starts), pointer<const int64_t>(prompts));
      }))
      .def("rows", &History::rows)
      .def("length", [](const History& self, int64_t r,
                        int counted) { return self.length(r, static_cast<Counted>(counted)); })
      .def("row",
           [](const History& self, int64_t r) {
             const TokenRow& row = self.row(r);
             Ids tokens(static_cast<size_t>(row.size()));
             for (int64_t i = 0; i < row.size(); ++i) tokens[static_cast<size_t>(i)] = row[i];
             return std::make_tuple(tokens, row.first(Counted::kAll), row.first(Counted::kOutput));
           })
      .def("append",
           [](History& self, py::handle tokens, int64_t stride, py::handle counts) {
             self.append(pointer<const int64_t>(tokens), stride, per_row<int64_t>(counts));
           })
      .def("keep", &History::keep)
      .def("extend", &History::extend)
      .def("penalties", &penalties)
      .def("n_grams", &n_grams)
      .def("min_length", &min_length)
      .def("dry", &dry)
      .def("sequences", &sequences);
}

}  // namespace fastadapt
