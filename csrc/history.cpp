#include "history.h"

#include <stdexcept>
#include <string>

#include "parallel.h"

namespace fastadapt {
namespace {

constexpr int64_t kLargestId = 0x7FFFFFFF;
// Fewer tokens of a history are not worth a thread: their lists take some 20 us.
constexpr int64_t kLeastTokens = 1 << 14;

void check_ids(const char* name, const int64_t* ids, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (ids[i] < 0 || ids[i] > kLargestId)
      throw std::invalid_argument(std::string(name) + ": expected ids in [0, 2147483647], got " +
                                  std::to_string(ids[i]));
}

// Drafts of a row go when they have been listed, whatever happens.
struct Drafts {
  TokenRow& row;
  ~Drafts() { row.drop_drafts(); }
};

struct ListArgs {
  const Rule& rule;
  const ListsOut& out;
  std::vector<TokenRow>& rows;
  int32_t* largest;  // of each list
};

void list_rows(const ListArgs& args, const Scratch&, int64_t from, int64_t to) {
  const ListsOut& out = args.out;
  const int64_t lists = out.k + 1;
  const int64_t count = out.ids ? out.offsets[static_cast<int64_t>(args.rows.size()) * lists] : 0;
  for (int64_t r = from; r < to; ++r) {
    TokenRow& row = args.rows[static_cast<size_t>(r)];
    const Drafts drafts{row};
    for (int64_t j = 0; j < lists; ++j) {
      if (j > 0) row.push_draft(static_cast<int32_t>(out.drafts[r * out.k + j - 1]));
      const int64_t at = r * lists + j;
      const Found found = args.rule.find(row, r, out.ids && out.k == 0);
      if (!out.ids) {
        out.offsets[at + 1] = found.count;
        args.largest[at] = found.count ? found.ids[found.count - 1] : -1;
        continue;
      }
      const int64_t begin = out.offsets[at];
      if (found.count != out.offsets[at + 1] - begin)
        throw std::runtime_error("history: expected no change while it is listed, got one");
      std::copy_n(found.ids, found.count, out.ids + begin);
      float* column = out.columns + begin;
      args.rule.write(row, r, {column, column + count, column + 2 * count, column + 3 * count});
    }
  }
}

}  // namespace

History::History(const int64_t* tokens, int64_t n, int64_t stride, const int64_t* counts,
                 const int64_t* starts, const int64_t* prompts) {
  for (int64_t r = 0; r < n; ++r) check_ids("tokens", tokens + r * stride, counts[r]);
  for (int64_t r = 0; r < n; ++r) {
    rows_.emplace_back(tokens + r * stride, counts[r], starts[r], prompts[r]);
    tokens_ += counts[r];
  }
}

int64_t History::length(int64_t r, Counted counted) const {
  const TokenRow& row = rows_[static_cast<size_t>(r)];
  return row.size() - row.first(counted);
}

void History::append(const int64_t* tokens, int64_t stride, const PerRow<int64_t>& counts) {
  for (int64_t r = 0; r < rows(); ++r) check_ids("tokens", tokens + r * stride, counts[r]);
  for (int64_t r = 0; r < rows(); ++r) {
    for (int64_t i = 0; i < counts[r]; ++i)
      rows_[static_cast<size_t>(r)].push(static_cast<int32_t>(tokens[r * stride + i]));
    tokens_ += counts[r];
  }
}

void History::keep(const std::vector<int64_t>& rows) {
  std::vector<int64_t> uses(rows_.size());
  for (const int64_t r : rows) ++uses[static_cast<size_t>(r)];
  std::vector<TokenRow> kept;
  kept.reserve(rows.size());
  tokens_ = 0;
  for (const int64_t r : rows) {
    TokenRow& row = rows_[static_cast<size_t>(r)];
    tokens_ += row.size();
    if (--uses[static_cast<size_t>(r)] == 0)
      kept.push_back(std::move(row));
    else
      kept.push_back(row);
  }
  rows_ = std::move(kept);
}

void History::extend(const History& other) {
  const std::vector<TokenRow> more = other.rows_;  // of this one, perhaps
  rows_.insert(rows_.end(), more.begin(), more.end());
  tokens_ += other.tokens_;
}

int64_t History::list(const Rule& rule, const ListsOut& out) {
  if (!out.ids) check_ids("draft", out.drafts, rows() * out.k);
  std::vector<int32_t> largest(static_cast<size_t>(rows() * (out.k + 1)), -1);
  const int threads = tokens_ * (out.k + 1) < kLeastTokens ? 1 : out.num_threads;
  run_rows<ListArgs>(list_rows, {rule, out, rows_, largest.data()}, rows(), 1, threads);
  if (out.ids) return -1;
  out.offsets[0] = 0;
  for (size_t i = 0; i < largest.size(); ++i) out.offsets[i + 1] += out.offsets[i];
  return largest.empty() ? -1 : *std::max_element(largest.begin(), largest.end());
}

}  // namespace fastadapt
