// The passes of a reconstruction's step: quantize tensors, forward and backward, with everything that is fused into it:
// noise or rounding, elements left as they are (QDrop), the distance to a source. One pass serves a list of tensors.
// Definition: hdrq/backends/reference/noise.py, fakequant.py and weights.py.
#pragma once

#include "drop.h"
#include "fakequant.h"
#include "noise.h"

namespace hdrq::HDRQ_ISA {

// The tiles of several tensors, one after the other: a tile has elements of one tensor only.
class TilesOfMany {
 public:
  TilesOfMany(const Quantizer* quantizers, int count) : quantizers_(quantizers), first_(count + 1) {
    for (int k = 0; k < count; ++k) first_[k + 1] = first_[k] + tiles(quantizers[k].count);
  }

  // body(k, tile, begin, end): all tiles, over threads; k and the elements are those of a tensor.
  template <class Body>
  void run(int threads, const Body& body) const {
    for_tiles({total() * kTile, threads}, [&](int64_t tile, int64_t, int64_t) {
      int k = 0;
      while (tile >= first_[k + 1]) ++k;
      const int64_t own = tile - first_[k];
      body(k, own, own * kTile, min((own + 1) * kTile, quantizers_[k].count));
    });
  }

  int64_t total() const { return first_[first_.size() - 1]; }
  int64_t first(int k) const { return first_[k]; }

 private:
  const Quantizer* quantizers_;
  Buffer<int64_t> first_;
};

// Calls body with the rounding and the choice of elements that a quantizer asks for.
template <class Body>
void with_rounding(const Quantizer& q, const Body& body) {
  const auto with_keep = [&](auto& rounding) {
    if (q.threshold >= Quantizer::kAlways) {
      KeepAll keep;
      body(rounding, keep);
    } else {
      KeepSome keep(q.stream, q.threshold);
      body(rounding, keep);
    }
  };
  if (q.noise) {
    NoiseRounding rounding(q);
    with_keep(rounding);
  } else if (q.rounding == Rounding::quotient && q.gradient == Gradient::round_first) {
    NearestRounding<true> rounding(q);
    with_keep(rounding);
  } else {
    NearestRounding<false> rounding(q);
    with_keep(rounding);
  }
}

template <class T>
void quantizer_forward(int threads, const Quantizer* quantizers, int count) {
  const TilesOfMany all(quantizers, count);
  Buffer<double> squares(all.total());
  all.run(threads, [&](int k, int64_t tile, int64_t tile_begin, int64_t tile_end) {
    const Quantizer& q = quantizers[k];
    const auto *x = T::in(q.x), *source = T::in(q.source);
    auto* y = T::out(q.y);
    Sum square;
    with_rounding(q, [&](auto& rounding, auto& keep) {
      for_chunks<kDraw>(tile_begin, tile_end, [&](int64_t begin, int64_t n) {
        prefetch(x + begin + n, y + begin + n);
        rounding.seek(begin, n);
        keep.seek(begin, n);
        for_vectors(n, [&](int64_t i, auto count) {
          const vf v = T::load(x + begin + i, count);
          T::store(keep.at(i) ? rounding.forward(v, i) : v, y + begin + i, count);
          if (!source) return;
          const vf d = v - T::load(source + begin + i, count);
          square.add_product(d, d);
        });
      });
    });
    squares[all.first(k) + tile] = square.total();
  });
  for (int k = 0; k < count; ++k) {
    if (!quantizers[k].squared_distance) continue;
    double sum = 0;
    for (int64_t tile = all.first(k); tile < all.first(k + 1); ++tile) sum += squares[tile];
    *quantizers[k].squared_distance = sum;
  }
}

// The sums of a chunk's products, g times a slope, on their way to their channels: in a register where all elements are
// of one channel, else both factors wait for the end of the chunk.
class ChunkSums {
 public:
  ChunkSums(const ChannelSums& sums, bool one_channel, int64_t begin, int64_t n)
      : sums_(sums), one_channel_(one_channel), begin_(begin), n_(n) {}

  HDRQ_INLINE void add(vf g, vf slope, int64_t i) {
    if (one_channel_) {
      sum_.add_product(g, slope);
    } else {
      write(g, grads_ + i, kLanes);
      write(slope, slopes_ + i, kLanes);
    }
  }

  void end(int64_t tile) {
    if (one_channel_)
      sums_.add(tile, begin_, sum_.total());
    else
      sums_.add(tile, begin_, n_, grads_, slopes_);
  }

 private:
  const ChannelSums& sums_;
  bool one_channel_;
  int64_t begin_, n_;
  Sum sum_{};  // the braces spare GCC 12 a constructor, on which it fails without optimizations
  alignas(HDRQ_VECTOR_BYTES) float grads_[kChunk], slopes_[kChunk];
};

template <class T>
void quantizer_backward(int threads, const Quantizer* quantizers, int count) {
  const TilesOfMany all(quantizers, count);
  Buffer<ChannelSums> sums(count), zero_sums(count);
  int64_t size = 0;
  for (int k = 0; k < count; ++k) {
    sums[k] = zero_sums[k] = ChannelSums(quantizers[k].grid, quantizers[k].count);
    size += sums[k].size() * (quantizers[k].grad_z ? 2 : 1);
  }
  Buffer<double> partial(size);
  for (int64_t k = 0, used = 0; k < count; ++k) {
    sums[k].use(partial.at(used));
    used += sums[k].size();
    if (!quantizers[k].grad_z) continue;
    zero_sums[k].use(partial.at(used));
    used += zero_sums[k].size();
  }
  all.run(threads, [&](int k, int64_t tile, int64_t tile_begin, int64_t tile_end) {
    const Quantizer& q = quantizers[k];
    const auto *grad = T::in(q.grad), *x = T::in(q.x), *source = T::in(q.source);
    auto* grad_x = T::out(q.grad_x);
    with_rounding(q, [&](auto& rounding, auto& keep) {
      for_chunks(tile_begin, tile_end, [&](int64_t chunk, int64_t length) {
        const bool one = one_channel(q.grid, chunk, length);
        ChunkSums sum(sums[k], one, chunk, length), zero_sum(zero_sums[k], one, chunk, length);
        for_chunks<kDraw>(chunk, chunk + length, [&](int64_t begin, int64_t n) {
          prefetch(grad + begin + n, x + begin + n, grad_x + begin + n);
          rounding.seek(begin, n);
          keep.seek(begin, n);
          for_vectors(n, [&](int64_t i, auto count) {
            const vf g = T::load(grad + begin + i, count), v = T::load(x + begin + i, count);
            const Slopes slopes = rounding.backward(v, i);
            const vi kept = keep.at(i);
            const vf factor = only(kept ? g : vf{}, count);
            sum.add(factor, only(kept ? slopes.scale : vf{}, count), begin - chunk + i);
            if (q.grad_z) zero_sum.add(factor, only(kept ? slopes.zero : vf{}, count), begin - chunk + i);
            vf result = slopes.inside | ~kept ? g : vf{};
            if (source) result += (v - T::load(source + begin + i, count)) * q.pull;
            T::store(result, grad_x + begin + i, count);
          });
        });
        sum.end(tile);
        if (q.grad_z) zero_sum.end(tile);
      });
    });
  });
  for (int k = 0; k < count; ++k) {
    sums[k].total(quantizers[k].grad_s);
    if (quantizers[k].grad_z) zero_sums[k].total(quantizers[k].grad_z);
  }
}

}  // namespace hdrq::HDRQ_ISA
