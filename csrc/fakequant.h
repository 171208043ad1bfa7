// Family `fakequant`: fake-quantize, integer codes and back. Definition: hdrq/backends/reference/fakequant.py.
#pragma once

#include "grid.h"
#include "packing.h"

namespace hdrq::HDRQ_ISA {

// v = x/s and round(v) + z, before the clamp.
struct Rounded {
  vf v, shifted;
  Rounded(vf x, vf s, vf z) : v(x / s), shifted(round_even(v) + z) {}
};

// The quantizer that rounds, for quantizer.h.
class NearestRounding {
 public:
  explicit NearestRounding(const Quantizer& q) : q_(q), chunk_(q.grid) {}

  void seek(int64_t begin, int64_t n) { chunk_.seek(begin, n); }

  HDRQ_INLINE vf forward(vf x, int64_t i) const {
    const vf s = chunk_.scale(i), z = chunk_.zero(i);
    return (clamp(Rounded(x, s, z).shifted, q_.grid.qmin, q_.grid.qmax) - z) * s;
  }

  HDRQ_INLINE Slopes backward(vf x, int64_t i) const {
    const vf z = chunk_.zero(i);
    const Rounded r(x, chunk_.scale(i), z);
    const vi inside = (r.shifted >= q_.grid.qmin) & (r.shifted <= q_.grid.qmax);
    return {inside, clamp(r.shifted, q_.grid.qmin, q_.grid.qmax) - z - (inside ? r.v : vf{})};
  }

 private:
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
