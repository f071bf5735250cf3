#include "join_edits.h"

#include <limits>
#include <stdexcept>
#include <string>

namespace fastadapt {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

struct Edit {
  float pre, penalty, post, last;
};

Edit edit_of(const Edits& all, int64_t at) {
  const float* column = all.columns + at;
  const int64_t count = all.count;
  return {column[0], column[count], column[2 * count], column[3 * count]};
}

// Additions that change something, in their order; zeros follow.
struct Additions {
  float numbers[6] = {};
  int count = 0;
  void add(float x) {
    if (x != 0) numbers[count++] = x;
  }
};

// Whether b after a is one edit, which then is in `both`. What one of them bans stays banned.
bool compose(const Edit& a, const Edit& b, Edit* both) {
  const float additions[] = {a.pre, a.post, a.last, b.pre, b.post, b.last};
  for (const float x : additions) {
    if (x != -kInf) continue;
    *both = {-kInf, 1, 0, 0};
    return true;
  }
  const bool first = a.penalty != 1, second = b.penalty != 1;
  const int place = first ? 1 : second ? 4 : 0;  // of the penalty among the additions
  Additions early, rest;
  for (int i = 0; i < 6; ++i) (i < place ? early : rest).add(additions[i]);
  if (place == 0) {  // without a penalty one of them may stand before it
    *both = {rest.numbers[0], 1, rest.numbers[1], rest.numbers[2]};
    return rest.count <= 3;
  }
  *both = {early.numbers[0], first ? a.penalty : b.penalty, rest.numbers[0], rest.numbers[1]};
  return early.count <= 1 && rest.count <= 2 && !(first && second);
}

// Those of CUDA come here unread.
void check_offsets(const Edits& edits, int64_t n) {
  bool good = edits.offsets[0] == 0 && edits.offsets[n] == edits.count;
  for (int64_t r = 0; r < n; ++r) good = good && edits.offsets[r] <= edits.offsets[r + 1];
  if (!good)
    throw std::invalid_argument("offsets: expected to ascend from 0 to " +
                                std::to_string(edits.count) + ", got others");
}

// Calls f(id, place in the first, place in the other) for each id of row r, ascending; -1: not
// there.
template <class Fn>
void merge(const Edits& first, const Edits& after, int64_t r, Fn&& f) {
  int64_t a = first.offsets[r], b = after.offsets[r];
  const int64_t a_end = first.offsets[r + 1], b_end = after.offsets[r + 1];
  while (a < a_end || b < b_end) {
    if (b == b_end || (a < a_end && first.ids[a] < after.ids[b])) {
      f(first.ids[a], a, -1);
      ++a;
    } else if (a == a_end || after.ids[b] < first.ids[a]) {
      f(after.ids[b], -1, b);
      ++b;
    } else {
      f(first.ids[a], a, b);
      ++a, ++b;
    }
  }
}

}  // namespace

void join_offsets(const Edits& first, const Edits& after, int64_t n, int64_t* offsets) {
  for (const Edits* one : {&first, &after}) check_offsets(*one, n);
  offsets[0] = 0;
  for (int64_t r = 0; r < n; ++r) {
    int64_t count = 0;
    merge(first, after, r, [&](int32_t, int64_t, int64_t) { ++count; });
    offsets[r + 1] = offsets[r] + count;
  }
}

int64_t join_edits(const Edits& first, const Edits& after, int64_t n, const int64_t* offsets,
                   int32_t* ids, float* columns) {
  const int64_t total = offsets[n];
  int64_t at = 0, misfit = -1;
  for (int64_t r = 0; r < n; ++r)
    merge(first, after, r, [&](int32_t id, int64_t a, int64_t b) {
      Edit both;
      if (a < 0)
        both = edit_of(after, b);
      else if (b < 0)
        both = edit_of(first, a);
      else if (!compose(edit_of(first, a), edit_of(after, b), &both) && misfit < 0)
        misfit = at;
      ids[at] = id;
      columns[at] = both.pre, columns[total + at] = both.penalty;
      columns[2 * total + at] = both.post, columns[3 * total + at] = both.last;
      ++at;
    });
  return misfit;
}

}  // namespace fastadapt
