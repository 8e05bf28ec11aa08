// What the primitives are told: plain data, the same for every device. Strides count elements, not
// bytes. Validation has happened in Python; kernels return a Status and never throw or exit.
#pragma once

#include <stdint.h>

namespace bgk {

enum DType : int32_t { kF32 = 0, kBF16 = 1, kF16 = 2 };
enum LabelRule : int32_t { kIndex = 0, kArgmax = 1, kSample = 2 };
// kCudaFailed is added to a cudaError_t.
enum Status : int32_t {
  kOk = 0,
  kUnknownDType = 1,
  kUnknownRule = 2,
  kTooManyTilts = 3,
  kTooManyMixtures = 4,
  kNotComposed = 5,  // these rows take separate passes: cuda/launch.h says why
  kCudaFailed = 1000
};

// Label codes: not known before the pass, and a row that takes no part.
constexpr int64_t kNone = -1, kSkip = -2;
constexpr int kFloatColumns = 14, kTiltColumns = 4, kCoefficients = 13, kMaxTilts = 8;
constexpr int kMaxMixtures = 8;  // on GPUs

struct Tilt {
  double a, b;
  bool moments;
};

// bgkernels.rows.spec.RowSpec, as far as kernels need it.
struct Spec {
  int64_t compared;  // columns of the whole vocabulary on which the models are compared
  float inverse_temperature;
  bool shared_softmax;  // the cross-entropy's softmax is the compared one: m_c, d_c stay empty
  bool logit_sum;
  LabelRule rule;
  uint32_t key;         // of the sampler
  const Tilt* tilts;    // (tilt_count), may be null
  const float* omegas;  // (mixture_count), may be null
  int32_t tilt_count, mixture_count;
  bool total_variation;
};

// A block of raw head outputs; real logits are cap·tanh(scale·x / cap), or scale·x where cap is 0.
struct Logits {
  void* data;          // (rows, columns), inner stride 1; may be null: no such model
  int64_t row_stride;  // of data
  int64_t columns;
  DType dtype;
  float scale, cap;
};

struct Tile {
  Logits student;
  Logits teacher;  // its columns are the student's leading ones
  int64_t rows;
  int64_t first_row, first_column;  // of the tile, in the whole input
};

struct AbsorbArgs {
  Spec spec;
  Tile tile;
  float* floats;          // (14 + 4·tilts, rows), bgkernels.rows.state.FLOATS
  int64_t floats_stride;  // between columns of the state
  int64_t* ints;          // (3, rows), bgkernels.rows.state.INTS
  int64_t ints_stride;
  const int64_t* labels;  // (rows): a column, kNone or kSkip
  int threads;
};

struct PairArgs {
  Spec spec;
  Tile tile;
  float* sums;  // (3·mixtures + 2·total_variation, rows), added to
  int64_t sums_stride;
  const double* lse_s;  // (rows)
  const double* lse_t;  // (rows)
  int threads;
};

struct VjpArgs {
  Spec spec;
  Tile tile;
  Logits out;             // (rows, student columns); may be the student's own memory
  const double* row;      // (13, rows), bgkernels.rows.vjp.COEFFICIENTS
  const double* tilts;    // (4·tilts, rows): lse, P0, P1, P2; may be null
  const double* pairs;    // (3·mixtures + 2·total_variation, rows); may be null
  const int64_t* labels;  // (rows): a column or kSkip
  int threads;
};

// How the two labels are weighed: constants, or a function of the teacher's distribution.
enum Policy : int32_t {
  kConstant = 0,
  kLabelConfidence = 1,
  kMaxConfidence = 2,
  kPowerEntropy = 3,  // its exponent is that of the only tilt
  kShannonEntropy = 4,
  kThreshold = 5
};

// bgkernels.rows.spec.ClosedForm: hard·CE + soft·T²·D + z_loss·lse², where D is
// kl_ts·KL(t ‖ s) + kl_st·KL(s ‖ t) + kl_tm·KL(t ‖ m) + kl_sm·KL(s ‖ m) + variation·TV.
struct Objective {
  double kl_ts, kl_st, kl_tm, kl_sm, variation;
  Policy policy;
  double hard, soft;      // of kConstant
  double tau, sharpness;  // of kThreshold
  bool reversed;          // the two weights swapped
  double label_smoothing, z_loss;
};

// Both passes over whole rows; state and sums are written, not read.
struct ComposedArgs : AbsorbArgs {
  Logits out;
  Objective objective;
  float* sums;  // as in PairArgs
  int64_t sums_stride;
  const double* scale;  // (rows): factor of a row's loss
  double* losses;       // (rows)
};

// The primitives of one device or instruction set.
struct Kernels {
  const char* name;
  void (*absorb)(const AbsorbArgs&);
  void (*absorb_pairs)(const PairArgs&);
  void (*vjp)(const VjpArgs&);
};

}  // namespace bgk
