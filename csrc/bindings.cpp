// The Python module: addresses and sizes in, kernels run with the GIL released. Checks of shapes
// and dtypes are made in fastadapt/_ops/sampling.py; here only what would be unsafe is refused.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace py = pybind11;

namespace fastadapt {
namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// (address, dtype code, n, v, row stride)
using RowsTuple = std::tuple<uintptr_t, int, int64_t, int64_t, int64_t>;
// (address, R, order code)
using KnobsTuple = std::tuple<uintptr_t, int64_t, int>;

std::string text(int64_t x) { return std::to_string(x); }

// The last dtype code that a kernel takes: all but float64, or all.
Rows rows_of(const RowsTuple& t, DType last = DType::kFloat16) {
  const auto& [address, dtype, n, v, stride] = t;
  if (dtype < 0 || dtype > static_cast<int>(last))
    throw std::invalid_argument("logits: expected a dtype code of 0 to " +
                                text(static_cast<int>(last)) + ", got " + text(dtype));
  if (v < 1 || v > kMaxVocab)
    throw std::invalid_argument("logits: expected 1 to " + text(kMaxVocab) +
                                " entries a row, got " + text(v));
  return {pointer<const void>(address), static_cast<DType>(dtype), n, v, stride};
}

Knobs knobs_of(const KnobsTuple& t, int64_t n) {
  const auto& [address, r, order] = t;
  if (r != 1 && r != n)
    throw std::invalid_argument("knobs: expected 1 or " + text(n) + " columns, got " + text(r));
  if (order != static_cast<int>(Order::kHf) && order != static_cast<int>(Order::kVllm))
    throw std::invalid_argument("order: expected 0 or 1, got " + text(order));
  return {pointer<const double>(address), r, r == 1 ? 0 : 1, static_cast<Order>(order)};
}

// Row of the first token outside [0, V) that is not ignored, or -1.
int64_t first_bad_token(uintptr_t tokens, int64_t n, int64_t v, int64_t ignore_index) {
  const int64_t* y = pointer<const int64_t>(tokens);
  for (int64_t r = 0; r < n; ++r)
    if (y[r] != ignore_index && (y[r] < 0 || y[r] >= v)) return r;
  return -1;
}

void filter(const RowsTuple& rows, const KnobsTuple& knobs, uintptr_t out, int num_threads) {
  const Rows x = rows_of(rows);
  const FilterArgs args{x, knobs_of(knobs, x.n), pointer<void>(out)};
  py::gil_scoped_release release;
  run_rows(kernels().filter, args, x.n, x.v, num_threads, x.v / kLeastPart);
}

void sample(const RowsTuple& rows, const KnobsTuple& knobs, uintptr_t seeds, uintptr_t positions,
            uintptr_t tokens, uintptr_t logprobs, uintptr_t kept, uintptr_t status,
            uintptr_t base_logprobs, uintptr_t log_mass, int64_t top_n, uintptr_t top_ids,
            uintptr_t top_logprobs, uintptr_t rank, int num_threads) {
  const Rows x = rows_of(rows);
  const SampleArgs args{x,
                        knobs_of(knobs, x.n),
                        pointer<const int64_t>(seeds),
                        pointer<const int64_t>(positions),
                        pointer<int64_t>(tokens),
                        pointer<float>(logprobs),
                        pointer<int32_t>(kept),
                        pointer<uint8_t>(status),
                        pointer<float>(base_logprobs),
                        pointer<float>(log_mass),
                        top_n,
                        pointer<int64_t>(top_ids),
                        pointer<float>(top_logprobs),
                        pointer<int32_t>(rank)};
  py::gil_scoped_release release;
  run_rows(kernels().sample, args, x.n, x.v, num_threads, x.v / kLeastPart);
}

void score(const RowsTuple& rows, const std::vector<KnobsTuple>& adaptors, uintptr_t tokens,
           int64_t ignore_index, uintptr_t logprobs, uintptr_t log_norm, uintptr_t kept,
           uintptr_t base_logprobs, uintptr_t entropy, int num_threads) {
  const Rows x = rows_of(rows);
  const int64_t a = static_cast<int64_t>(adaptors.size());
  if (a < 1 || a > kMaxAdaptors)
    throw std::invalid_argument("adaptors: expected 1 to " + text(kMaxAdaptors) + ", got " +
                                text(a));
  std::vector<Knobs> knobs;
  for (const KnobsTuple& t : adaptors) knobs.push_back(knobs_of(t, x.n));
  const ScoreArgs args{x,
                       pointer<const int64_t>(tokens),
                       ignore_index,
                       a,
                       knobs.data(),
                       pointer<float>(logprobs),
                       pointer<float>(log_norm),
                       pointer<int32_t>(kept),
                       pointer<float>(base_logprobs),
                       pointer<float>(entropy)};
  py::gil_scoped_release release;
  run_rows(kernels().score, args, x.n, x.v, num_threads, x.v / kLeastPart);
}

void log_odds(const RowsTuple& rows, const KnobsTuple& knobs, uintptr_t tokens,
              int64_t ignore_index, uintptr_t out, uintptr_t support, uintptr_t stats,
              int num_threads) {
  const Rows x = rows_of(rows, DType::kFloat64);
  const LogOddsArgs args{x,
                         knobs_of(knobs, x.n),
                         pointer<const int64_t>(tokens),
                         ignore_index,
                         pointer<void>(out),
                         pointer<uint8_t>(support),
                         pointer<double>(stats)};
  py::gil_scoped_release release;
  run_rows(kernels().log_odds, args, x.n, x.v, num_threads, x.v / kLeastPart);
}

void log_odds_backward(const RowsTuple& rows, const KnobsTuple& knobs, uintptr_t tokens,
                       int64_t ignore_index, uintptr_t dlog_odds, uintptr_t support,
                       uintptr_t stats, uintptr_t dlogits, int num_threads) {
  const Rows x = rows_of(rows, DType::kFloat64);
  const LogOddsBackwardArgs args{x,
                                 knobs_of(knobs, x.n),
                                 pointer<const int64_t>(tokens),
                                 ignore_index,
                                 pointer<const void>(dlog_odds),
                                 pointer<const uint8_t>(support),
                                 pointer<const double>(stats),
                                 pointer<void>(dlogits)};
  py::gil_scoped_release release;
  run_rows(kernels().log_odds_backward, args, x.n, x.v, num_threads);
}

void label_log_odds(const RowsTuple& rows, uintptr_t labels, int64_t ignore_index, uintptr_t out,
                    uintptr_t stats, int num_threads) {
  const Rows x = rows_of(rows, DType::kFloat64);
  const LabelArgs args{x, pointer<const int64_t>(labels), ignore_index, pointer<void>(out),
                       pointer<double>(stats)};
  py::gil_scoped_release release;
  run_rows(kernels().label_log_odds, args, x.n, 1, num_threads);
}

void label_log_odds_backward(const RowsTuple& rows, uintptr_t labels, int64_t ignore_index,
                             uintptr_t dlog_odds, uintptr_t stats, uintptr_t dlogits,
                             int num_threads) {
  const Rows x = rows_of(rows, DType::kFloat64);
  const LabelBackwardArgs args{x,
                               pointer<const int64_t>(labels),
                               ignore_index,
                               pointer<const void>(dlog_odds),
                               pointer<const double>(stats),
                               pointer<void>(dlogits)};
  py::gil_scoped_release release;
  run_rows(kernels().label_log_odds_backward, args, x.n, 1, num_threads);
}

void candidate_log_odds(const RowsTuple& rows, int64_t k, uintptr_t index, uintptr_t mask,
                        uintptr_t out, uintptr_t stats, int num_threads) {
  const Rows x = rows_of(rows, DType::kFloat64);
  const CandidateArgs args{x,
                           k,
                           pointer<const int64_t>(index),
                           pointer<const uint8_t>(mask),
                           pointer<void>(out),
                           pointer<double>(stats)};
  py::gil_scoped_release release;
  run_rows(kernels().candidate_log_odds, args, x.n, 1, num_threads);
}

void candidate_log_odds_backward(const RowsTuple& rows, int64_t k, uintptr_t index, uintptr_t mask,
                                 uintptr_t dlog_odds, uintptr_t stats, uintptr_t dlogits,
                                 int num_threads) {
  const Rows x = rows_of(rows, DType::kFloat64);
  const CandidateBackwardArgs args{x,
                                   k,
                                   pointer<const int64_t>(index),
                                   pointer<const uint8_t>(mask),
                                   pointer<const void>(dlog_odds),
                                   pointer<const double>(stats),
                                   pointer<void>(dlogits)};
  py::gil_scoped_release release;
  run_rows(kernels().candidate_log_odds_backward, args, x.n, x.v, num_threads);
}

// (rows, first id, labels, bias or 0, scale, cap)
using TileTuple = std::tuple<RowsTuple, int64_t, uintptr_t, uintptr_t, double, double>;

Tile tile_of(const TileTuple& t) {
  const auto& [rows, first, labels, bias, scale, cap] = t;
  const Rows x = rows_of(rows, DType::kFloat64);
  if (x.v > kMaxTile)
    throw std::invalid_argument("tile: expected 1 to " + text(kMaxTile) + " columns, got " +
                                text(x.v));
  return {x, first, pointer<const int64_t>(labels), pointer<const void>(bias), scale, cap};
}

DType dtype_of(int code) {
  if (code < 0 || code > static_cast<int>(DType::kFloat64))
    throw std::invalid_argument("expected a dtype code of 0 to 3, got " + text(code));
  return static_cast<DType>(code);
}

void tile(const TileTuple& tile, bool weighted, uintptr_t stats, uintptr_t exps, uintptr_t shrinks,
          int num_threads) {
  const TileArgs args{tile_of(tile), weighted, pointer<double>(stats), pointer<void>(exps),
                      pointer<double>(shrinks)};
  py::gil_scoped_release release;
  run_rows(kernels().tile, args, args.tile.rows.n, 1, num_threads);
}

void tile_backward(const TileTuple& tile, uintptr_t stats, uintptr_t gains, uintptr_t out,
                   int num_threads) {
  const TileBackwardArgs args{tile_of(tile), pointer<const double>(stats),
                              pointer<const double>(gains), pointer<void>(out)};
  py::gil_scoped_release release;
  run_rows(kernels().tile_backward, args, args.tile.rows.n, 1, num_threads);
}

void mix(int dtype, int64_t n, int64_t h, uintptr_t dst, uintptr_t factor, uintptr_t gain,
         uintptr_t index, uintptr_t src, int64_t src_stride, int num_threads) {
  const MixArgs args{dtype_of(dtype),
                     n,
                     h,
                     pointer<void>(dst),
                     pointer<const double>(factor),
                     pointer<const double>(gain),
                     pointer<const int64_t>(index),
                     pointer<const void>(src),
                     src_stride};
  py::gil_scoped_release release;
  run_rows(kernels().mix, args, n, 1, num_threads);
}

void scatter(int dtype, int64_t n, int64_t h, uintptr_t src, uintptr_t gain, uintptr_t index,
             uintptr_t out, int num_threads) {
  const ScatterArgs args{dtype_of(dtype),
                         n,
                         h,
                         pointer<const void>(src),
                         pointer<const double>(gain),
                         pointer<const int64_t>(index),
                         pointer<void>(out)};
  py::gil_scoped_release release;
  run_rows(kernels().scatter, args, n, 1, num_threads);
}

void dot(int dtype, int64_t n, int64_t h, uintptr_t a, int64_t a_stride, uintptr_t b,
         int64_t b_stride, uintptr_t index, uintptr_t out, int num_threads) {
  const DotArgs args{dtype_of(dtype),
                     n,
                     h,
                     pointer<const void>(a),
                     a_stride,
                     pointer<const void>(b),
                     b_stride,
                     pointer<const int64_t>(index),
                     pointer<double>(out)};
  py::gil_scoped_release release;
  run_rows(kernels().dot, args, n, 1, num_threads);
}

// Asks for huge pages under a large buffer that is about to be written: at 1 to 2 us a page fault,
// the first touch of 64 MiB costs 20 ms in small pages and 5 in huge ones. A hint, nothing else.
void prefer_huge_pages([[maybe_unused]] uintptr_t address, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const uintptr_t begin = (address + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (address + static_cast<uintptr_t>(bytes)) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
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

}  // namespace
}  // namespace fastadapt

PYBIND11_MODULE(_C, m) {
  using namespace fastadapt;
  m.doc() = "CPU kernels of fastadapt; pointers in, nothing allocated.";
  m.def("filter", &filter);
  m.def("sample", &sample);
  m.def("score", &score);
  m.def("log_odds", &log_odds);
  m.def("log_odds_backward", &log_odds_backward);
  m.def("label_log_odds", &label_log_odds);
  m.def("label_log_odds_backward", &label_log_odds_backward);
  m.def("candidate_log_odds", &candidate_log_odds);
  m.def("candidate_log_odds_backward", &candidate_log_odds_backward);
  m.def("tile", &tile);
  m.def("tile_backward", &tile_backward);
  m.def("mix", &mix);
  m.def("scatter", &scatter);
  m.def("dot", &dot);
  m.def("prefer_huge_pages", &prefer_huge_pages);
  m.def("first_bad_token", &first_bad_token);
  m.def("cpu_capabilities", &capabilities, "Names this processor can run, worst first.");
  m.def("cpu_capability", [] { return std::string(cpu_capability()); }, "The name in use.");
  m.def("set_cpu_capability", &set_capability, py::arg("name"), "For tests: forces one by name.");
}
