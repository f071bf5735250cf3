// The histories of a batch, and the rules that make lists of ids with numbers of them: what
// kernels.h calls edits, (4, count) columns.
#pragma once

#include <cstdint>
#include <vector>

#include "history_row.h"

namespace fastadapt {

// A number for all rows, or one for each.
template <class T>
struct PerRow {
  const T* rows;
  T one;
  T operator[](int64_t r) const { return rows ? rows[r] : one; }
};

// What a rule lists for a row; they are in the row or in the rule.
struct Found {
  const int32_t* ids;
  int64_t count;
};

// The columns of a list of ids, from its first id on.
struct Columns {
  float *pre, *penalty, *post, *last;
};

class Rule {
 public:
  virtual ~Rule() = default;
  // `again` says that nothing has changed since this rule listed this row.
  virtual Found find(TokenRow& row, int64_t r, bool again) const = 0;
  virtual void write(TokenRow& row, int64_t r, const Columns& out) const = 0;
};

// Repetition, frequency and presence penalties.
struct PenaltyRule : Rule {
  PerRow<double> repetition, presence, frequency;
  PerRow<int64_t> window;  // 0: no limit
  Counted repeats;         // what repetition reads
  Counted counted;         // what presence and frequency read
  Found find(TokenRow& row, int64_t r, bool again) const override;
  void write(TokenRow& row, int64_t r, const Columns& out) const override;

 private:
  const TokenCounts* counts(TokenRow& row, int64_t r) const;  // null: no penalty
};

// Bans of the last token of n-grams that are there.
struct NGramRule : Rule {
  int64_t n;
  Counted counted;
  Found find(TokenRow& row, int64_t r, bool again) const override;
  void write(TokenRow& row, int64_t r, const Columns& out) const override;
};

// Bans of some ids while a row is short.
struct LengthRule : Rule {
  std::vector<int32_t> ids;  // ascending
  PerRow<int64_t> least;
  Counted counted;
  Found find(TokenRow& row, int64_t r, bool again) const override;
  void write(TokenRow& row, int64_t r, const Columns& out) const override;
};

// DRY: penalties of tokens that would continue a repeat, by its length.
struct DryRule : Rule {
  PerRow<double> multiplier;
  double base;
  int64_t allowed_length, longest;  // 0: no limit
  std::vector<int32_t> breakers;    // ascending
  PerRow<int64_t> window;
  Counted counted;
  Found find(TokenRow& row, int64_t r, bool again) const override;
  void write(TokenRow& row, int64_t r, const Columns& out) const override;
};

// Sequences of ids with a number each, by their last ids ascending; those of one last id in the
// order in which their numbers are added up.
struct Sequences {
  std::vector<int32_t> ids;      // of all, one after the other
  std::vector<int64_t> offsets;  // (S + 1,)
  std::vector<float> biases;     // (S,)
};

// Additions to the last ids of sequences whose others are the last tokens.
struct SequenceRule : Rule {
  std::vector<const Sequences*> of_rows;  // one for all, or one for each
  Counted counted;
  Found find(TokenRow& row, int64_t r, bool again) const override;
  void write(TokenRow& row, int64_t r, const Columns& out) const override;
};

// Where lists go. Without ids only their lengths are told.
struct ListsOut {
  const int64_t* drafts;  // (N, k): row r * (k + 1) + j is of row r and its first j drafts
  int64_t k;
  int64_t* offsets;  // (N * (k + 1) + 1,)
  int32_t* ids;      // (count,), or null
  float* columns;    // (4, count)
  int num_threads;
};

class History {
 public:
  // Rows of `stride` tokens, `counts` of each; the arrays have a number for each row.
  History(const int64_t* tokens, int64_t n, int64_t stride, const int64_t* counts,
          const int64_t* starts, const int64_t* prompts);

  int64_t rows() const { return static_cast<int64_t>(rows_.size()); }
  const TokenRow& row(int64_t r) const { return rows_.at(static_cast<size_t>(r)); }
  int64_t length(int64_t r, Counted counted) const;
  void append(const int64_t* tokens, int64_t stride, const PerRow<int64_t>& counts);
  void keep(const std::vector<int64_t>& rows);
  void extend(const History& other);

  // Makes the offsets of a rule's lists, or fills the lists; returns the largest id, or -1.
  int64_t list(const Rule& rule, const ListsOut& out);

 private:
  std::vector<TokenRow> rows_;
  int64_t tokens_ = 0;
};

}  // namespace fastadapt
