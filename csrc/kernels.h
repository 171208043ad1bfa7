// What every instruction set implements, in plain types: the bindings see this table and nothing of the vectors.
#pragma once

#include <cstdint>

namespace hdrq {

enum class Float { f32, bf16, f16 };  // the order of hdrq.backends.native.FLOATS
enum class Rounding { quotient, reciprocal, shifted };  // the order of hdrq.backends.native.fakequant.ROUNDINGS
enum class Gradient { round_first, clamp_first, pass_through };  // of GRADIENTS there
enum class Code { i8, i16, i4, u4 };  // the order of hdrq.backends.native.CODES; the last two packed two to a byte

// One scale (and zero point) for all elements, or the channel (e / inner) % channels for element e.
struct Grid {
  const float* scale;
  const float* zero_point;  // null: 0
  int64_t channels, inner;
  float qmin, qmax;
};

struct Stream {
  uint64_t seed;
  uint32_t stream, step;
};

// The empirical noise's bins, as words: bin b takes the words above last[b], up to last[b + 1].
struct Histogram {
  static constexpr int kBins = 256;
  static constexpr int kCellBits = 20;  // a cell is a run of 2^20 words
  static constexpr uint32_t kCell = 1u << kCellBits;
  bool empty = false;
  uint32_t last[kBins + 1];  // the largest word below bin b; bin 0 is never asked for
  // Of each cell: the bin of its first word; from bit 8 on, the place in it where the next bin begins, kCell if
  // nowhere; in bit 31, whether more than one begins in it.
  uint32_t guide[1u << (32 - kCellBits)];
};

// One tensor to quantize in a step of a reconstruction, and all that decides its values and its gradients.
struct Quantizer {
  static constexpr uint32_t kAlways = 1u << 16;
  int64_t count;  // elements
  const void* x;
  Grid grid;
  bool noise;  // in place of rounding
  Stream stream;
  const Histogram* histogram;  // of the noise; null: uniform
  uint32_t threshold;          // an element is quantized where its coin of 16 bits is below
  const void* source;          // what its distance is measured from; null: nothing
  Rounding rounding;           // without noise
  Gradient gradient;
  // Forward.
  void* y;
  double* squared_distance;
  // Backward.
  const void* grad;
  void* grad_x;
  double* grad_s;
  double* grad_z;  // null: it does not learn
  float pull;  // factor on x − source in the gradient of x
};

// K tensors of codes to average.
struct Merge {
  enum class Noise { all, odd, none };
  int models;
  const Code* types;
  const void* const* codes;
  const float* const* scales;
  const float* const* zero_points;
  const float* weights;
  const float* merged_scale;
  const float* merged_zero;
  int64_t channels, inner;
  float qmin, qmax;
  Stream stream;
  Noise noise;
  bool fast;

  Grid grid(int model) const { return {scales[model], zero_points[model], channels, inner, qmin, qmax}; }
  Grid merged_grid() const { return {merged_scale, merged_zero, channels, inner, qmin, qmax}; }
};

// Candidates for the scale of each of `rows` rows of `length` elements.
struct RangeSearch {
  int64_t rows, length, candidates;
  const float* weights;                // (rows, length); null: 1
  const float *scale, *low, *high;     // (rows, candidates)
  const float* unit;                   // (rows,), of the errors
  float norm;
};

// Tables of `bins` bins over the values of rows.
struct RangeTable {
  int64_t rows, length, bins;
  const float *origin, *factor;  // (rows,): a value's position is (x/2 − origin)·factor, in [0, 2^24)
};

struct Job {
  int64_t count;  // elements
  int threads;
};

struct Kernels {
  const char* name;
  void (*quantizer_forward)(int threads, Float, const Quantizer*, int count);
  void (*quantizer_backward)(int threads, Float, const Quantizer*, int count);
  void (*error_histogram)(Job, Float, const void* x, int64_t* counts, Grid);
  int64_t (*quantize)(Job, Float, const void* x, Code, void* codes, Grid);
  void (*dequantize)(Job, Code, const void* codes, float* y, Grid);
  void (*drop_mix)(Job, Float, const void* a, const void* b, void* y, uint32_t threshold, Stream);
  void (*drop_mix_backward)(Job, Float, const void* grad, void* grad_a, void* grad_b, uint32_t threshold, Stream);
  double (*squared_distance)(Job, Float, const void* w, const void* w_src);
  void (*scaled_difference)(Job, Float, const void* w, const void* w_src, void* y, float factor);
  double (*adaround)(Job, Float, const void* x, const float* alpha, void* y, Grid, const float* beta, bool hard);
  void (*adaround_backward)(Job, Float, const void* grad, float grad_penalty, const void* x, const float* alpha,
                            float* grad_alpha, Grid, const float* beta);
  void (*range_errors)(int threads, Float, const void* x, const RangeSearch&, double* errors);
  void (*range_table)(int threads, Float, const void* x, const RangeTable&, int64_t* table);
  void (*merge_score)(Job, const Merge&, int draws, double* sums);
  void (*merge_codes)(Job, const Merge&, int draw, Code, void* codes);
  void (*merge_systematic)(Job, const Merge&, float tau, Code, void* codes);
};

const Kernels& portable_kernels();
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HDRQ_X86 1
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

}  // namespace hdrq
