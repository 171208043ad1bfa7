// Family `noise`: noise in place of rounding. Definition: hdrq/backends/reference/noise.py.
#pragma once

#include "grid.h"
#include "philox.h"

namespace hdrq::HDRQ_ISA {

// The noise of a chunk: n = m·2^-24 − 0.5, from one 24-bit integer m per element, the upper bits of a word.
class ChunkNoise {
 public:
  ChunkNoise(Stream stream, const Histogram* histogram) : philox_(stream), histogram_(histogram) {}

  void seek(int64_t begin, int64_t n) {
    philox_.fill(words_, begin, n);
    if (!histogram_) return;
    if (histogram_->empty) {
      fill(words_, n, 1u << 31);  // n = 0
    } else {
      const Histogram& h = *histogram_;
      for_vectors(n, [&](int64_t i, auto count) {
        const vu word = read<vu>(words_ + i, kLanes), of = gather(h.guide, word >> Histogram::kCellBits);
        const vu next = (of >> 8) & (2 * Histogram::kCell - 1);
        vu bin = (of & 0xff) + ((word & (Histogram::kCell - 1)) >= next ? vu{} + 1 : vu{});
        if (any(bits<vi>(of) < 0))  // rare: a bin narrower than a cell
          for (int lane = 0; lane < count; ++lane)
            while (word[lane] > h.last[bin[lane] + 1]) ++bin[lane];  // ends: no word is above the last
        write((bin << 24) | ((word & 0xffff) << 8), words_ + i, kLanes);
      });
    }
  }

  // With its top bit turned, a word is the integer 2^32·n: 24 bits and a sign, which a float32 holds.
  vf at(int64_t i) const {
    const vu turned = (read<vu>(words_ + i, kLanes) & 0xffffff00u) ^ 0x80000000u;
    return __builtin_convertvector(bits<vi>(turned), vf) * 0x1p-32f;
  }

 private:
  Philox philox_;
  const Histogram* histogram_;
  alignas(HDRQ_VECTOR_BYTES) uint32_t words_[kChunk];
};

// The quantizer that adds noise, for quantizer.h.
class NoiseRounding {
 public:
  explicit NoiseRounding(const Quantizer& q) : q_(q), chunk_(q.grid), noise_(q.stream, q.histogram) {}

  void seek(int64_t begin, int64_t n) {
    chunk_.seek(begin, n);
    noise_.seek(begin, n);
  }

  HDRQ_INLINE vf forward(vf x, int64_t i) const {
    const vf s = chunk_.scale(i), above = s * q_.grid.qmax, below = s * q_.grid.qmin;
    vf y = x + noise_.at(i) * s;
    y = x >= above ? above : y;
    return x <= below ? below : y;
  }

  HDRQ_INLINE Slopes backward(vf x, int64_t i) const {
    const vf s = chunk_.scale(i), above = s * q_.grid.qmax, below = s * q_.grid.qmin;
    const vi inside = (x < above) & (x > below);
    vf slope = inside ? noise_.at(i) : vf{};
    slope = x >= above ? splat(q_.grid.qmax) : slope;
    return {inside, x <= below ? splat(q_.grid.qmin) : slope};
  }

 private:
  const Quantizer& q_;
  ChunkGrid chunk_;
  ChunkNoise noise_;
};

// Counts, cumulative: counts[0] = 0, counts[256] = N.
template <class T>
void error_histogram(Job job, const typename T::type* x, int64_t* counts, const Grid& grid) {
  constexpr int kBins = Histogram::kBins;
  Buffer<uint32_t> all(tiles(job.count) * kBins);
  for_tiles(job, [&](int64_t tile, int64_t tile_begin, int64_t tile_end) {
    ChunkGrid chunk(grid);
    alignas(HDRQ_VECTOR_BYTES) int32_t bin[kChunk];
    // Four tables, since neighbouring elements often share a bin; the last bin takes what is clipped.
    uint32_t own[4][kBins + 1] = {};
    for_chunks(tile_begin, tile_end, [&](int64_t begin, int64_t n) {
      chunk.seek(begin, n);
      for_vectors(n, [&](int64_t i, auto count) {
        const vf s = chunk.scale(i), x_i = T::load(x + begin + i, count);
        const auto inside = (x_i < s * grid.qmax) & (x_i > s * grid.qmin);
        const vf v = x_i / s, r = round_even(v) - v;
        const vf position = inside ? clamp((r + 0.5f) * float(kBins), 0.0f, float(kBins - 1)) : splat(kBins);
        write(__builtin_convertvector(position, vi), bin + i, kLanes);
      });
      for (int64_t i = 0; i < n; ++i) ++own[i & 3][bin[i]];
    });
    for (int b = 0; b < kBins; ++b) all[tile * kBins + b] = own[0][b] + own[1][b] + own[2][b] + own[3][b];
  });
  fill<int64_t>(counts, kBins + 1, 0);
  for (int64_t i = 0; i < all.size(); ++i) counts[i % kBins + 1] += all[i];
  for (int b = 0; b < kBins; ++b) counts[b + 1] += counts[b];
}

}  // namespace hdrq::HDRQ_ISA
