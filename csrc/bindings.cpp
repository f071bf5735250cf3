// The Python module: a kernel takes the fields of its arguments by their names, tensors as they
// are, and runs with the GIL released. Shapes and dtypes are checked in fastadapt/_ops; here only
// what would be unsafe is refused.
#include "bindings.h"

#include <pybind11/stl.h>

#include <exception>
#include <new>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "join_edits.h"
#include "kernels.h"
#include "lists.h"
#include "parallel.h"
#include "slice.h"

namespace fastadapt {
namespace {

// (tensor, dtype code, n, v, row stride)
using RowsTuple = std::tuple<py::handle, int, int64_t, int64_t, int64_t>;
// (tensor, R, the filters in their order, whether the temperature comes last)
using KnobsTuple = std::tuple<py::handle, int64_t, uint64_t, bool>;
// (ids, offsets, columns, count, whether they are (1, count), words of what is allowed, row stride)
using EditsTuple =
    std::tuple<py::handle, py::handle, py::handle, int64_t, bool, py::handle, int64_t>;

std::string text(int64_t x) { return std::to_string(x); }

DType dtype_of(int code, DType last = DType::kFloat64) {
  if (code < 0 || code > static_cast<int>(last))
    throw py::value_error("logits: expected a dtype code of 0 to " + text(static_cast<int>(last)) +
                          ", got " + text(code));
  return static_cast<DType>(code);
}

Knobs knobs_of(const KnobsTuple& t, int64_t n) {
  const auto& [tensor, r, filters, temperature_last] = t;
  if (r != 1 && r != n)
    throw py::value_error("knobs: expected 1 or " + text(n) + " columns, got " + text(r));
  for (Filters left = filters; left; left >>= kBitsOfFilter)
    if (const auto knob = left & 15; knob == 0 || knob == kKeep || knob >= kXtcThreshold)
      throw py::value_error("filters: expected four bits each, got " + std::to_string(filters));
  return {pointer<const double>(tensor), r, r == 1 ? 0 : 1, filters, temperature_last};
}

// Reads a field of the arguments of a kernel; those before it have been read.
template <class T, class Args>
void read(py::handle value, T& out, Args&) {
  out = py::cast<T>(value);
}

template <class T, class Args>
void read(py::handle tensor, T*& out, Args&) {
  out = pointer<T>(tensor);
}

template <class Args>
void read(py::handle code, DType& out, Args&) {
  out = dtype_of(py::cast<int>(code));
}

template <class Args>
void read(py::handle tuple, Rows& out, Args&) {
  constexpr bool loss =
      !std::is_base_of_v<FilterArgs, Args> && !std::is_base_of_v<SampleArgs, Args> &&
      !std::is_base_of_v<ScoreArgs, Args> && !std::is_base_of_v<SliceArgs, Args> &&
      !std::is_base_of_v<SliceTopArgs, Args>;
  constexpr bool tile = std::is_base_of_v<Tile, Args> || std::is_base_of_v<PairTile, Args>;
  constexpr int64_t widest = tile ? kMaxTile : kMaxVocab;
  const auto [tensor, dtype, n, v, stride] = py::cast<RowsTuple>(tuple);
  if (v < 1 || v > widest)
    throw py::value_error("logits: expected 1 to " + text(widest) + " entries a row, got " +
                          text(v));
  out = {pointer<const void>(tensor), dtype_of(dtype, loss ? DType::kFloat64 : DType::kFloat16), n,
         v, stride};
}

Edits edits_of(py::handle tuple) {
  const auto [ids, offsets, columns, count, given, allowed, stride] = py::cast<EditsTuple>(tuple);
  Edits out{};
  if (!ids.is_none())
    out = {pointer<const int32_t>(ids),
           pointer<const int64_t>(offsets),
           pointer<const float>(columns),
           count,
           given,
           nullptr,
           0};
  if (!allowed.is_none()) {
    out.allowed = pointer<const uint32_t>(allowed);
    out.allowed_stride = stride;
  }
  return out;
}

template <class Args>
void read(py::handle tuple, Edits& out, Args& args) {
  if (args.rows.dtype == DType::kFloat64)
    throw py::value_error("edits: expected none with float64 rows");
  out = edits_of(tuple);
}

template <class Args>
void read(py::handle tuple, Knobs& out, Args& args) {
  out = knobs_of(py::cast<KnobsTuple>(tuple), args.rows.n);
}

template <class Args>
void read(py::handle lists, Supports& out, Args&) {
  out = py::cast<IdLists*>(lists)->supports();
}

template <class Args>
void read(py::handle list, const Knobs*& out, Args& args) {
  static thread_local std::vector<Knobs> all;  // until the next call of this thread
  const auto tuples = py::cast<std::vector<KnobsTuple>>(list);
  args.num_adaptors = static_cast<int64_t>(tuples.size());
  if (args.num_adaptors < 1 || args.num_adaptors > kMaxAdaptors)
    throw py::value_error("adaptors: expected 1 to " + text(kMaxAdaptors) + ", got " +
                          text(args.num_adaptors));
  all.clear();
  for (const KnobsTuple& t : tuples) all.push_back(knobs_of(t, args.rows.n));
  out = all.data();
}

// What threads need for a row of V entries: nothing, buffers, buffers of threads that may share it.
enum class Needs { kNothing, kBuffers, kSharedRow };

// A function of Python that runs a kernel; it takes keyword arguments alone, in any order.
template <class Args>
struct Operator {
  struct Call : Args {
    int num_threads;
  };
  struct Field {
    PyObject* name;
    bool optional;  // None leaves it null
    void (*read)(py::handle value, Call& call);
  };

  void (*KernelTable::*kernel)(const Args&, const Scratch&, int64_t, int64_t);
  Needs needs;
  std::vector<Field> fields;
  std::string signature;
  PyMethodDef method;

  // For METH_FASTCALL: pybind11 would make a dictionary of keyword arguments, 1 to 2 us a call.
  static PyObject* call(PyObject* self, PyObject* const* values, Py_ssize_t positional,
                        PyObject* names) {
    try {
      const auto* op = static_cast<const Operator*>(PyCapsule_GetPointer(self, nullptr));
      const size_t n = names ? static_cast<size_t>(PyTuple_GET_SIZE(names)) : 0;
      if (positional != 0 || n != op->fields.size())
        throw py::type_error("expected " + op->signature.substr(0, op->signature.find('\n')));
      op->run(values, names);
      Py_RETURN_NONE;
    } catch (py::error_already_set& e) {
      e.restore();
    } catch (const py::builtin_exception& e) {
      e.set_error();
    } catch (const std::bad_alloc&) {
      PyErr_NoMemory();
    } catch (const std::exception& e) {
      PyErr_SetString(PyExc_RuntimeError, e.what());
    }
    return nullptr;
  }

  void run(PyObject* const* values, PyObject* names) const {
    Call args{};
    for (size_t i = 0; i < fields.size(); ++i) {
      const py::handle value = values[place(i, names)];
      if (!value.is_none())
        fields[i].read(value, args);
      else if (!fields[i].optional)
        throw py::type_error(py::cast<std::string>(fields[i].name) + ": expected one, got None");
    }
    int64_t n = 0, v = 1;
    if constexpr (std::is_base_of_v<Vectors, Args>)
      n = args.n;
    else
      n = args.rows.n, v = needs == Needs::kNothing ? 1 : args.rows.v;
    py::gil_scoped_release release;
    run_rows<Args>(kernels().*kernel, args, n, v, args.num_threads,
                   needs == Needs::kSharedRow ? v / kLeastPart : 1);
  }

  // Where the i-th field was given: nearly always as the i-th.
  size_t place(size_t i, PyObject* names) const {
    PyObject* const* given = reinterpret_cast<PyTupleObject*>(names)->ob_item;
    if (given[i] == fields[i].name) return i;
    for (size_t j = 0; j < fields.size(); ++j)
      if (PyUnicode_Compare(given[j], fields[i].name) == 0) return j;
    throw py::type_error("expected an argument " + py::cast<std::string>(fields[i].name));
  }
};

#define FASTADAPT_FIELD(name, optional)         \
  {PyUnicode_InternFromString(#name), optional, \
   [](py::handle value, auto& args) { read(value, args.name, args); }}
#define FIELD(name) FASTADAPT_FIELD(name, false)
#define OPTIONAL(name) FASTADAPT_FIELD(name, true)

template <class Args>
void define(py::module_& m, const char* name,
            void (*KernelTable::*kernel)(const Args&, const Scratch&, int64_t, int64_t),
            Needs needs, std::vector<typename Operator<Args>::Field> fields) {
  fields.push_back(FIELD(num_threads));
  auto* op = new Operator<Args>{kernel, needs, std::move(fields), name, {}};  // never freed
  for (const auto& field : op->fields)
    op->signature += (&field == &op->fields[0] ? "(*, " : ", ") + py::cast<std::string>(field.name);
  op->signature += ")\n--\n\n";
  op->method = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(op->call)),
                METH_FASTCALL | METH_KEYWORDS, op->signature.c_str()};
  const py::capsule self(op);
  m.attr(name) = py::reinterpret_steal<py::object>(PyCFunction_New(&op->method, self.ptr()));
}

// Place of the first id outside [0, v) that is not ignored, or -1.
int64_t first_bad_token(py::handle tokens, int64_t v, int64_t ignore_index) {
  static PyObject* const numel = PyUnicode_InternFromString("numel");
  const int64_t n = ask(tokens, numel);
  const int64_t* y = pointer<const int64_t>(tokens);
  for (int64_t i = 0; i < n; ++i)
    if (y[i] != ignore_index && (y[i] < 0 || y[i] >= v)) return i;
  return -1;
}

// Makes the offsets of the lists of both, or fills these; returns the place of the first misfit.
int64_t join(py::handle first, py::handle after, int64_t n, py::handle offsets, py::handle ids,
             py::handle columns) {
  const Edits a = edits_of(first), b = edits_of(after);
  auto* ends = pointer<int64_t>(offsets);
  if (!ids.is_none())
    return join_edits(a, b, n, ends, pointer<int32_t>(ids), pointer<float>(columns));
  join_offsets(a, b, n, ends);
  return -1;
}

std::vector<std::string> capabilities() {
  std::vector<std::string> names;
  for (const char* const* name = cpu_capabilities(); *name; ++name) names.push_back(*name);
  return names;
}

void set_capability(const std::string& name) {
  if (!set_cpu_capability(name.c_str()))
    throw py::value_error("cpu capability: not known or not supported here: '" + name + "'");
}

#define SLICE_FIELDS                                                                         \
  FIELD(rows), FIELD(first), FIELD(row), FIELD(inverse), FIELD(m), FIELD(cut), FIELD(least), \
      FIELD(guard), FIELD(centre), FIELD(band)

void define_slices(py::module_& m) {
  using T = KernelTable;
  define(m, "slice_tally", &T::slice_tally, Needs::kSharedRow,
         {SLICE_FIELDS, FIELD(typicality), FIELD(g), OPTIONAL(pivots), FIELD(sums)});
  define(m, "slice_best", &T::slice_best, Needs::kBuffers,
         {SLICE_FIELDS, FIELD(typicality), FIELD(end), FIELD(count), FIELD(x), FIELD(ids)});
  define(m, "slice_top", &T::slice_top, Needs::kSharedRow,
         {FIELD(rows), FIELD(first), FIELD(count), FIELD(x), FIELD(ids)});
  define(m, "slice_find", &T::slice_find, Needs::kSharedRow,
         {SLICE_FIELDS, FIELD(target), FIELD(x), FIELD(ids)});
  define(m, "slice_list", &T::slice_list, Needs::kBuffers, {SLICE_FIELDS, FIELD(supports)});
  define(m, "masses", &T::masses, Needs::kNothing, {FIELD(n), FIELD(d), FIELD(w), FIELD(u)});
  define(m, "targets", &T::targets, Needs::kNothing,
         {FIELD(n), FIELD(seeds), FIELD(positions), FIELD(totals), FIELD(targets)});
  define(m, "logs", &T::logs, Needs::kNothing, {FIELD(n), FIELD(masses), FIELD(logs)});
  define(m, "exps", &T::exps, Needs::kNothing, {FIELD(n), FIELD(x), FIELD(exps)});
}

void define_kernels(py::module_& m) {
  using T = KernelTable;
  define(m, "filter", &T::filter, Needs::kSharedRow,
         {FIELD(rows), FIELD(knobs), OPTIONAL(edits), FIELD(out)});
  define(m, "sample", &T::sample, Needs::kSharedRow,
         {FIELD(rows), FIELD(knobs), OPTIONAL(edits), FIELD(seeds), OPTIONAL(positions),
          FIELD(tokens), FIELD(logprobs), FIELD(kept), FIELD(status), OPTIONAL(base_logprobs),
          OPTIONAL(log_mass), FIELD(top_n), OPTIONAL(top_ids), OPTIONAL(top_logprobs),
          OPTIONAL(rank), OPTIONAL(supports)});
  define(m, "verify", &T::verify, Needs::kSharedRow,
         {FIELD(rows), FIELD(knobs), OPTIONAL(edits), FIELD(k), FIELD(draft), OPTIONAL(lengths),
          OPTIONAL(draft_rows), OPTIONAL(draft_knobs), FIELD(seeds), OPTIONAL(positions),
          FIELD(tokens), FIELD(accepted), FIELD(logprobs), FIELD(kept), FIELD(status),
          OPTIONAL(supports)});
  define(m, "score", &T::score, Needs::kSharedRow,
         {FIELD(rows), FIELD(knobs), OPTIONAL(edits), FIELD(tokens), FIELD(ignore_index),
          FIELD(logprobs), FIELD(log_norm), FIELD(kept), FIELD(base_logprobs), FIELD(entropy),
          OPTIONAL(supports)});
  define_slices(m);
  define(m, "log_odds", &T::log_odds, Needs::kSharedRow,
         {FIELD(rows), FIELD(knobs), OPTIONAL(edits), FIELD(tokens), FIELD(ignore_index),
          FIELD(log_odds), FIELD(support), FIELD(stats)});
  define(m, "log_odds_backward", &T::log_odds_backward, Needs::kBuffers,
         {FIELD(rows), FIELD(knobs), OPTIONAL(edits), FIELD(tokens), FIELD(ignore_index),
          FIELD(dlog_odds), FIELD(support), FIELD(stats), FIELD(dlogits), OPTIONAL(dgiven)});
  define(m, "label_log_odds", &T::label_log_odds, Needs::kNothing,
         {FIELD(rows), FIELD(labels), FIELD(ignore_index), FIELD(log_odds), FIELD(stats)});
  define(m, "label_log_odds_backward", &T::label_log_odds_backward, Needs::kNothing,
         {FIELD(rows), FIELD(labels), FIELD(ignore_index), FIELD(dlog_odds), FIELD(stats),
          FIELD(dlogits)});
  define(m, "candidate_log_odds", &T::candidate_log_odds, Needs::kNothing,
         {FIELD(rows), FIELD(k), FIELD(index), OPTIONAL(mask), FIELD(log_odds), FIELD(stats)});
  define(m, "candidate_log_odds_backward", &T::candidate_log_odds_backward, Needs::kBuffers,
         {FIELD(rows), FIELD(k), FIELD(index), OPTIONAL(mask), FIELD(dlog_odds), FIELD(stats),
          FIELD(dlogits)});
  define(m, "tile", &T::tile, Needs::kNothing,
         {FIELD(rows), FIELD(first), FIELD(k), FIELD(labels), OPTIONAL(bias), FIELD(scale),
          FIELD(cap), FIELD(moments), FIELD(stats), OPTIONAL(exps), FIELD(shrinks)});
  define(m, "tile_backward", &T::tile_backward, Needs::kNothing,
         {FIELD(rows), FIELD(first), FIELD(k), FIELD(labels), OPTIONAL(bias), FIELD(scale),
          FIELD(cap), FIELD(moments), FIELD(stats), FIELD(gains), FIELD(out)});
  define(m, "pair_sum", &T::pair_sum, Needs::kNothing,
         {FIELD(rows), OPTIONAL(bias), FIELD(scale), FIELD(cap), FIELD(teacher),
          FIELD(teacher_stride), OPTIONAL(teacher_bias), FIELD(teacher_scale), FIELD(teacher_cap),
          FIELD(kind), FIELD(beta), FIELD(stats), FIELD(mixing)});
  define(m, "pair_backward", &T::pair_backward, Needs::kNothing,
         {FIELD(rows), OPTIONAL(bias), FIELD(scale), FIELD(cap), FIELD(teacher),
          FIELD(teacher_stride), OPTIONAL(teacher_bias), FIELD(teacher_scale), FIELD(teacher_cap),
          FIELD(kind), FIELD(beta), FIELD(stats), FIELD(gains), FIELD(out)});
  define(m, "mix", &T::mix, Needs::kNothing,
         {FIELD(dtype), FIELD(n), FIELD(h), FIELD(k), OPTIONAL(offsets), FIELD(dst),
          OPTIONAL(factor), OPTIONAL(gain), OPTIONAL(index), FIELD(src), FIELD(src_stride)});
  define(
      m, "scatter", &T::scatter, Needs::kNothing,
      {FIELD(dtype), FIELD(n), FIELD(h), FIELD(src), OPTIONAL(gain), OPTIONAL(index), FIELD(out)});
  define(m, "dot", &T::dot, Needs::kNothing,
         {FIELD(dtype), FIELD(n), FIELD(h), FIELD(k), OPTIONAL(offsets), FIELD(a), FIELD(a_stride),
          FIELD(b), FIELD(b_stride), OPTIONAL(index), FIELD(out)});
}

}  // namespace
}  // namespace fastadapt

PYBIND11_MODULE(_C, m) {
  using namespace fastadapt;
  m.doc() = "CPU kernels of fastadapt: the arguments of csrc/kernels.h by name, nothing allocated.";
  define_kernels(m);
  define_among(m);
  define_history(m);
  py::class_<IdLists>(m, "IdLists")
      .def(py::init<int64_t, int64_t>())
      .def("count", &IdLists::count)
      .def("join", [](const IdLists& self, py::handle offsets, py::handle ids) {
        self.join(pointer<int64_t>(offsets), pointer<int32_t>(ids));
      });
  m.attr("OTHERS_MAX") = static_cast<int>(kOthersMax);
  m.attr("OTHERS_SUM") = static_cast<int>(kOthersSum);
  m.attr("OTHERS_WEIGHTED") = static_cast<int>(kOthersWeighted);
  m.attr("TOP_ID") = static_cast<int>(kTopId);
  m.attr("LABEL_LOGIT") = static_cast<int>(kLabelLogit);
  m.attr("OTHERS_SQUARED") = static_cast<int>(kOthersSquared);
  m.attr("OTHERS_REST") = static_cast<int>(kOthersRest);
  m.attr("NUM_STATS") = static_cast<int>(kNumStats);
  m.attr("NUM_TILE_STATS") = static_cast<int>(kNumTileStats);
  m.attr("STUDENT_MAX") = static_cast<int>(kStudentMax);
  m.attr("STUDENT_SUM") = static_cast<int>(kStudentSum);
  m.attr("TEACHER_MAX") = static_cast<int>(kTeacherMax);
  m.attr("TEACHER_SUM") = static_cast<int>(kTeacherSum);
  m.attr("DIVERGENCE") = static_cast<int>(kDivergence);
  m.attr("CENTRE") = static_cast<int>(kCentre);
  m.attr("NUM_PAIR_STATS") = static_cast<int>(kNumPairStats);
  m.attr("KL") = static_cast<int>(kKl);
  m.attr("REVERSE_KL") = static_cast<int>(kReverseKl);
  m.attr("JSD") = static_cast<int>(kJsd);
  m.def("first_bad_token", &first_bad_token);
  m.def("join_edits", &join);
  m.def("cpu_capabilities", &capabilities, "Names this processor can run, worst first.");
  m.def("cpu_capability", [] { return std::string(cpu_capability()); }, "The name in use.");
  m.def("set_cpu_capability", &set_capability, py::arg("name"), "For tests: forces one by name.");
}
