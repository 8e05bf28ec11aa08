// What the primitives are told: plain data, the same for every device. Strides count elements, not
// bytes. Validation has happened in Python; kernels return a Status and never throw or exit.
#pragma once

#include <stdint.h>

namespace bgk {

enum DType : int32_t { kF32 = 0, kBF16 = 1, kF16 = 2 };
enum LabelRule : int32_t { kIndex = 0, kArgmax = 1, kSample = 2 };
// kCudaFailed is added to a cudaError_t.
enum Status : int32_t { kOk = 0, kUnknownDType = 1, kUnknownRule = 2, kCudaFailed = 1000 };

// Label codes: not known before the pass, and a row that takes no part.
constexpr int64_t kNone = -1, kSkip = -2;
constexpr int kFloatColumns = 14, kFields = 16, kCoefficients = 13;  // without the extras'
constexpr int kMaxExtras = 8;

// An extra statistic of bgkernels.rows.extras: which struct of math/extras.h, and its parameters.
struct Extra {
  int32_t kind;
  bool moments;
  double a, b;
};

// bgkernels.rows.spec.RowSpec, as far as kernels need it.
struct Spec {
  int64_t columns;   // of the whole student vocabulary
  int64_t compared;  // leading columns of it on which the models are compared
  double temperature, inverse;
  float inverse_temperature;
  bool shared_softmax;  // the cross-entropy's softmax is the compared one: m_c, d_c stay empty
  bool logit_sum;
  LabelRule rule;
  uint32_t key;  // of the sampler
  int32_t extra_count;
  Extra extras[kMaxExtras];
};

// A block of raw head outputs; real logits are cap·tanh(scale·x / cap), or scale·x where cap is 0.
struct Logits {
  void* data;          // (rows, columns), inner stride 1; may be null: no such model
  int64_t row_stride;  // of data
  int64_t columns;
  DType dtype;
  float scale, cap;
};

// A matrix of one number a row in each of its rows: statistics, derivatives, coefficients.
template <class T>
struct Matrix {
  T* data;  // (names, rows), inner stride 1
  int64_t stride;
};

// Least number of compared columns that share centres.
constexpr int64_t kCodeBlock = 256;
// Columns of a row after which another call of a CPU's primitive may go on, wherever it runs.
constexpr int64_t kSpan = 1024;

// bgkernels.backends.code.Code: where the first read of pass 1 writes a tile, and all others find
// it; without words, there is none.
struct Code {
  Matrix<uint32_t> words;  // (rows, columns)
  Matrix<float> centres;   // (rows, two a block of kCodeBlock columns)
};

struct Tile {
  Logits student;
  Logits teacher;  // its columns are the student's leading ones
  int64_t rows;
  int64_t first_row, first_column;  // of the tile, in the whole input
  Code code;
};

struct State {
  Matrix<float> floats;  // bgkernels.rows.state.FLOATS, then each extra's sums
  Matrix<int64_t> ints;  // bgkernels.rows.state.INTS
};

struct AbsorbArgs {
  Spec spec;
  Tile tile;
  State state;
  const int64_t* labels;  // (rows): a column, kNone or kSkip
};

// The second read: adds to the sums of the extras that need both normalisers.
struct PairArgs {
  Spec spec;
  Tile tile;
  Matrix<float> floats;   // as State::floats; those sums are added to
  const int64_t* labels;  // (rows): as in AbsorbArgs
  const double* lse_s;    // (rows)
  const double* lse_t;    // (rows)
};

struct FinalizeArgs {
  Spec spec;
  int64_t rows;
  State state;
  const int64_t* labels;  // (rows): as in AbsorbArgs
  Matrix<double> out;     // bgkernels.rows.stats, then each extra's fields
};

struct FoldArgs {
  Spec spec;
  int64_t rows;
  Matrix<const double> statistics, grads;  // as FinalizeArgs::out
  Matrix<double> out;                      // bgkernels.rows.vjp.COEFFICIENTS, then the extras'
};

struct VjpArgs {
  Spec spec;
  Tile tile;
  Logits out;                    // (rows, student columns); may be the student's own memory
  Matrix<const double> factors;  // as FoldArgs::out
  const int64_t* labels;         // (rows): a column or kSkip
};

// A gradient that is multiplied in place by a number in the device's memory.
struct ScaleArgs {
  void* data;  // 16-byte aligned
  int64_t count;
  DType dtype;
  const void* factor;  // a double where `wide`, else a float
  bool wide;
};

// The primitives of one instruction set; each returns kOk.
struct Kernels {
  const char* name;
  int extra_kinds;
  int (*absorb)(const AbsorbArgs&, int threads);
  int (*absorb_pairs)(const PairArgs&, int threads);
  int (*finalize)(const FinalizeArgs&, int threads);
  int (*fold)(const FoldArgs&, int threads);
  int (*vjp)(const VjpArgs&, int threads);
};

}  // namespace bgk
