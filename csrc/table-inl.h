// The table of one ISA: row functions of each element type behind the functions of the contract.

template <class Args, class Row>
static inline void each_row(int64_t begin, int64_t end, const Args& args, const Scratch& scratch,
                            Row row) {
  for (int64_t r = begin; r < end; ++r) row(args, r, scratch);
}

// The function of the contract `name`; the element type stands in a field of its arguments.
#define FASTADAPT_ROWS(name, Args, dtype_field, row_fn, otherwise)                         \
  static void name(const Args& args, const Scratch& scratch, int64_t begin, int64_t end) { \
    switch (args.dtype_field) {                                                            \
      case DType::kFloat32:                                                                \
        return each_row(begin, end, args, scratch, row_fn<float>);                         \
      case DType::kBFloat16:                                                               \
        return each_row(begin, end, args, scratch, row_fn<bf16>);                          \
      case DType::kFloat16:                                                                \
        return each_row(begin, end, args, scratch, row_fn<f16>);                           \
      default:                                                                             \
        otherwise;                                                                         \
    }                                                                                      \
  }
#define FASTADAPT_WITHOUT_DOUBLE(name, Args, row_fn) \
  FASTADAPT_ROWS(name, Args, rows.dtype, row_fn, return)
#define FASTADAPT_WITH_DOUBLE(name, Args, dtype_field, row_fn) \
  FASTADAPT_ROWS(name, Args, dtype_field, row_fn,              \
                 return each_row(begin, end, args, scratch, row_fn<double>))

FASTADAPT_WITHOUT_DOUBLE(filter_rows, FilterArgs, filter_row)
FASTADAPT_WITHOUT_DOUBLE(sample_rows, SampleArgs, sample_row)
FASTADAPT_WITHOUT_DOUBLE(score_rows, ScoreArgs, score_row)
FASTADAPT_WITH_DOUBLE(log_odds_rows, LogOddsArgs, rows.dtype, log_odds_row)
FASTADAPT_WITH_DOUBLE(log_odds_backward_rows, LogOddsBackwardArgs, rows.dtype,
                      log_odds_backward_row)
FASTADAPT_WITH_DOUBLE(label_log_odds_rows, LabelArgs, rows.dtype, label_log_odds_row)
FASTADAPT_WITH_DOUBLE(label_log_odds_backward_rows, LabelBackwardArgs, rows.dtype,
                      label_log_odds_backward_row)
FASTADAPT_WITH_DOUBLE(candidate_rows, CandidateArgs, rows.dtype, candidate_row)
FASTADAPT_WITH_DOUBLE(candidate_backward_rows, CandidateBackwardArgs, rows.dtype,
                      candidate_backward_row)
FASTADAPT_WITH_DOUBLE(tile_rows, TileArgs, tile.rows.dtype, tile_row)
FASTADAPT_WITH_DOUBLE(tile_backward_rows, TileBackwardArgs, tile.rows.dtype, tile_backward_row)
FASTADAPT_WITH_DOUBLE(mix_rows, MixArgs, dtype, mix_row)
FASTADAPT_WITH_DOUBLE(scatter_rows, ScatterArgs, dtype, scatter_row)
FASTADAPT_WITH_DOUBLE(dot_rows, DotArgs, dtype, dot_row)

#undef FASTADAPT_WITH_DOUBLE
#undef FASTADAPT_WITHOUT_DOUBLE
#undef FASTADAPT_ROWS
