// The scale of each element: one for a whole chunk where it can be, else one per element; and sums per channel.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace hdrq::HDRQ_ISA {

// Whether a run of n elements, the first of which is `begin`, has one channel alone.
inline bool one_channel(const Grid& grid, int64_t begin, int64_t n) {
  return grid.channels == 1 || (begin + n - 1) / grid.inner == begin / grid.inner;
}

// Scale and zero point of one chunk as vectors.
class ChunkGrid {
 public:
  ChunkGrid() = default;
  explicit ChunkGrid(const Grid& grid) : grid_(grid) {}

  void seek(int64_t begin, int64_t n) {
    const int64_t row = grid_.channels == 1 ? 0 : begin / grid_.inner;
    constant_ = one_channel(grid_, begin, n);
    if (constant_) {
      const int64_t channel = row % grid_.channels;
      scale_ = splat(grid_.scale[channel]);
      zero_ = splat(grid_.zero_point ? grid_.zero_point[channel] : 0.0f);
      return;
    }
    for (int64_t i = 0, r = row; i < n; ++r) {
      const int64_t stop = min(n, (r + 1) * grid_.inner - begin), channel = r % grid_.channels;
      fill(scales_ + i, stop - i, grid_.scale[channel]);
      fill(zeros_ + i, stop - i, grid_.zero_point ? grid_.zero_point[channel] : 0.0f);
      i = stop;
    }
  }

  bool constant() const { return constant_; }
  vf scale(int64_t i) const { return constant_ ? scale_ : read<vf>(scales_ + i, kLanes); }
  vf zero(int64_t i) const { return constant_ ? zero_ : read<vf>(zeros_ + i, kLanes); }

 private:
  Grid grid_{};
  bool constant_ = true;
  vf scale_{}, zero_{};
  alignas(HDRQ_VECTOR_BYTES) float scales_[kChunk]{}, zeros_[kChunk]{};
};

// What a gradient needs of a quantizer at some elements: where it passes to x, and the slopes in the scale and in the
// zero point.
struct Slopes {
  vi inside;
  vf scale;
  vf zero{};
};

// Sums of products over the elements of each channel, in float64, in which a product of two float32 is exact. A tile
// keeps its own sums; rows are consecutive inside it, so few slots suffice.
class ChannelSums {
 public:
  ChannelSums() = default;
  ChannelSums(const Grid& grid, int64_t count)
      : grid_(grid),
        tiles_(tiles(count)),
        slots_(grid.channels <= 1 ? 1 : min(grid.channels, kTile / (grid.inner < 1 ? 1 : grid.inner) + 2)) {}

  // How many numbers it works in, which must be 0 at the start.
  int64_t size() const { return tiles_ * slots_; }
  void use(double* zeros) { partial_ = zeros; }

  // What a chunk of one channel that begins at element `begin` of tile `tile` adds.
  void add(int64_t tile, int64_t begin, double sum) const {
    partial_[tile * slots_ + (grid_.channels == 1 ? 0 : slot(tile, begin / grid_.inner))] += sum;
  }

  // The factors of the products of a chunk of any channels.
  void add(int64_t tile, int64_t begin, int64_t n, const float* a, const float* b) const {
    for (int64_t i = 0, r = begin / grid_.inner; i < n; ++r) {
      const int64_t stop = min(n, (r + 1) * grid_.inner - begin);
      partial_[tile * slots_ + slot(tile, r)] += sum(a + i, b + i, stop - i);
      i = stop;
    }
  }

  void total(double* sums) const {
    fill(sums, grid_.channels, 0.0);
    for (int64_t tile = 0; tile < tiles_; ++tile) {
      const int64_t first = grid_.channels == 1 ? 0 : tile * kTile / grid_.inner;
      for (int64_t s = 0; s < slots_; ++s) sums[(first + s) % grid_.channels] += partial_[tile * slots_ + s];
    }
  }

 private:
  // A row's slot. Where every channel has its own, rows share them in turn; else a tile has fewer rows than slots.
  int64_t slot(int64_t tile, int64_t row) const {
    const int64_t own = row - tile * kTile / grid_.inner;
    return slots_ == grid_.channels ? own % slots_ : own;
  }

  static double sum(const float* a, const float* b, int64_t n) {
    Sum total;
    for_vectors(n, [&](int64_t i, auto count) { total.add_product(read<vf>(a + i, count), read<vf>(b + i, count)); });
    return total.total();
  }

  Grid grid_{};
  int64_t tiles_ = 0, slots_ = 0;
  double* partial_ = nullptr;
};

}  // namespace hdrq::HDRQ_ISA
