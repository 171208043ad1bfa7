// Family `fakequant`: fake-quantize, integer codes and back. Definition: hdrq/backends/reference/fakequant.py.
#pragma once

#include "grid.h"
#include "packing.h"

namespace hdrq::HDRQ_ISA {

// v = x/s, and the rounded integer before the clamp.
struct Rounded {
  vf v, shifted;
  HDRQ_INLINE Rounded(vf x, vf s, vf z, Rounding rounding = Rounding::quotient) {
    v = rounding == Rounding::reciprocal ? x * (1.0f / s) : x / s;
    shifted = rounding == Rounding::shifted ? round_even(v + z) + 0.0f : round_even(v) + z;
  }
};

// The quantizer that rounds, for quantizer.h. A plain one has the default rounding and gradient, which the compiler
// knows; another looks up its own for each vector.
template <bool kPlain>
class NearestRounding {
 public:
  explicit NearestRounding(const Quantizer& q) : q_(q), chunk_(q.grid) {}

  void seek(int64_t begin, int64_t n) { chunk_.seek(begin, n); }

  HDRQ_INLINE vf forward(vf x, int64_t i) const {
    const vf s = chunk_.scale(i), z = chunk_.zero(i);
    return (clamp(Rounded(x, s, z, rounding()).shifted, q_.grid.qmin, q_.grid.qmax) - z) * s;
  }

  HDRQ_INLINE Slopes backward(vf x, int64_t i) const {
    const vf s = chunk_.scale(i), z = chunk_.zero(i);
    const Rounded r(x, s, z, rounding());
    const vf bounded = gradient() == Gradient::clamp_first ? r.v + z : r.shifted;
    vi inside = (bounded >= q_.grid.qmin) & (bounded <= q_.grid.qmax);
    if (gradient() == Gradient::pass_through) inside = ~vi{};
    const vf slope = clamp(r.shifted, q_.grid.qmin, q_.grid.qmax) - z - (inside ? r.v : vf{});
    return {inside, slope, inside ? vf{} : -s};
  }

 private:
  Rounding rounding() const { return kPlain ? Rounding::quotient : q_.rounding; }
  Gradient gradient() const { return kPlain ? Gradient::round_first : q_.gradient; }

  const Quantizer& q_;
  ChunkGrid chunk_;
};

// Returns how many elements were NaN; their code is qmin.
template <class T, class V>
int64_t quantize(Job job, const typename T::type* x, V*, void* codes, const Grid& grid) {
  using Lane = lane_of<V>;
  Lane* out = static_cast<Lane*>(codes);
  Buffer<int64_t> nan(tiles(job.count));
  for_tiles(job, [&](int64_t tile, int64_t tile_begin, int64_t tile_end) {
    ChunkGrid chunk(grid);
    for_chunks(tile_begin, tile_end, [&](int64_t begin, int64_t n) {
      chunk.seek(begin, n);
      vi wrong{};
      for_vectors(n, [&](int64_t i, auto count) {
        vf x_i = T::load(x + begin + i, count);
        const vf q = clamp(Rounded(x_i, chunk.scale(i), chunk.zero(i)).shifted, grid.qmin, grid.qmax);
        wrong += count == kLanes ? bits<vi>(q != q) : vi{};
        for (int lane = 0; count < kLanes && lane < count; ++lane) nan[tile] += q[lane] != q[lane];
        write(__builtin_convertvector(__builtin_convertvector(q == q ? q : splat(grid.qmin), vi), V), out + begin + i,
              count);
      });
      for (int lane = 0; lane < kLanes; ++lane) nan[tile] -= wrong[lane];  // a true lane is −1
    });
  });
  int64_t total = 0;
  for (int64_t tile = 0; tile < nan.size(); ++tile) total += nan[tile];
  return total;
}

template <class V>
void dequantize(Job job, V*, const void* codes, float* y, const Grid& grid) {
  using Lane = lane_of<V>;
  const Lane* q = static_cast<const Lane*>(codes);
  for_tiles(job, [&](int64_t, int64_t tile_begin, int64_t tile_end) {
    ChunkGrid chunk(grid);
    for_chunks(tile_begin, tile_end, [&](int64_t begin, int64_t n) {
      chunk.seek(begin, n);
      for_vectors(n, [&](int64_t i, auto count) {
        const vf value = as_float(read<V>(q + begin + i, count));
        F32::store((value - chunk.zero(i)) * chunk.scale(i), y + begin + i, count);
      });
    });
  });
}

}  // namespace hdrq::HDRQ_ISA
