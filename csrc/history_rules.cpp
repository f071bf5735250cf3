#include <cmath>
#include <limits>

#include "history.h"

namespace fastadapt {
namespace {

constexpr float kBan = -std::numeric_limits<float>::infinity();

Found found_in(const TokenRow& row) {
  return {row.found.data(), static_cast<int64_t>(row.found.size())};
}

// Fills the columns but one, which has numbers or is a ban.
void write_one(int64_t count, const Columns& out, float* column, const float* values) {
  std::fill_n(out.pre, count, 0.0f);
  std::fill_n(out.penalty, count, 1.0f);
  std::fill_n(out.post, count, 0.0f);
  std::fill_n(out.last, count, 0.0f);
  if (values)
    std::copy_n(values, count, column);
  else
    std::fill_n(column, count, kBan);
}

bool holds(const std::vector<int32_t>& ascending, int32_t id) {
  return std::binary_search(ascending.begin(), ascending.end(), id);
}

}  // namespace

const TokenCounts* PenaltyRule::counts(TokenRow& row, int64_t r) const {
  const bool scales = repetition[r] != 1, adds = presence[r] != 0 || frequency[r] != 0;
  if (!scales && !adds) return nullptr;
  const bool all = (scales && repeats == Counted::kAll) || (adds && counted == Counted::kAll);
  return &row.counts(all ? Counted::kAll : Counted::kOutput, window[r]);
}

Found PenaltyRule::find(TokenRow& row, int64_t r, bool) const {
  const TokenCounts* all = counts(row, r);
  return all ? Found{all->ids.data(), static_cast<int64_t>(all->ids.size())} : Found{nullptr, 0};
}

void PenaltyRule::write(TokenRow& row, int64_t r, const Columns& out) const {
  const TokenCounts* all = counts(row, r);
  if (!all) return;
  const size_t n = all->ids.size();
  const int32_t* times = counted == Counted::kOutput ? all->outputs.data() : all->counts.data();
  const auto f = static_cast<float>(frequency[r]), p = static_cast<float>(presence[r]);
  const bool together = counted == Counted::kAll;  // as one number, as llama.cpp subtracts them
  std::fill_n(out.pre, n, 0.0f);
  const auto factor = static_cast<float>(repetition[r]);
  if (repeats == Counted::kAll)
    std::fill_n(out.penalty, n, factor);
  else
    for (size_t i = 0; i < n; ++i) out.penalty[i] = all->outputs[i] > 0 ? factor : 1.0f;
  if (together) {
    for (size_t i = 0; i < n; ++i) out.post[i] = 0.0f - (static_cast<float>(times[i]) * f + p);
    std::fill_n(out.last, n, 0.0f);
  } else {
    float *const post = out.post, *const last = out.last;
    for (size_t i = 0; i < n; ++i) {
      // 1 where the count is above 0, by its sign: a comparison would be a branch for each id
      const auto there = static_cast<int32_t>(static_cast<uint32_t>(-times[i]) >> 31);
      post[i] = 0.0f - static_cast<float>(times[i]) * f;
      last[i] = 0.0f - static_cast<float>(there) * p;
    }
  }
}

Found NGramRule::find(TokenRow& row, int64_t, bool again) const {
  if (n == 1) {
    const TokenCounts& all = row.counts(counted, 0);
    return {all.ids.data(), static_cast<int64_t>(all.ids.size())};
  }
  if (again) return found_in(row);
  std::vector<int32_t>& ids = row.found;
  ids.clear();
  if (row.size() - row.first(counted) < n) return found_in(row);
  const SuffixIndex& index = row.index(counted, n - 1);
  for (int64_t at = index.before(row, row.size() - 1); at >= 0; at = index.before(row, at))
    if (ids.empty() || ids.back() != row[at + 1]) ids.push_back(row[at + 1]);
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  return found_in(row);
}

void NGramRule::write(TokenRow& row, int64_t r, const Columns& out) const {
  write_one(find(row, r, true).count, out, out.pre, nullptr);
}

Found LengthRule::find(TokenRow& row, int64_t r, bool) const {
  const bool is_short = row.size() - row.first(counted) < least[r];
  return {ids.data(), is_short ? static_cast<int64_t>(ids.size()) : 0};
}

void LengthRule::write(TokenRow& row, int64_t r, const Columns& out) const {
  write_one(find(row, r, true).count, out, out.pre, nullptr);
}

Found DryRule::find(TokenRow& row, int64_t r, bool again) const {
  if (again) return found_in(row);
  row.found.clear(), row.values.clear();
  if (multiplier[r] == 0 || row.size() - row.first(counted) <= allowed_length) return found_in(row);
  const std::vector<Repeats::Match>& matches = row.repeats(counted, allowed_length).matches;
  const int64_t begin = row.begin(counted, window[r], row.size());

  // Where penalties no longer grow, a float would overflow; llama.cpp's number.
  const auto logarithm = std::log(static_cast<float>(base));
  const bool grows = base > 1.000001;
  int64_t most = grows ? allowed_length + static_cast<int64_t>(88.7228391f / logarithm)
                       : std::numeric_limits<int64_t>::max();
  if (longest > 0) most = std::min(most, longest);
  int64_t limit = 0;  // the tokens since the last breaker, or as many as matter
  for (const auto& match : matches) limit = std::max(limit, std::min(match.length, most));
  for (int64_t i = 0; i < limit; ++i)
    if (holds(breakers, row[row.size() - 1 - i])) limit = i;

  static thread_local std::vector<std::pair<int32_t, int64_t>> lengths;
  lengths.clear();
  for (const auto& match : matches) {
    const int64_t length = std::min({match.length, limit, match.place + 1 - begin});
    if (length < allowed_length) continue;
    const int32_t id = row[match.place + 1];
    if (lengths.empty() || lengths.back().first != id)
      lengths.emplace_back(id, length);
    else
      lengths.back().second = std::max(lengths.back().second, length);
  }
  std::sort(lengths.begin(), lengths.end());
  for (size_t i = 0; i < lengths.size(); ++i) {
    const auto [id, length] = lengths[i];  // the longest of its id is the last
    if ((i + 1 < lengths.size() && lengths[i + 1].first == id) || holds(breakers, id)) continue;
    const double grown = std::pow(base, static_cast<double>(length - allowed_length));
    row.found.push_back(id);
    row.values.push_back(0.0f - static_cast<float>(multiplier[r] * grown));
  }
  return found_in(row);
}

void DryRule::write(TokenRow& row, int64_t, const Columns& out) const {
  write_one(found_in(row).count, out, out.last, row.values.data());
}

Found SequenceRule::find(TokenRow& row, int64_t r, bool again) const {
  if (again) return found_in(row);
  row.found.clear(), row.values.clear();
  const Sequences& all = *of_rows[of_rows.size() == 1 ? 0 : r];
  const int64_t present = row.size() - row.first(counted);
  for (size_t s = 0; s < all.biases.size(); ++s) {
    const int64_t begin = all.offsets[s], last = all.offsets[s + 1] - 1, before = last - begin;
    bool fits = before <= present;
    for (int64_t i = 0; fits && i < before; ++i)
      fits = all.ids[last - 1 - i] == row[row.size() - 1 - i];
    if (!fits) continue;
    if (row.found.empty() || row.found.back() != all.ids[last])
      row.found.push_back(all.ids[last]), row.values.push_back(all.biases[s]);
    else
      row.values.back() += all.biases[s];
  }
  return found_in(row);
}

void SequenceRule::write(TokenRow& row, int64_t, const Columns& out) const {
  write_one(found_in(row).count, out, out.pre, row.values.data());
}

}  // namespace fastadapt
