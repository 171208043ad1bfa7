// Family `fakequant`: fake-quantize, integer codes and back. Definition: hdrq/reference/fakequant.py.
#pragma once

#include "grid.h"

namespace hdrq::HDRQ_ISA {

// v = x/s and round(v) + z, before the clamp.
struct Rounded {
  vf v, shifted;
  Rounded(vf x, vf s, vf z) : v(x / s), shifted(round_even(v) + z) {}
};

template <class T>
void fake_quantize(Job job, const typename T::type* x, typename T::type* y, const Grid& grid) {
  for_tiles(job, [&](int64_t, int64_t tile_begin, int64_t tile_end) {
    ChunkGrid chunk(grid);
    for_chunks(tile_begin, tile_end, [&](int64_t begin, int64_t n) {
      chunk.seek(begin, n);
      for_vectors(n, [&](int64_t i, auto count) {
        const vf s = chunk.scale(i), z = chunk.zero(i);
        const Rounded r(T::load(x + begin + i, count), s, z);
        T::store((clamp(r.shifted, grid.qmin, grid.qmax) - z) * s, y + begin + i, count);
      });
    });
  });
}

template <class T>
void fake_quantize_backward(Job job, const typename T::type* grad, const typename T::type* x,
                            typename T::type* grad_x, double* grad_s, const Grid& grid) {
  ChannelSums sums(grid, job.count);
  for_tiles(job, [&](int64_t tile, int64_t tile_begin, int64_t tile_end) {
    ChunkGrid chunk(grid);
    alignas(HDRQ_VECTOR_BYTES) float terms[kChunk];
    for_chunks(tile_begin, tile_end, [&](int64_t begin, int64_t n) {
      chunk.seek(begin, n);
      for_vectors(n, [&](int64_t i, auto count) {
        const vf z = chunk.zero(i), g = T::load(grad + begin + i, count);
        const Rounded r(T::load(x + begin + i, count), chunk.scale(i), z);
        const auto inside = (r.shifted >= grid.qmin) & (r.shifted <= grid.qmax);
        const vf slope = clamp(r.shifted, grid.qmin, grid.qmax) - z - (inside ? r.v : vf{});
        write(g * slope, terms + i, kLanes);
        T::store(inside ? g : vf{}, grad_x + begin + i, count);
      });
      sums.add(tile, begin, n, terms);
    });
  });
  sums.total(grad_s);
}

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
        const vf value = __builtin_convertvector(read<V>(q + begin + i, count), vf);
        F32::store((value - chunk.zero(i)) * chunk.scale(i), y + begin + i, count);
      });
    });
  });
}

}  // namespace hdrq::HDRQ_ISA
