// One call of each kernel for callgrind; count_instructions.py builds and runs it. After each call
// the counts since the last dump are dumped under the call's name.
//
//   count_instructions ISA
#include <valgrind/callgrind.h>

#include <cstdio>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "vec_types.h"

namespace {

using namespace fastadapt;
using Packed = std::vector<double>;

constexpr int64_t kRows = 4, kVocab = 128256;

// temperature, top_k, top_p, min_p, typical_p, epsilon, eta, min_tokens_to_keep
const std::vector<std::pair<const char*, Packed>> kAdaptors = {
    {"temperature", {.8, 0, 1, 0, 1, 0, 0, 1}},
    {"temperature, top_p", {.8, 0, .9, 0, 1, 0, 0, 1}},
    {"temperature, top_k, top_p, epsilon", {.8, 50, .95, 0, 1, 3e-4, 0, 1}},
    {"typical", {1, 0, 1, 0, .9, 0, 0, 1}},
    {"eta", {1, 0, 1, 0, 1, 0, 3e-4, 1}},
    {"everything", {.8, 5000, .95, 1e-5, .9, 1e-6, 1e-5, 2}},
};

template <class Args>
void count(const std::string& name, void (*kernel)(const Args&, const Scratch&, int64_t, int64_t),
           const Args& args) {
  run_rows(kernel, args, args.rows.n, args.rows.v, 1);  // buffers, and whatever else comes once
  CALLGRIND_ZERO_STATS;
  CALLGRIND_TOGGLE_COLLECT;
  run_rows(kernel, args, args.rows.n, args.rows.v, 1);
  CALLGRIND_TOGGLE_COLLECT;
  CALLGRIND_DUMP_STATS_AT(name.c_str());
}

template <class T>
void count_all(const std::string& name, DType dtype) {
  const int64_t n = kRows, v = kVocab;
  std::vector<T> x(n * v), out(n * v);
  std::mt19937_64 rng(0);
  std::normal_distribution<double> normal;
  for (T& z : x) from_float(static_cast<float>(normal(rng) * 3), &z);
  const Rows rows{x.data(), dtype, n, v, v};
  const KernelTable& table = kernels();

  std::vector<int64_t> seeds(n), tokens(n), ids(n * 5);
  std::vector<float> logprobs(n), base(n), mass(n), top(n * 5), log_odds(n), upstream(n, 1);
  std::vector<int32_t> kept(n), rank(n);
  std::vector<uint8_t> status(n), support(n * ((v + 7) / 8));
  std::vector<double> stats(n * 2);
  for (int64_t r = 0; r < n; ++r) seeds[r] = r;
  std::vector<Knobs> knobs;
  for (const auto& adaptor : kAdaptors) knobs.push_back({adaptor.second.data(), 1, 0, Order::kHf});

  const auto sampled = [&](const Knobs& k) {
    return SampleArgs{rows,
                      k,
                      {},
                      seeds.data(),
                      nullptr,
                      tokens.data(),
                      logprobs.data(),
                      kept.data(),
                      status.data(),
                      nullptr,
                      nullptr,
                      0,
                      nullptr,
                      nullptr,
                      nullptr};
  };
  for (size_t i = 0; i < knobs.size(); ++i)
    count(name + "/sample/" + kAdaptors[i].first, table.sample, sampled(knobs[i]));
  SampleArgs all = sampled(knobs[1]);
  all.base_logprobs = base.data(), all.log_mass = mass.data();
  all.top_n = 5, all.top_ids = ids.data(), all.top_logprobs = top.data(), all.rank = rank.data();
  count(name + "/sample/temperature, top_p; all outputs", table.sample, all);
  count(name + "/filter/temperature, top_p", table.filter,
        FilterArgs{rows, knobs[1], {}, out.data()});

  // eight adaptors of one temperature, and all of the above
  std::vector<Packed> packed;
  std::vector<Knobs> one_temperature;
  for (int i = 0; i < 8; ++i) packed.push_back({1, 0, .5 + .06 * i, 0, 1, 0, 0, 1});
  for (const Packed& p : packed) one_temperature.push_back({p.data(), 1, 0, Order::kHf});
  std::vector<float> adapted(n * 8), norm(n * 8), entropy(n);
  std::vector<int32_t> kept_by(n * 8);
  const auto score = [&](const char* what, const std::vector<Knobs>& by) {
    const ScoreArgs args{
        rows,           tokens.data(), -100,           int64_t(by.size()), by.data(),     {},
        adapted.data(), norm.data(),   kept_by.data(), base.data(),        entropy.data()};
    count(name + "/score/" + what, table.score, args);
  };
  score("temperature, top_p", {knobs[1]});
  score("8 top_p", one_temperature);
  score("the 6 of sample", knobs);

  const LogOddsArgs forward{rows,           knobs[1],    {}, tokens.data(), -100, log_odds.data(),
                            support.data(), stats.data()};
  count(name + "/log_odds/temperature, top_p", table.log_odds, forward);
  const LogOddsBackwardArgs backward{
      rows,         knobs[1], tokens.data(), -100,   upstream.data(), support.data(),
      stats.data(), {},       out.data(),    nullptr};
  count(name + "/log_odds_backward/temperature, top_p", table.log_odds_backward, backward);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 || !set_cpu_capability(argv[1])) return std::puts("expected: scalar|avx2"), 2;
  count_all<float>("float32", DType::kFloat32);
  count_all<bf16>("bfloat16", DType::kBFloat16);
  std::printf("%lld\n", static_cast<long long>(kRows * kVocab));
}
