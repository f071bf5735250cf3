// Rows as they are, or edited: then in float32, written to a buffer tile by tile, so that edits and
// the scan find a tile in the fastest cache.

// The edits of one row.
struct RowEdits {
  const Edits& all;
  const int32_t *first, *last;
  const uint32_t* allowed;

  RowEdits(const Edits& edits, int64_t r) : all(edits), first(nullptr), last(nullptr) {
    if (edits.ids) {
      first = edits.ids + edits.offsets[r];
      last = edits.ids + edits.offsets[r + 1];
    }
    allowed = edits.allowed ? edits.allowed + r * edits.allowed_stride : nullptr;
  }

  // The first edit of an id that is at least `id`.
  const int32_t* from(int64_t id) const {
    const int32_t *low = first, *high = last;
    while (low < high) {
      const int32_t* middle = low + (high - low) / 2;
      if (*middle < id)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }

  bool allows(int64_t id) const { return !allowed || (allowed[id >> 5] >> (id & 31) & 1); }

  // What an edit makes of a logit.
  float edited(float x, const int32_t* at) const {
    const float* column = all.columns + (at - all.ids);
    if (!allows(*at)) return -kInf;
    if (all.given) return *column;
    if (x == -kInf) return x;
    const float y = x + column[0], penalty = column[all.count];
    const float z = (y > 0 ? y / penalty : y * penalty) + column[2 * all.count];
    return z + column[3 * all.count];
  }

  // What it makes of the gradient of its result: that of the logit.
  float through(float dy, float x, const int32_t* at) const {
    if (all.given || x == -kInf) return 0;
    const float* column = all.columns + (at - all.ids);
    const float penalty = column[all.count];
    return x + column[0] > 0 ? dy / penalty : dy * penalty;
  }
};

// Writes a part of a row that begins with a block.
template <class T>
static RowStats write_edited_part(const T* x, int64_t from, int64_t to, const RowEdits& edits,
                                  float* out) {
  RowStats stats{-kInf, kInf, false};
  const int32_t* next = edits.from(from);
  for (int64_t begin = from; begin < to; begin += kBlock) {
    const int64_t end = begin + kBlock < to ? begin + kBlock : to;
    const uint32_t* allowed = edits.allowed;
    if (allowed) {
      constexpr uint32_t lanes = W == 1 ? 1u : (1u << W) - 1;
      for_row(x, begin, end, 1.0f, [&](int64_t i, F s) {
        const uint32_t b = allowed[i >> 5] >> (i & 31) & lanes;
        store(out + i, choose(from_bits(b), s, fset(-kInf)));
      });
    } else {
      for_row(x, begin, end, 1.0f, [&](int64_t i, F s) { store(out + i, s); });
    }
    for (; next < edits.last && *next < end; ++next)
      if (*next >= begin)  // else these lists have changed since they were checked
        out[*next] = edits.edited(to_float(x[*next]), next);
    join(&stats, scan_part(out + begin, end - begin));
  }
  return stats;
}

template <class T>
static RowStats write_edited(const T* x, int64_t n, const RowEdits& edits, const Scratch& scratch) {
  return stats_in_parts(scratch.team, n, [&](int64_t begin, int64_t end) {
    return write_edited_part(x, begin, end, edits, scratch.row_f32);
  });
}

// Calls f(x, stats) on row r, x being of type T or, where it is edited, float.
template <class T, class Fn>
static inline void with_row(const Rows& rows, const Edits& edits, int64_t r, const Scratch& scratch,
                            Fn&& f) {
  const T* x = static_cast<const T*>(rows.data) + r * rows.stride;
  if (edits.none()) return f(x, scan(x, rows.v, scratch.team));
  const RowStats stats = write_edited(x, rows.v, RowEdits(edits, r), scratch);
  f(static_cast<const float*>(scratch.row_f32), stats);
}
