// Family `merge`: one tensor of codes from K, by noise-sampled rounding. Definition: hdrq/reference/merge.py.
#pragma once

#include "grid.h"
#include "philox.h"

namespace hdrq::HDRQ_ISA {

// A chunk of the K inputs: values w_k = I_k·Δ_k, steps Δ_k, midpoint Σ λ_k·w_k, and the merged codes of one draw.
class MergeChunk {
 public:
  explicit MergeChunk(const Merge& merge)
      : merge_(merge),
        steps_(merge.models),
        merged_step_(grid(merge.merged_scale)),
        values_(merge.models * kChunk),
        words_(merge.models * kChunk) {
    for (int k = 0; k < merge_.models; ++k) steps_[k] = ChunkGrid(grid(merge.scales[k]));
  }

  void seek(int64_t begin, int64_t n) {
    begin_ = begin, n_ = n;
    merged_step_.seek(begin, n);
    for (int k = 0; k < merge_.models; ++k) {
      steps_[k].seek(begin, n);
      for_vectors(n, [&](int64_t i, auto count) {
        write(code(k, i, count) * steps_[k].scale(i), values_.at(k * kChunk + i), kLanes);
      });
    }
  }

  // The noise of one draw, for the chunk sought.
  void draw(int d) {
    if (merge_.noise == Merge::Noise::none) return;
    for (int k = 0; k < merge_.models; ++k) {
      Stream own = merge_.stream;
      own.stream += uint32_t(k), own.step += uint32_t(d);
      Philox(own).fill(words_.at(k * kChunk), begin_, n_);
    }
  }

  // I*, integers still in float32.
  vf merged(int64_t i, int count) const {
    vi noisy = merge_.noise == Merge::Noise::none ? vi{} : ~vi{};
    if (merge_.noise == Merge::Noise::odd)
      noisy = -(__builtin_convertvector(code(0, i, count) + code(1, i, count), vi) & 1);
    vf total{};
    for (int k = 0; k < merge_.models; ++k) {
      const vf n = __builtin_convertvector(bits<vi>(read<vu>(words_.at(k * kChunk + i), kLanes) >> 8), vf);
      const vf noise = noisy ? n * 0x1p-24f - 0.5f : vf{};
      const vf term = (value(k, i) + noise * steps_[k].scale(i)) * merge_.weights[k];
      total = k == 0 ? term : total + term;
    }
    return clamp(round_even(total / merged_step_.scale(i)), merge_.qmin, merge_.qmax);
  }

  vf midpoint(int64_t i) const {
    vf total = value(0, i) * merge_.weights[0];
    for (int k = 1; k < merge_.models; ++k) total += value(k, i) * merge_.weights[k];
    return total;
  }

  vf value(int k, int64_t i) const { return read<vf>(values_.at(k * kChunk + i), kLanes); }
  vf merged_step(int64_t i) const { return merged_step_.scale(i); }

 private:
  Grid grid(const float* scale) const {
    return {scale, nullptr, merge_.channels, merge_.inner, merge_.qmin, merge_.qmax};
  }

  vf code(int k, int64_t i, int count) const {
    const int64_t e = begin_ + i;
    if (merge_.code == Code::i8)
      return __builtin_convertvector(read<vi8>(static_cast<const int8_t*>(merge_.codes[k]) + e, count), vf);
    return __builtin_convertvector(read<vi16>(static_cast<const int16_t*>(merge_.codes[k]) + e, count), vf);
  }

  const Merge& merge_;
  Buffer<ChunkGrid> steps_;
  ChunkGrid merged_step_;
  Buffer<float> values_;
  Buffer<uint32_t> words_;
  int64_t begin_ = 0, n_ = 0;
};

// Sums for the cosines of all draws in one pass over the codes: first Σ d_k² of each model k, then for each draw
// Σ r² and Σ d_k·r of each model, with d_k = midpoint − w_k and r = I*Δ* − midpoint.
inline void merge_score(Job job, const Merge& merge, int draws, double* sums) {
  const int models = merge.models;
  const int64_t width = models + int64_t(draws) * (1 + models);
  Buffer<double> partial(tiles(job.count) * width);
  for_tiles(job, [&](int64_t tile, int64_t tile_begin, int64_t tile_end) {
    MergeChunk chunk(merge);
    Buffer<Sum> dots(models);
    for_chunks(tile_begin, tile_end, [&](int64_t begin, int64_t n) {
      double* own = partial.at(tile * width);
      const auto flush = [&] {
        for (int k = 0; k < models; ++k) *own++ += dots[k].total(), dots[k] = Sum{};
      };
      chunk.seek(begin, n);
      for_vectors(n, [&](int64_t i, auto count) {
        const vf middle = chunk.midpoint(i);
        for (int k = 0; k < models; ++k) {
          const vf d = only(middle - chunk.value(k, i), count);
          dots[k].add_product(d, d);
        }
      });
      flush();
      for (int draw = 0; draw < draws; ++draw) {
        chunk.draw(draw);
        Sum rr;
        for_vectors(n, [&](int64_t i, auto count) {
          const vf middle = chunk.midpoint(i);
          const vf r = only(chunk.merged(i, count) * chunk.merged_step(i) - middle, count);
          rr.add_product(r, r);
          for (int k = 0; k < models; ++k) dots[k].add_product(only(middle - chunk.value(k, i), count), r);
        });
        *own++ += rr.total();
        flush();
      }
    });
  });
  fill(sums, width, 0.0);
  for (int64_t i = 0; i < partial.size(); ++i) sums[i % width] += partial[i];
}

template <class V>
void merge_codes(Job job, const Merge& merge, int draw, V*, void* codes) {
  lane_of<V>* out = static_cast<lane_of<V>*>(codes);
  for_tiles(job, [&](int64_t, int64_t tile_begin, int64_t tile_end) {
    MergeChunk chunk(merge);
    for_chunks(tile_begin, tile_end, [&](int64_t begin, int64_t n) {
      chunk.seek(begin, n);
      chunk.draw(draw);
      for_vectors(n, [&](int64_t i, auto count) {
        write(__builtin_convertvector(__builtin_convertvector(chunk.merged(i, count), vi), V), out + begin + i, count);
      });
    });
  });
}

}  // namespace hdrq::HDRQ_ISA
