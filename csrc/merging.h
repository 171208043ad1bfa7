// Family `merging`: one tensor of codes from K, by noise-sampled rounding. Definition: hdrq/backends/reference/merging.py.
#pragma once

#include "grid.h"
#include "packing.h"
#include "philox.h"

namespace hdrq::HDRQ_ISA {

// Vectors whose products are summed in float32, before they join a sum in float64: that costs several times as much.
constexpr int kTogether = 4, kRun = kTogether * kLanes;

// A chunk of the K inputs: values w_k = J_k·Δ_k, midpoint Σ λ_k·w_k, distances d_k = midpoint − w_k, and the merged
// codes of one draw. K is a constant of the type, or 0: as many as there are.
template <int K>
class MergeChunk {
 public:
  static constexpr int kMost = K ? K : 64;

  explicit MergeChunk(const Merge& merge)
      : merge_(merge),
        steps_(merge.models),
        merged_(merge.merged_grid()),
        values_(merge.models * kChunk),
        distances_(merge.models * kChunk),
        middle_(kChunk),
        noisy_(kChunk),
        words_(merge.models * kChunk) {
    for (int k = 0; k < models(); ++k) steps_[k] = ChunkGrid(merge.grid(k));
  }

  void seek(int64_t begin, int64_t n) {
    begin_ = begin, n_ = n;
    merged_.seek(begin, n);
    for (int k = 0; k < models(); ++k) steps_[k].seek(begin, n);
    const bool odd = merge_.noise == Merge::Noise::odd;
    for_vectors(n, [&](int64_t i, auto count) {
      vf middle{}, mean{};
      for (int k = 0; k < models(); ++k) {
        const vf integer = read_codes(merge_.types[k], merge_.codes[k], begin + i, count) - steps_[k].zero(i);
        const vf value = integer * steps_[k].scale(i);
        write(value, values_.at(k * kChunk + i), kLanes);
        middle = k == 0 ? value * merge_.weights[0] : middle + value * merge_.weights[k];
        if (odd) mean = k == 0 ? integer * merge_.weights[0] : mean + integer * merge_.weights[k];
      }
      write(middle, middle_.at(i), kLanes);
      write(noisy_at(mean), noisy_.at(i), kLanes);
    });
  }

  // The distances of the chunk sought, 0 in lanes that hold no element, and Σ d_k² added to own[0 … K − 1].
  void measure(double* own) {
    for (int k = 0; k < models(); ++k) {
      Sum total;
      for (int64_t run = 0; run < n_; run += kRun) {
        vf squares{};
        for_vectors(min(kRun, n_ - run), [&](int64_t j, auto count) {
          const vf d = only(middle(run + j) - value(k, run + j), count);
          write(d, distances_.at(k * kChunk + run + j), kLanes);
          squares += d * d;
        });
        total.add(squares);
      }
      own[k] += total.total();
    }
  }

  // The words of one draw, for the chunk sought.
  void draw(int d) { draw(d, models()); }
  void draw(int d, int streams) {
    if (merge_.noise == Merge::Noise::none) return;
    for (int k = 0; k < streams; ++k) {
      Stream own = merge_.stream;
      own.stream += uint32_t(k), own.step += uint32_t(d);
      Philox(own).fill(words_.at(k * kChunk), begin_, n_);
    }
  }

  // I*, integers still in float32.
  vf merged(int64_t i) const {
    const vi noisy = this->noisy(i);
    vf total{};
    for (int k = 0; k < models(); ++k) {
      const vf n = __builtin_convertvector(bits<vi>(word(k, i) >> 8), vf);
      const vf noise = noisy ? n * 0x1p-24f - 0.5f : vf{};
      const vf term = (value(k, i) + noise * steps_[k].scale(i)) * merge_.weights[k];
      total = k == 0 ? term : total + term;
    }
    return clamped(i, round_even(total / merged_.scale(i)));
  }

  vf clamped(int64_t i, vf q) const { return clamp(q + merged_.zero(i), merge_.qmin, merge_.qmax); }

  // r: from the midpoint to the value of a merged code.
  vf residue(int64_t i, vf q) const { return (q - merged_.zero(i)) * merged_.scale(i) - middle(i); }

  int models() const { return K ? K : merge_.models; }
  bool constant() const { return merged_.constant(); }
  vf share(int k, int64_t i) const { return steps_[k].scale(i) * merge_.weights[k] / merged_.scale(i); }
  vf mean(int64_t i) const { return middle(i) / merged_.scale(i); }
  vf middle(int64_t i) const { return read<vf>(middle_.at(i), kLanes); }
  vf distance(int k, int64_t i) const { return read<vf>(distances_.at(k * kChunk + i), kLanes); }
  vi noisy(int64_t i) const { return read<vi>(noisy_.at(i), kLanes); }
  vu word(int k, int64_t i) const { return read<vu>(words_.at(k * kChunk + i), kLanes); }

 private:
  vf value(int k, int64_t i) const { return read<vf>(values_.at(k * kChunk + i), kLanes); }

  // Where there is noise, given the mean integer: "odd" where it is nearer to a tie than to an integer.
  vi noisy_at(vf mean) const {
    if (merge_.noise == Merge::Noise::none) return vi{};
    if (merge_.noise == Merge::Noise::all) return ~vi{};
    const vf off = mean - floor(mean) - 0.5f;
    return (off < 0.25f) & (off > -0.25f);
  }

  const Merge& merge_;
  Buffer<ChunkGrid> steps_;
  ChunkGrid merged_;
  Buffer<float> values_, distances_, middle_;
  Buffer<int32_t> noisy_;
  Buffer<uint32_t> words_;
  int64_t begin_ = 0, n_ = 0;
};

// Adds Σ r² and Σ d_k·r over a chunk to own[0 … K]; residue(i, count) gives r, 0 in lanes that hold no element.
template <int K, class Residue>
inline void add_products(const MergeChunk<K>& chunk, int64_t n, double* own, const Residue& residue) {
  Sum rr, dr[MergeChunk<K>::kMost];
  for (int64_t run = 0; run < n; run += kRun) {
    vf squares{}, dots[MergeChunk<K>::kMost];
    for (int k = 0; k < chunk.models(); ++k) dots[k] = vf{};
    for_vectors(min(kRun, n - run), [&](int64_t i, auto count) {
      const vf r = only(residue(run + i), count);
      squares += r * r;
      for (int k = 0; k < chunk.models(); ++k) dots[k] += chunk.distance(k, run + i) * r;
    });
    rr.add(squares);
    for (int k = 0; k < chunk.models(); ++k) dr[k].add(dots[k]);
  }
  own[0] += rr.total();
  for (int k = 0; k < chunk.models(); ++k) own[1 + k] += dr[k].total();
}

// The distribution of a sum of K uniforms on [0, a_k], Σ a = 1, up to its middle.
template <int K>
class UniformSum {
 public:
  UniformSum() = default;
  explicit UniformSum(const vd (&a)[K]) {
    vd volume = vd{} + 1.0;
    for (int k = 2; k <= K; ++k) volume *= k;
    sums_[0] = vd{};
    for (int k = 0; k < K; ++k) {
      for (int s = 0; s < 1 << k; ++s) sums_[(1 << k) + s] = sums_[s] + a[k];
      volume *= a[k];
    }
    over_volume_ = 1.0 / volume;
  }

  vd below(vd h) const {
    vd total{};
    for (int s = 0; s < 1 << K; ++s) {
      vd part = h - sums_[s];
      part = part > 0 ? part : vd{};
      vd power = part;
      for (int k = 1; k < K; ++k) power *= part;
      total = __builtin_popcount(s) % 2 ? total - power : total + power;
    }
    total *= over_volume_;
    total = total > 0 ? total : vd{};
    return total < 1.0 ? total : vd{} + 1.0;
  }

 private:
  vd sums_[1 << K], over_volume_;  // Σ_S a of every subset S, and 1 / (K!·Π a)
};

// The two outcomes of each element of a chunk of K inputs, and the last word for which a draw takes the upper one.
template <int K>
class FastChunk : public MergeChunk<K> {
 public:
  static constexpr int kModels = K;

  explicit FastChunk(const Merge& merge) : MergeChunk<K>(merge), lower_(kChunk), upper_(kChunk), last_(kChunk) {}

  void seek(int64_t begin, int64_t n) {
    MergeChunk<K>::seek(begin, n);
    this->draw(0, 2);
    UniformSum<K> sums[2];
    for_vectors(n, [&](int64_t i, int) {
      if (i == 0 || !this->constant()) {
        vd low[K], high[K];
        for (int k = 0; k < K; ++k) {
          const Wide share(this->share(k, i));
          low[k] = share.low > 0x1p-14 ? share.low : vd{} + 0x1p-14;
          high[k] = share.high > 0x1p-14 ? share.high : vd{} + 0x1p-14;
        }
        sums[0] = UniformSum<K>(low), sums[1] = UniformSum<K>(high);
      }
      const vf v = this->mean(i);
      const vi noisy = this->noisy(i);
      const vf low = noisy ? floor(v) : round_even(v);
      const vf y = v - low, rest = 1.0f - y;
      const Wide wide(y), h(rest < y ? rest : y);
      const vi threshold = noisy & joined(words(sums[0], wide.low, h.low), words(sums[1], wide.high, h.high));
      write(this->clamped(i, low), lower_.at(i), kLanes);
      write(this->clamped(i, threshold == 0 ? low : low + 1.0f), upper_.at(i), kLanes);
      write(bits<vu>(threshold << 8) - 1, last_.at(i), kLanes);
    });
  }

  vf lower(int64_t i) const { return read<vf>(lower_.at(i), kLanes); }
  vf upper(int64_t i) const { return read<vf>(upper_.at(i), kLanes); }
  vu last(int64_t i) const { return read<vu>(last_.at(i), kLanes); }

  vf merged(int64_t i, uint32_t d) const {
    return this->word(0, i) + this->word(1, i) * d <= last(i) ? upper(i) : lower(i);
  }

 private:
  // Below how many of 2²⁴ words the upper outcome is drawn.
  static vi_half words(const UniformSum<K>& sums, vd y, vd h) {
    const vd tail = sums.below(h);
    return __builtin_convertvector((y <= 0.5 ? tail : 1.0 - tail) * 0x1p24, vi_half);
  }

  Buffer<float> lower_, upper_;
  Buffer<uint32_t> last_;
};

// A chunk's sums of all draws, 1 + K numbers each: those of the lower outcomes for each draw, and for each element that
// a draw moves up, the difference that this makes.
template <int K>
inline void add_draws(const FastChunk<K>& chunk, int64_t n, int draws, double* own) {
  constexpr int kGroup = 32, kColumns = 1 + K;
  double lower[kColumns]{};
  add_products(chunk, n, lower, [&](int64_t i) { return chunk.residue(i, chunk.lower(i)); });
  for (int first = 0; first < draws; first += kGroup) {
    const int group = int(min(kGroup, draws - first));
    vf sums[kGroup][kColumns];
    for (int d = 0; d < group; ++d)
      for (vf& sum : sums[d]) sum = vf{};
    for (int64_t run = 0; run < n; run += kRun) {
      vu word[kTogether], stride[kTogether], last[kTogether];
      vf gain[kTogether][kColumns];
#pragma GCC unroll 4
      for (int t = 0; t < kTogether; ++t) {
        const int64_t i = run + t * kLanes;
        stride[t] = chunk.word(1, i), word[t] = chunk.word(0, i) + stride[t] * uint32_t(first), last[t] = chunk.last(i);
        const vf low = chunk.residue(i, chunk.lower(i)), high = chunk.residue(i, chunk.upper(i));
        const int live = int(max(0, min(kLanes, n - i)));
        gain[t][0] = only(high * high - low * low, live);
        for (int k = 0; k < K; ++k) gain[t][1 + k] = only((high - low) * chunk.distance(k, i), live);
      }
      for (int d = 0; d < group; ++d) {
        vf sum[kColumns]{};
#pragma GCC unroll 4
        for (int t = 0; t < kTogether; ++t) {
          const vi up = word[t] <= last[t];
          for (int c = 0; c < kColumns; ++c) sum[c] += up ? gain[t][c] : vf{};
          word[t] += stride[t];
        }
        for (int c = 0; c < kColumns; ++c) sums[d][c] += sum[c];
      }
    }
    for (int d = 0; d < group; ++d)
      for (int c = 0; c < kColumns; ++c) {
        Sum total;
        total.add(sums[d][c]);
        own[(first + d) * kColumns + c] += lower[c] + total.total();
      }
  }
}

// Sums for the cosines of all draws in one pass over the codes: first Σ d_k² of each model k, then for each draw
// Σ r² and Σ d_k·r of each model, with r = (I* − z*)Δ* − midpoint.
template <class Chunk, class Score>
inline void merge_score(Job job, const Merge& merge, int draws, double* sums, const Score& score) {
  const int models = merge.models;
  const int64_t width = models + int64_t(draws) * (1 + models);
  Buffer<double> partial(tiles(job.count) * width);
  for_tiles(job, [&](int64_t tile, int64_t tile_begin, int64_t tile_end) {
    Chunk chunk(merge);
    double* own = partial.at(tile * width);
    for_chunks(tile_begin, tile_end, [&](int64_t begin, int64_t n) {
      chunk.seek(begin, n);
      chunk.measure(own);
      score(chunk, n, own + models);
    });
  });
  fill(sums, width, 0.0);
  for (int64_t i = 0; i < partial.size(); ++i) sums[i % width] += partial[i];
}

// with(chunk) for the type that fast draws of so many models need: a null pointer to it.
template <class With>
inline void fast_chunk(int models, const With& with) {
  if (models == 2) with((FastChunk<2>*)nullptr);
  else if (models == 3) with((FastChunk<3>*)nullptr);
  else with((FastChunk<4>*)nullptr);
}

inline void merge_score(Job job, const Merge& merge, int draws, double* sums) {
  if (merge.fast) {
    fast_chunk(merge.models, [&](auto* type) {
      using Chunk = std::remove_pointer_t<decltype(type)>;
      merge_score<Chunk>(job, merge, draws, sums,
                         [&](Chunk& chunk, int64_t n, double* own) { add_draws(chunk, n, draws, own); });
    });
    return;
  }
  const auto exact = [&](auto& chunk, int64_t n, double* own) {
    for (int d = 0; d < draws; ++d) {
      chunk.draw(d);
      add_products(chunk, n, own + d * (1 + merge.models), [&](int64_t i) { return chunk.residue(i, chunk.merged(i)); });
    }
  };
  if (merge.models == 2) merge_score<MergeChunk<2>>(job, merge, draws, sums, exact);
  else merge_score<MergeChunk<0>>(job, merge, draws, sums, exact);
}

// The codes of a draw: sought(chunk) is told of each chunk, code(chunk, i) gives its vectors.
template <class Chunk, class V, class Sought, class Merged>
void merge_codes(Job job, const Merge& merge, Code type, void* codes, V*, const Sought& sought, const Merged& merged) {
  using Lane = lane_of<V>;
  for_tiles(job, [&](int64_t, int64_t tile_begin, int64_t tile_end) {
    Chunk chunk(merge);
    alignas(HDRQ_VECTOR_BYTES) Lane integers[kChunk];
    for_chunks(tile_begin, tile_end, [&](int64_t begin, int64_t n) {
      chunk.seek(begin, n);
      sought(chunk);
      Lane* out = is_packed(type) ? integers : static_cast<Lane*>(codes) + begin;
      for_vectors(n, [&](int64_t i, auto count) {
        write(__builtin_convertvector(__builtin_convertvector(merged(chunk, i), vi), V), out + i, count);
      });
      if constexpr (sizeof(Lane) == 1)
        if (is_packed(type)) pack(integers, n, static_cast<uint8_t*>(codes) + begin / 2);
    });
  });
}

inline void merge_codes(Job job, const Merge& merge, int draw, Code type, void* codes) {
  const auto with = [&](auto* chunk, const auto& sought, const auto& merged) {
    using Chunk = std::remove_pointer_t<decltype(chunk)>;
    if (type == Code::i16) merge_codes<Chunk>(job, merge, type, codes, (vi16*)nullptr, sought, merged);
    else merge_codes<Chunk>(job, merge, type, codes, (vi8*)nullptr, sought, merged);
  };
  if (merge.fast)
    fast_chunk(merge.models, [&](auto* type) {
      with(type, [](auto&) {}, [&](auto& c, int64_t i) { return c.merged(i, uint32_t(draw)); });
    });
  else
    with((MergeChunk<0>*)nullptr, [&](auto& c) { c.draw(draw); }, [](auto& c, int64_t i) { return c.merged(i); });
}

}  // namespace hdrq::HDRQ_ISA
