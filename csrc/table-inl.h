// The table of one ISA: row functions of each element type behind the functions of the contract.

template <class Args, class Row>
static inline void each_row(int64_t begin, int64_t end, const Args& args, const Scratch& scratch,
                            Row row) {
  for (int64_t r = begin; r < end; ++r) row(args, r, scratch);
}

// A function of the contract; the element type stands in a field of its arguments.
#define FASTADAPT_ROWS(Args, dtype_field, row_fn, otherwise)                 \
  [](const Args& args, const Scratch& scratch, int64_t begin, int64_t end) { \
    switch (args.dtype_field) {                                              \
      case DType::kFloat32:                                                  \
        return each_row(begin, end, args, scratch, row_fn<float>);           \
      case DType::kBFloat16:                                                 \
        return each_row(begin, end, args, scratch, row_fn<bf16>);            \
      case DType::kFloat16:                                                  \
        return each_row(begin, end, args, scratch, row_fn<f16>);             \
      default:                                                               \
        otherwise;                                                           \
    }                                                                        \
  }
#define FASTADAPT_WITHOUT_DOUBLE(Args, row_fn) FASTADAPT_ROWS(Args, rows.dtype, row_fn, return)
#define FASTADAPT_WITH_DOUBLE(Args, dtype_field, row_fn) \
  FASTADAPT_ROWS(Args, dtype_field, row_fn,              \
                 return each_row(begin, end, args, scratch, row_fn<double>))

extern const KernelTable kTable;
const KernelTable kTable = {
    FASTADAPT_WITHOUT_DOUBLE(FilterArgs, filter_row),
    FASTADAPT_WITHOUT_DOUBLE(SampleArgs, sample_row),
    FASTADAPT_WITHOUT_DOUBLE(VerifyArgs, verify_sequence),
    FASTADAPT_WITHOUT_DOUBLE(ScoreArgs, score_row),
    FASTADAPT_WITHOUT_DOUBLE(SliceTallyArgs, slice_tally_row),
    FASTADAPT_WITHOUT_DOUBLE(SliceBestArgs, slice_best_row),
    FASTADAPT_WITHOUT_DOUBLE(SliceTopArgs, slice_top_row),
    FASTADAPT_WITHOUT_DOUBLE(SliceFindArgs, slice_find_row),
    FASTADAPT_WITHOUT_DOUBLE(SliceListArgs, slice_list_row),
    masses_of,
    targets_of,
    logs_of,
    exps_of,
    FASTADAPT_WITH_DOUBLE(LogOddsArgs, rows.dtype, log_odds_row),
    FASTADAPT_WITH_DOUBLE(LogOddsBackwardArgs, rows.dtype, log_odds_backward_row),
    FASTADAPT_WITH_DOUBLE(LabelArgs, rows.dtype, label_log_odds_row),
    FASTADAPT_WITH_DOUBLE(LabelBackwardArgs, rows.dtype, label_log_odds_backward_row),
    FASTADAPT_WITH_DOUBLE(CandidateArgs, rows.dtype, candidate_row),
    FASTADAPT_WITH_DOUBLE(CandidateBackwardArgs, rows.dtype, candidate_backward_row),
    FASTADAPT_WITH_DOUBLE(TileArgs, rows.dtype, tile_row),
    FASTADAPT_WITH_DOUBLE(TileBackwardArgs, rows.dtype, tile_backward_row),
    FASTADAPT_WITH_DOUBLE(PairSumArgs, rows.dtype, pair_sum_row),
    FASTADAPT_WITH_DOUBLE(PairBackwardArgs, rows.dtype, pair_backward_row),
    FASTADAPT_WITH_DOUBLE(MixArgs, dtype, mix_row),
    FASTADAPT_WITH_DOUBLE(ScatterArgs, dtype, scatter_row),
    FASTADAPT_WITH_DOUBLE(DotArgs, dtype, dot_row)};

#undef FASTADAPT_WITH_DOUBLE
#undef FASTADAPT_WITHOUT_DOUBLE
#undef FASTADAPT_ROWS
