// The tokens of one row of a history, and what its lists are made from: made when it is first asked
// for, then kept up to date by the tokens that came since.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fastadapt {

class TokenRow;

// Which tokens count; the order is that of fastadapt/_ops/history.py.
enum class Counted : int { kOutput = 0, kAll, kPadded };

// The distinct ids among the last tokens of a row, ascending, and how often each is there.
class TokenCounts {
 public:
  TokenCounts(Counted counted, int64_t window) : counted_(counted), window_(window) {}
  bool is(Counted counted, int64_t window) const {
    return counted_ == counted && window_ == window;
  }
  void follow(const TokenRow& row);
  void undo(const TokenRow& row);  // before the last token of the row goes

  std::vector<int32_t> ids, counts;
  std::vector<int32_t> outputs;  // those of the counts that are output

 private:
  void build(const TokenRow& row);
  void add(int32_t id, bool output);
  void remove(int32_t id, bool output);

  Counted counted_;
  int64_t window_;                // of all tokens, in whatever counts; 0: no limit
  int64_t begin_ = 0, end_ = -1;  // the places of the row that are counted
};

// Where the last k tokens of a row, or of a part of it from its beginning on, stand before.
class SuffixIndex {
 public:
  SuffixIndex(Counted counted, int64_t k);
  bool is(Counted counted, int64_t k) const { return counted_ == counted && k_ == k; }
  void follow(const TokenRow& row);
  void undo(const TokenRow& row);

  // The last place before this one whose k tokens up to it are the same, or -1.
  int64_t before(const TokenRow& row, int64_t place) const;

 private:
  void insert(const TokenRow& row, int64_t place);
  size_t bucket() const { return static_cast<size_t>(hash_ * 0x9E3779B97F4A7C15u >> shift_); }

  Counted counted_;
  int64_t k_, first_ = 0, end_ = 0;
  uint64_t hash_ = 0, power_ = 1;  // of the k tokens before `end_`; the factor of the one before
  int shift_ = 64;
  std::vector<int32_t> heads_;     // of each bucket its last place, or -1
  std::vector<int32_t> previous_;  // of each place from first_ on the one before it in its bucket
};

// The places where the last k tokens of a row stand before, the last one first, and how many of its
// last tokens stand there.
class Repeats {
 public:
  struct Match {
    int64_t place, length;  // of the last of these tokens; at least k
  };
  Repeats(Counted counted, int64_t k) : counted_(counted), k_(k) {}
  bool is(Counted counted, int64_t k) const { return counted_ == counted && k_ == k; }
  void follow(const TokenRow& row, const SuffixIndex& index);
  void keep() { kept_ = matches, kept_end_ = end_; }
  void back() { matches = kept_, end_ = kept_end_; }

  std::vector<Match> matches;

 private:
  void build(const TokenRow& row);
  void step(const TokenRow& row, const SuffixIndex& index);

  Counted counted_;
  int64_t k_, end_ = -1, kept_end_ = -1;
  std::vector<Match> kept_, next_;
};

class TokenRow {
 public:
  // `count` tokens, of which those before `start` are padding and those before `prompt` no output.
  TokenRow(const int64_t* tokens, int64_t count, int64_t start, int64_t prompt)
      : tokens_(tokens, tokens + count), start_(start), prompt_(prompt) {}

  int64_t size() const { return static_cast<int64_t>(tokens_.size()); }
  int32_t operator[](int64_t place) const { return tokens_[static_cast<size_t>(place)]; }
  bool is_output(int64_t place) const { return place >= prompt_; }
  int64_t first(Counted counted) const {
    return counted == Counted::kOutput ? prompt_ : counted == Counted::kAll ? start_ : 0;
  }
  // Where the last `window` of the tokens before `end` begin, or the first that counts.
  int64_t begin(Counted counted, int64_t window, int64_t end) const {
    return std::max(first(counted), window == 0 ? 0 : end - window);
  }

  void push(int32_t token) { tokens_.push_back(token); }
  void push_draft(int32_t token);
  void drop_drafts();

  // All of these as of the last token; a reference holds until the next call.
  const TokenCounts& counts(Counted counted, int64_t window);
  const SuffixIndex& index(Counted counted, int64_t k);
  const Repeats& repeats(Counted counted, int64_t k);

  // What a rule found last, with numbers where it needs them.
  std::vector<int32_t> found;
  std::vector<float> values;

 private:
  std::vector<int32_t> tokens_;
  int64_t start_, prompt_, drafts_ = 0;
  std::vector<TokenCounts> counts_;
  std::vector<SuffixIndex> indices_;
  std::vector<Repeats> repeats_;
};

}  // namespace fastadapt
