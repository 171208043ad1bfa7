// Family `rounding`: AdaRound. Definition: hdrq/backends/reference/rounding.py.
#pragma once

#include "elementary.h"
#include "grid.h"

namespace hdrq::HDRQ_ISA {

// h and its slope.
struct Soft {
  vf h, slope;
  explicit Soft(vf alpha) {
    const vf sigma = sigmoid(alpha), u = 1.2f * sigma + -0.1f;
    h = clamp(u, 0.0f, 1.0f);
    slope = (u >= 0.0f) & (u <= 1.0f) ? 1.2f * sigma * (1.0f - sigma) : vf{};
  }
};

inline vf magnitude(vf v) { return bits<vf>(bits<vu>(v) & 0x7fffffffu); }

// Where an h is neither 0 nor 1, or NaN: elsewhere it adds nothing to the penalty, and late in a reconstruction it is
// everywhere one of them.
inline vi soft(vf h) { return ~((h <= 0.0f) | (h >= 1.0f)); }

// Returns the penalty; 0 where beta is none.
template <class T>
double adaround(Job job, const typename T::type* x, const float* alpha, typename T::type* y, const Grid& grid,
                const float* beta, bool hard) {
  Buffer<double> partial(tiles(job.count));
  for_tiles(job, [&](int64_t tile, int64_t tile_begin, int64_t tile_end) {
    ChunkGrid chunk(grid);
    Sum penalty;
    for_chunks(tile_begin, tile_end, [&](int64_t begin, int64_t n) {
      chunk.seek(begin, n);
      for_vectors(n, [&](int64_t i, auto count) {
        const vf s = chunk.scale(i), a = F32::load(alpha + begin + i, count);
        const vf h = hard ? (a >= 0.0f ? splat(1.0f) : vf{}) : Soft(a).h;
        const vf z = chunk.zero(i);
        const vf q = clamp(floor(T::load(x + begin + i, count) / s) + h + z, grid.qmin, grid.qmax);
        T::store((q - z) * s, y + begin + i, count);
        if (beta && any(soft(h))) penalty.add(only(1.0f - power(magnitude(2.0f * h - 1.0f), *beta), count));
      });
    });
    partial[tile] = penalty.total();
  });
  double sum = 0;
  for (int64_t tile = 0; tile < partial.size(); ++tile) sum += partial[tile];
  return sum;
}

template <class T>
void adaround_backward(Job job, const typename T::type* grad, float grad_penalty, const typename T::type* x,
                       const float* alpha, float* grad_alpha, const Grid& grid, const float* beta) {
  const float factor = beta ? -2.0f * *beta * grad_penalty : 0.0f;
  for_tiles(job, [&](int64_t, int64_t tile_begin, int64_t tile_end) {
    ChunkGrid chunk(grid);
    for_chunks(tile_begin, tile_end, [&](int64_t begin, int64_t n) {
      chunk.seek(begin, n);
      for_vectors(n, [&](int64_t i, auto count) {
        const vf s = chunk.scale(i);
        const Soft learned(F32::load(alpha + begin + i, count));
        const vf q = floor(T::load(x + begin + i, count) / s) + learned.h + chunk.zero(i);
        vf total = (q >= grid.qmin) & (q <= grid.qmax) ? T::load(grad + begin + i, count) * s : vf{};
        if (beta && any(soft(learned.h))) {
          const vf t = 2.0f * learned.h - 1.0f, pull = factor * power(magnitude(t), *beta - 1.0f);
          total += t > 0.0f ? pull : t < 0.0f ? -pull : t * 0.0f;
        }
        F32::store(learned.slope == 0.0f ? vf{} : total * learned.slope, grad_alpha + begin + i, count);
      });
    });
  });
}

}  // namespace hdrq::HDRQ_ISA
