#include "history_row.h"

#include <array>
#include <utility>

namespace fastadapt {
namespace {

// So many new tokens are counted one by one, more together with all others.
constexpr int64_t kFew = 64;
// The most that a row keeps of a kind: of windows, or of lengths of what repeats.
constexpr size_t kMostKept = 4;
constexpr uint64_t kBase = 0xD1342543DE82EF95u;  // odd, of mixed bits

// Sorts by counting the digits of 11 bits that any key has.
void radix_sort(std::vector<uint32_t>& keys, std::vector<uint32_t>& other) {
  if (keys.size() < 512) return std::sort(keys.begin(), keys.end());
  constexpr int kBits = 11, kPasses = 3;
  constexpr uint32_t kMask = (1u << kBits) - 1;
  static thread_local std::array<std::array<uint32_t, 1 << kBits>, kPasses> of_thread;
  auto& places = of_thread;
  for (auto& digit : places) digit.fill(0);
  for (const uint32_t key : keys)
    for (int pass = 0; pass < kPasses; ++pass) ++places[pass][key >> pass * kBits & kMask];
  other.resize(keys.size());
  for (int pass = 0; pass < kPasses; ++pass) {
    auto& place = places[pass];
    if (place[keys[0] >> pass * kBits & kMask] == keys.size()) continue;  // all have this digit
    uint32_t sum = 0;
    for (uint32_t& x : place) sum += std::exchange(x, sum);
    for (const uint32_t key : keys) other[place[key >> pass * kBits & kMask]++] = key;
    keys.swap(other);
  }
}

// The entry of a kind that is so, made if there is none; too many forget the oldest.
template <class T>
T& kept(std::vector<T>& all, Counted counted, int64_t number) {
  for (T& one : all)
    if (one.is(counted, number)) return one;
  if (all.size() == kMostKept) all.erase(all.begin());
  return all.emplace_back(counted, number);
}

}  // namespace

void TokenCounts::follow(const TokenRow& row) {
  if (end_ < 0 || row.size() - end_ > kFew) return build(row);
  while (end_ < row.size()) {
    add(row[end_], row.is_output(end_));
    ++end_;
    for (const int64_t begin = row.begin(counted_, window_, end_); begin_ < begin; ++begin_)
      remove(row[begin_], row.is_output(begin_));
  }
}

void TokenCounts::undo(const TokenRow& row) {
  if (end_ != row.size()) return;
  --end_;
  remove(row[end_], row.is_output(end_));
  for (const int64_t begin = row.begin(counted_, window_, end_); begin_ > begin;) {
    --begin_;
    add(row[begin_], row.is_output(begin_));
  }
}

void TokenCounts::build(const TokenRow& row) {
  static thread_local std::vector<uint32_t> of_thread, other;
  std::vector<uint32_t>& keys = of_thread;
  end_ = row.size();
  begin_ = row.begin(counted_, window_, end_);
  keys.resize(static_cast<size_t>(end_ - begin_));
  for (int64_t i = begin_; i < end_; ++i)
    keys[i - begin_] = static_cast<uint32_t>(row[i]) << 1 | row.is_output(i);
  radix_sort(keys, other);
  ids.clear(), counts.clear(), outputs.clear();
  for (const uint32_t key : keys) {
    const int32_t id = static_cast<int32_t>(key >> 1);
    if (ids.empty() || ids.back() != id)
      ids.push_back(id), counts.push_back(0), outputs.push_back(0);
    ++counts.back();
    outputs.back() += key & 1;
  }
}

void TokenCounts::add(int32_t id, bool output) {
  const auto at = std::lower_bound(ids.begin(), ids.end(), id) - ids.begin();
  if (at == static_cast<int64_t>(ids.size()) || ids[at] != id) {
    ids.insert(ids.begin() + at, id);
    counts.insert(counts.begin() + at, 0);
    outputs.insert(outputs.begin() + at, 0);
  }
  ++counts[at];
  outputs[at] += output;
}

void TokenCounts::remove(int32_t id, bool output) {
  const auto at = std::lower_bound(ids.begin(), ids.end(), id) - ids.begin();
  outputs[at] -= output;
  if (--counts[at] > 0) return;
  ids.erase(ids.begin() + at);
  counts.erase(counts.begin() + at);
  outputs.erase(outputs.begin() + at);
}

SuffixIndex::SuffixIndex(Counted counted, int64_t k) : counted_(counted), k_(k) {
  for (int64_t i = 0; i < k; ++i) power_ *= kBase;
}

void SuffixIndex::follow(const TokenRow& row) {
  first_ = row.first(counted_);
  const auto places = static_cast<size_t>(row.size() - first_);
  if (heads_.empty() || places > heads_.size()) {  // more places than buckets: anew
    int bits = 6;
    while (size_t{1} << bits < 2 * places) ++bits;
    shift_ = 64 - bits;
    heads_.assign(size_t{1} << bits, -1);
    previous_.clear();
    previous_.reserve(2 * places);
    hash_ = 0, end_ = first_;
  }
  for (; end_ < row.size(); ++end_) insert(row, end_);
}

void SuffixIndex::insert(const TokenRow& row, int64_t place) {
  const int64_t count = place - first_;
  hash_ = hash_ * kBase + static_cast<uint32_t>(row[place]);
  if (count >= k_) hash_ -= power_ * static_cast<uint32_t>(row[place - k_]);
  if (count + 1 < k_) return previous_.push_back(-1);
  int32_t& head = heads_[bucket()];
  previous_.push_back(head);
  head = static_cast<int32_t>(place);
}

void SuffixIndex::undo(const TokenRow& row) {
  if (heads_.empty() || end_ != row.size()) return;
  --end_;
  if (end_ - first_ + 1 >= k_) heads_[bucket()] = previous_.back();
  previous_.pop_back();
  hash_ = 0;
  for (int64_t i = std::max(first_, end_ - k_); i < end_; ++i)
    hash_ = hash_ * kBase + static_cast<uint32_t>(row[i]);
}

int64_t SuffixIndex::before(const TokenRow& row, int64_t place) const {
  const auto same = [&](int64_t other) {
    for (int64_t i = 0; i < k_; ++i)
      if (row[other - i] != row[place - i]) return false;
    return true;
  };
  int64_t found = previous_[static_cast<size_t>(place - first_)];
  while (found >= 0 && !same(found)) found = previous_[static_cast<size_t>(found - first_)];
  return found;
}

void Repeats::follow(const TokenRow& row, const SuffixIndex& index) {
  if (end_ < 0 || row.size() - end_ > kFew) return build(row);
  while (end_ < row.size()) step(row, index);
}

// With one token more, a match goes on or is exactly k long.
void Repeats::step(const TokenRow& row, const SuffixIndex& index) {
  next_.clear();
  auto earlier = matches.cbegin();
  for (int64_t at = index.before(row, end_); at >= 0; at = index.before(row, at)) {
    while (earlier != matches.cend() && earlier->place > at - 1) ++earlier;
    const bool goes_on = earlier != matches.cend() && earlier->place == at - 1;
    next_.push_back({at, goes_on ? earlier->length + 1 : k_});
  }
  matches.swap(next_);
  ++end_;
}

// The Z algorithm on the tokens from the last to the first.
void Repeats::build(const TokenRow& row) {
  static thread_local std::vector<int32_t> of_thread;
  std::vector<int32_t>& lengths = of_thread;
  const int64_t last = row.size() - 1, n = row.size() - row.first(counted_);
  const auto token = [&](int64_t i) { return row[last - i]; };
  lengths.assign(static_cast<size_t>(n), 0);
  matches.clear();
  for (int64_t i = 1, left = 0, right = 0; i < n; ++i) {  // [left, right) equals the beginning
    int64_t length = i < right ? std::min<int64_t>(right - i, lengths[i - left]) : 0;
    while (i + length < n && token(length) == token(i + length)) ++length;
    lengths[i] = static_cast<int32_t>(length);
    if (i + length > right) left = i, right = i + length;
    if (length >= k_) matches.push_back({last - i, length});
  }
  end_ = row.size();
}

void TokenRow::push_draft(int32_t token) {
  if (drafts_++ == 0)
    for (Repeats& one : repeats_) one.keep();
  push(token);
}

void TokenRow::drop_drafts() {
  if (drafts_ == 0) return;
  for (Repeats& one : repeats_) one.back();
  for (; drafts_ > 0; --drafts_) {
    for (TokenCounts& one : counts_) one.undo(*this);
    for (SuffixIndex& one : indices_) one.undo(*this);
    tokens_.pop_back();
  }
}

const TokenCounts& TokenRow::counts(Counted counted, int64_t window) {
  TokenCounts& one = kept(counts_, counted, window);
  one.follow(*this);
  return one;
}

const SuffixIndex& TokenRow::index(Counted counted, int64_t k) {
  SuffixIndex& one = kept(indices_, counted, k);
  one.follow(*this);
  return one;
}

const Repeats& TokenRow::repeats(Counted counted, int64_t k) {
  const SuffixIndex& places = index(counted, k);
  Repeats& one = kept(repeats_, counted, k);
  one.follow(*this, places);
  return one;
}

}  // namespace fastadapt
