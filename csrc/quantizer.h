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
  } else {
    NearestRounding rounding(q);
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

template <class T>
void quantizer_backward(int threads, const Quantizer* quantizers, int count) {
  const TilesOfMany all(quantizers, count);
  Buffer<ChannelSums> sums(count);
  int64_t size = 0;
  for (int k = 0; k < count; ++k) {
    sums[k] = ChannelSums(quantizers[k].grid, quantizers[k].count);
    size += sums[k].size();
  }
  Buffer<double> partial(size);
  for (int64_t k = 0, used = 0; k < count; used += sums[k].size(), ++k) sums[k].use(partial.at(used));
  all.run(threads, [&](int k, int64_t tile, int64_t tile_begin, int64_t tile_end) {
    const Quantizer& q = quantizers[k];
    const auto *grad = T::in(q.grad), *x = T::in(q.x), *source = T::in(q.source);
    auto* grad_x = T::out(q.grad_x);
    alignas(HDRQ_VECTOR_BYTES) float grads[kChunk], slopes[kChunk];
    with_rounding(q, [&](auto& rounding, auto& keep) {
      for_chunks(tile_begin, tile_end, [&](int64_t chunk, int64_t length) {
        const bool one_channel = sums[k].one_channel(chunk, length);
        Sum sum;
        for_chunks<kDraw>(chunk, chunk + length, [&](int64_t begin, int64_t n) {
          prefetch(grad + begin + n, x + begin + n, grad_x + begin + n);
          rounding.seek(begin, n);
          keep.seek(begin, n);
          for_vectors(n, [&](int64_t i, auto count) {
            const vf g = T::load(grad + begin + i, count), v = T::load(x + begin + i, count);
            const Slopes of = rounding.backward(v, i);
            const vi kept = keep.at(i);
            const vf factor = only(kept ? g : vf{}, count), slope = only(kept ? of.scale : vf{}, count);
            if (one_channel) {
              sum.add_product(factor, slope);
            } else {
              write(factor, grads + (begin - chunk) + i, kLanes);
              write(slope, slopes + (begin - chunk) + i, kLanes);
            }
            vf result = of.inside | ~kept ? g : vf{};
            if (source) result += (v - T::load(source + begin + i, count)) * q.pull;
            T::store(result, grad_x + begin + i, count);
          });
        });
        if (one_channel)
          sums[k].add(tile, chunk, sum.total());
        else
          sums[k].add(tile, chunk, length, grads, slopes);
      });
    });
  });
  for (int k = 0; k < count; ++k) sums[k].total(quantizers[k].grad_s);
}

}  // namespace hdrq::HDRQ_ISA
