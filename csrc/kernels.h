// The contract between the binding, the dispatcher and the kernels of each ISA: plain pointers,
// sizes and strides. All strides are in elements, not bytes. No torch, no Python, no SIMD types.
#pragma once

#include <cstdint>

#include "callbacks.h"

namespace fastadapt {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// The largest row: sums of masses, each at most 2^40, then stay below 2^62.
constexpr int64_t kMaxVocab = int64_t{1} << 22;

// The most adaptors that score takes at once.
constexpr int64_t kMaxAdaptors = 256;

// Row status; a bad row never disturbs its batch mates.
enum Status : uint8_t {
  kOk = 0,
  kNaN = 1,
  kPosInf = 2,
  kNoFinite = 3,
  kBadKnob = 4,
  kBadDraft = 5  // of verified rows: the row of the draft's own logits is bad, or its knobs
};

// The order of the packed knobs, as in fastadapt/adaptor.py.
enum Knob : int {
  kTemperature = 0,
  kTopK,
  kTopP,
  kMinP,
  kTypicalP,
  kEpsilon,
  kEta,
  kKeep,
  kTopNSigma,
  kMinK,
  kTopA,
  kTopH,
  kXtcProbability,  // the filter of both
  kXtcThreshold,
  kNumKnobs
};

// The filters of an order, first to last: the first in the lowest four bits, 0 behind the last.
using Filters = uint64_t;
constexpr int kBitsOfFilter = 4;

// N rows of V logits; the last dimension is contiguous.
struct Rows {
  const void* data;
  DType dtype;
  int64_t n;
  int64_t v;
  int64_t stride;
};

// Packed knobs (kNumKnobs, R): R is 1 (shared by all rows, row_step 0) or N (row_step 1).
struct Knobs {
  const double* data;
  int64_t knob_step;
  int64_t row_step;
  Filters filters;
  bool temperature_last;
};

// What is done to the logits of each row before anything else, in float32. Edits are lists of ids,
// in compressed rows: those of row r are [offsets[r], offsets[r + 1]), ascending, each once. Either
// y is given, or y = x + pre; y = y / penalty where y > 0, else y * penalty; y = y + post; y = y +
// last; x = -inf stays. Then what is not allowed is -inf.
struct Edits {
  const int32_t* ids;      // (count,), or null: none
  const int64_t* offsets;  // (N + 1,)
  const float* columns;    // (4, count): pre, penalty, post, last; or (1, count): y
  int64_t count;
  bool given;               // whether columns are (1, count)
  const uint32_t* allowed;  // (N, ceil(V / 32)), bit j % 32 of word j / 32 is id j; or null: all
  int64_t allowed_stride;   // in words
  bool none() const { return !ids && !allowed; }
};

// Buffers of one thread. Every array holds V rounded up plus a vector of padding.
struct Scratch {
  float* row_e;       // masses of the whole row before truncation to integers
  int64_t* blocks;    // integer mass of each block of a view
  int64_t* above;     // the same of what is certain to survive a cut
  int64_t* cand_end;  // where the candidates of each block end
  float* list_s;      // survivors: scaled logit, mass, id
  float* list_e;
  int32_t* list_id;
  float* cand_key;  // candidates for a threshold: key, mass, id
  float* cand_e;
  int32_t* cand_id;
  float* fine_key;  // those that are left of them
  float* fine_e;
  int32_t* fine_id;
  float* ordered;    // the logits of a row in pieces; of a verified row and its draft, supports
  float* row_f32;    // a row in float32: one of float64 rounded, or one that is edited
  const Team* team;  // null where the thread is alone
};

struct FilterArgs {
  Rows rows;
  Knobs knobs;
  Edits edits;
  void* out;  // (N, V), contiguous, dtype of rows
};

// Optional outputs are null.
struct SampleArgs {
  Rows rows;
  Knobs knobs;
  Edits edits;
  const int64_t* seeds;      // (N,)
  const int64_t* positions;  // (N,), or null: all 0
  int64_t* tokens;           // (N,)
  float* logprobs;           // (N,)
  int32_t* kept;             // (N,)
  uint8_t* status;           // (N,)
  float* base_logprobs;      // (N,)
  float* log_mass;           // (N,)
  int64_t top_n;
  int64_t* top_ids;     // (N, top_n)
  float* top_logprobs;  // (N, top_n)
  int32_t* rank;        // (N,)
  Supports supports;    // a list a row
};

// N sequences of K + 1 rows, K drafts each: rows.n is N, rows and what there is of each are N (K +
// 1); seeds, positions and knobs are of sequences. Optional outputs are null.
struct VerifyArgs : SampleArgs {
  int64_t k;
  const int64_t* draft;    // (N, K)
  const int64_t* lengths;  // (N,), at most K; or null: all K
  Rows draft_rows;         // (N K, V), what the drafts were drawn from; no data: nothing is known
  Knobs draft_knobs;
  int64_t* accepted;  // (N,)
};

struct ScoreArgs {
  Rows rows;
  const int64_t* tokens;  // (N,)
  int64_t ignore_index;
  int64_t num_adaptors;
  const Knobs* knobs;  // (A,)
  Edits edits;
  float* logprobs;       // (N, A)
  float* log_norm;       // (N, A)
  int32_t* kept;         // (N, A)
  float* base_logprobs;  // (N,)
  float* entropy;        // (N,)
  Supports supports;     // a list for each adaptor and, within it, each row
};

struct LogOddsArgs {
  Rows rows;
  Knobs knobs;
  Edits edits;            // none with float64 rows
  const int64_t* tokens;  // (N,)
  int64_t ignore_index;
  void* log_odds;    // (N,), float32, or float64 for float64 rows
  uint8_t* support;  // (N, ceil(V / 8)), bit j % 8 of byte j / 8 is token j
  double* stats;     // (N, 2): kOthersMax, kOthersSum (in units of 1) of the surviving others
};

struct LogOddsBackwardArgs {
  Rows rows;
  Knobs knobs;
  const int64_t* tokens;
  int64_t ignore_index;
  const void* dlog_odds;   // (N,), dtype of the log-odds
  const uint8_t* support;  // as written by the forward
  const double* stats;
  Edits edits;    // as in the forward
  void* dlogits;  // (N, V), contiguous, dtype of rows
  float* dgiven;  // (count,), dL/dy of edits that give y; or null
};

// Rows of the loss operators: what the others of a label come to. Python reads it from the module.
enum Stat : int {
  kOthersMax = 0,            // their largest logit m, -inf if there are none
  kOthersSum,                // sum of e^(z - m), 0 if there are none
  kOthersWeighted,           // of a label: sum of e^(z - m) (z - m), where asked for
  kTopId = kOthersWeighted,  // of candidates: the id of the largest entry, which is their label
  kLabelLogit,
  kOthersSquared = kLabelLogit,  // of a tile: sum of e^(2 (z - m)), where asked for
  kNumStats,
  kOthersRest = kNumStats,  // of a tile: sum of e^(z - m) where z < m, where asked for
  kNumTileStats
};

// The widest stretch of a row that is mapped, and then summed, in one go.
constexpr int64_t kMaxTile = 4096;

// Log-odds are float32, or float64 for float64 rows.
struct LabelArgs {
  Rows rows;
  const int64_t* labels;  // (N,)
  int64_t ignore_index;
  void* log_odds;  // (N,)
  double* stats;   // (N, kNumStats)
};

struct LabelBackwardArgs {
  Rows rows;
  const int64_t* labels;
  int64_t ignore_index;
  const void* dlog_odds;  // (N,)
  const double* stats;    // as written by the forward
  void* dlogits;          // (N, V), contiguous, dtype of rows
};

struct CandidateArgs {
  Rows rows;
  int64_t k;
  const int64_t* index;  // (N, K)
  const uint8_t* mask;   // (N, K), or null: all
  void* log_odds;        // (N, K)
  double* stats;         // (N, kNumStats)
};

struct CandidateBackwardArgs {
  Rows rows;
  int64_t k;
  const int64_t* index;
  const uint8_t* mask;
  const void* dlog_odds;  // (N, K)
  const double* stats;
  void* dlogits;
};

// A tile: ids [first, first + V) of rows whose vocabulary is wider; V at most kMaxTile. A logit is
// cap * tanh(scale * (x + bias) / cap), without a cap where it is 0.
struct Tile {
  Rows rows;
  int64_t first, k;
  const int64_t* labels;  // (N, K), ids that are left out, each once; outside the tile: elsewhere
  const void* bias;       // (V,), the tile's; float32 or float64; or null
  double scale, cap;
};

struct TileArgs : Tile {
  bool moments;     // whether kOthersWeighted and kOthersSquared are made
  double* stats;    // (N, kNumTileStats), updated
  void* exps;       // (N, V), may be the tile: e^(z - m) dz/dx / scale, 0 at labels; or null
  double* shrinks;  // (N,), with exps: the factor of what was summed before
};

// dL/dz = e (a + b d + c e) with d = z - m, e = e^d.
struct TileBackwardArgs : Tile {
  bool moments;  // whether there are b and c
  const double* stats;
  const double* gains;  // (N, 3): a, b, c
  void* out;            // (N, V), dL/dx, 0 at labels; may be the tile itself
};

// Rows of a divergence between a student's and a teacher's logits. Python reads it from the module.
enum PairStat : int {
  kStudentMax = 0,  // the largest logit m
  kStudentSum,      // sum of e^(z - m)
  kTeacherMax,
  kTeacherSum,
  kDivergence,  // of kKl, kReverseKl: e^(z - m) of the expectation's law times the difference of
                // both z - m, summed; of kJsd the divergence
  kCentre,      // of the gradient: the mean, under the student, of what the divergence averages
  kNumPairStats
};

// Which divergence: KL(teacher | student), KL(student | teacher), the generalised Jensen-Shannon
// one: beta KL(teacher | m) + (1 - beta) KL(student | m), m = beta teacher + (1 - beta) student.
enum DivergenceKind : int { kKl = 0, kReverseKl, kJsd, kNumDivergences };

// A tile of two heads, V at most kMaxTile: logits are as those of a Tile.
struct PairTile {
  Rows rows;         // the student's products
  const void* bias;  // (V,), the tile's; float32 or float64; or null
  double scale, cap;
  const void* teacher;  // (N, V), its products, dtype of rows
  int64_t teacher_stride;
  const void* teacher_bias;
  double teacher_scale, teacher_cap;
  int64_t kind;   // a DivergenceKind
  double beta;    // of kJsd, in (0, 1)
  double* stats;  // (N, kNumPairStats); the gradient only reads them
};

struct PairSumArgs : PairTile {
  bool mixing;  // the second pass of kJsd, which needs both sums of whole rows
};

struct PairBackwardArgs : PairTile {
  const double* gains;  // (N,), the gradients of the divergences
  void* out;            // (N, V), dL/dx of the student's products x; may be these
};

// n vectors of h entries.
struct Vectors {
  DType dtype;
  int64_t n, h;
};

// K of each row, or in compressed rows: those of row r are [offsets[r], offsets[r + 1]) of a list.
struct Several : Vectors {
  int64_t k;
  const int64_t* offsets;  // (N + 1,); or null: K of each row
  int64_t begin(int64_t r) const { return offsets ? offsets[r] : r * k; }
};

// dst[r] = factor[r] dst[r] + sum over K of gain[r] src[index[r]], over H; dst float32 or float64,
// src of any type. A null factor or gain is 1.
struct MixArgs : Several {  // dtype: of src; dst is float64 if that is, else float32
  void* dst;
  const double* factor;  // (N,)
  const double* gain;    // (N, K)
  const int64_t* index;  // (N, K), or null: r, K = 1
  const void* src;
  int64_t src_stride;
};

// out[index[r]] = gain[r] src[r] over H, rounded once.
struct ScatterArgs : Vectors {  // dtype: of out; src is float64 if that is, else float32
  const void* src;
  const double* gain;    // or null: 1
  const int64_t* index;  // or null: r
  void* out;
};

// Dot products of each row with K rows of the head, in float32 (float64) sums.
struct DotArgs : Several {
  const void* a;
  int64_t a_stride;
  const void* b;
  int64_t b_stride;
  const int64_t* index;  // (N, K), rows of b, or null: r, K = 1
  double* out;           // (N, K)
};

// Of rows whose vocabulary is split over ranks: csrc/slice.h.
struct SliceTallyArgs;
struct SliceBestArgs;
struct SliceTopArgs;
struct SliceFindArgs;
struct SliceListArgs;
struct MassesArgs;
struct TargetsArgs;
struct LogsArgs;
struct ExpsArgs;

// One table per ISA. Each function handles rows [begin, end) and allocates nothing itself.
struct KernelTable {
  void (*filter)(const FilterArgs&, const Scratch&, int64_t begin, int64_t end);
  void (*sample)(const SampleArgs&, const Scratch&, int64_t begin, int64_t end);
  void (*verify)(const VerifyArgs&, const Scratch&, int64_t begin, int64_t end);
  void (*score)(const ScoreArgs&, const Scratch&, int64_t begin, int64_t end);
  void (*slice_tally)(const SliceTallyArgs&, const Scratch&, int64_t begin, int64_t end);
  void (*slice_best)(const SliceBestArgs&, const Scratch&, int64_t begin, int64_t end);
  void (*slice_top)(const SliceTopArgs&, const Scratch&, int64_t begin, int64_t end);
  void (*slice_find)(const SliceFindArgs&, const Scratch&, int64_t begin, int64_t end);
  void (*slice_list)(const SliceListArgs&, const Scratch&, int64_t begin, int64_t end);
  void (*masses)(const MassesArgs&, const Scratch&, int64_t begin, int64_t end);
  void (*targets)(const TargetsArgs&, const Scratch&, int64_t begin, int64_t end);
  void (*logs)(const LogsArgs&, const Scratch&, int64_t begin, int64_t end);
  void (*exps)(const ExpsArgs&, const Scratch&, int64_t begin, int64_t end);
  void (*log_odds)(const LogOddsArgs&, const Scratch&, int64_t begin, int64_t end);
  void (*log_odds_backward)(const LogOddsBackwardArgs&, const Scratch&, int64_t begin, int64_t end);
  void (*label_log_odds)(const LabelArgs&, const Scratch&, int64_t begin, int64_t end);
  void (*label_log_odds_backward)(const LabelBackwardArgs&, const Scratch&, int64_t, int64_t);
  void (*candidate_log_odds)(const CandidateArgs&, const Scratch&, int64_t begin, int64_t end);
  void (*candidate_log_odds_backward)(const CandidateBackwardArgs&, const Scratch&, int64_t,
                                      int64_t);
  void (*tile)(const TileArgs&, const Scratch&, int64_t begin, int64_t end);
  void (*tile_backward)(const TileBackwardArgs&, const Scratch&, int64_t begin, int64_t end);
  void (*pair_sum)(const PairSumArgs&, const Scratch&, int64_t begin, int64_t end);
  void (*pair_backward)(const PairBackwardArgs&, const Scratch&, int64_t begin, int64_t end);
  void (*mix)(const MixArgs&, const Scratch&, int64_t begin, int64_t end);
  void (*scatter)(const ScatterArgs&, const Scratch&, int64_t begin, int64_t end);
  void (*dot)(const DotArgs&, const Scratch&, int64_t begin, int64_t end);
};

// The table in use, and its name: the best this processor has, or the one set for a test.
const KernelTable& kernels();
const char* cpu_capability();

// Null-terminated names of the tables that this processor can run, worst first.
const char* const* cpu_capabilities();

// Chooses a table by name; false if the name is unknown or not supported here.
bool set_cpu_capability(const char* name);

}  // namespace fastadapt
