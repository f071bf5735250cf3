// The table of one ISA: row functions of each element type behind the functions of the contract.

template <class Args, class Row>
static inline void each_row(int64_t begin, int64_t end, const Args& args, const Scratch& scratch,
                            Row row) {
  for (int64_t r = begin; r < end; ++r) row(args, r, scratch);
}

#define FASTADAPT_BY_DTYPE(row_fn)                               \
  switch (args.rows.dtype) {                                     \
    case DType::kFloat32:                                        \
      return each_row(begin, end, args, scratch, row_fn<float>); \
    case DType::kBFloat16:                                       \
      return each_row(begin, end, args, scratch, row_fn<bf16>);  \
    case DType::kFloat16:                                        \
      return each_row(begin, end, args, scratch, row_fn<f16>);   \
    default:                                                     \
      return;                                                    \
  }

static void filter_rows(const FilterArgs& args, const Scratch& scratch, int64_t begin,
                        int64_t end) {
  FASTADAPT_BY_DTYPE(filter_row)
}
static void sample_rows(const SampleArgs& args, const Scratch& scratch, int64_t begin,
                        int64_t end) {
  FASTADAPT_BY_DTYPE(sample_row)
}
static void score_rows(const ScoreArgs& args, const Scratch& scratch, int64_t begin, int64_t end) {
  FASTADAPT_BY_DTYPE(score_row)
}
static void margin_rows(const MarginArgs& args, const Scratch& scratch, int64_t begin,
                        int64_t end) {
  if (args.rows.dtype == DType::kFloat64)
    return each_row(begin, end, args, scratch, margin_row<double>);
  FASTADAPT_BY_DTYPE(margin_row)
}
static void margin_backward_rows(const MarginBackwardArgs& args, const Scratch& scratch,
                                 int64_t begin, int64_t end) {
  if (args.rows.dtype == DType::kFloat64)
    return each_row(begin, end, args, scratch, margin_backward_row<double>);
  FASTADAPT_BY_DTYPE(margin_backward_row)
}

#undef FASTADAPT_BY_DTYPE

// The loss operators take float64 as well; their element type may stand elsewhere in the arguments.
#define FASTADAPT_LOSS_ROWS(name, Args, dtype_field, row_fn)                               \
  static void name(const Args& args, const Scratch& scratch, int64_t begin, int64_t end) { \
    switch (args.dtype_field) {                                                            \
      case DType::kFloat32:                                                                \
        return each_row(begin, end, args, scratch, row_fn<float>);                         \
      case DType::kBFloat16:                                                               \
        return each_row(begin, end, args, scratch, row_fn<bf16>);                          \
      case DType::kFloat16:                                                                \
        return each_row(begin, end, args, scratch, row_fn<f16>);                           \
      default:                                                                             \
        return each_row(begin, end, args, scratch, row_fn<double>);                        \
    }                                                                                      \
  }

FASTADAPT_LOSS_ROWS(label_margin_rows, LabelArgs, rows.dtype, label_margin_row)
FASTADAPT_LOSS_ROWS(label_margin_backward_rows, LabelBackwardArgs, rows.dtype,
                    label_margin_backward_row)
FASTADAPT_LOSS_ROWS(candidate_rows, CandidateArgs, rows.dtype, candidate_row)
FASTADAPT_LOSS_ROWS(candidate_backward_rows, CandidateBackwardArgs, rows.dtype,
                    candidate_backward_row)
FASTADAPT_LOSS_ROWS(tile_rows, TileArgs, tile.rows.dtype, tile_row)
FASTADAPT_LOSS_ROWS(tile_backward_rows, TileBackwardArgs, tile.rows.dtype, tile_backward_row)
FASTADAPT_LOSS_ROWS(mix_rows, MixArgs, dtype, mix_row)
FASTADAPT_LOSS_ROWS(scatter_rows, ScatterArgs, dtype, scatter_row)
FASTADAPT_LOSS_ROWS(dot_rows, DotArgs, dtype, dot_row)

#undef FASTADAPT_LOSS_ROWS
