// Family `systematic`: one tensor of codes from K, rounded systematically near ties. Definition:
// hdrq/backends/reference/systematic.py.
//
// A group is a chunk. Its running sum of weights is kept in the upper 20 bits of a word, so that the carry of an
// addition says that an element goes up.
#pragma once

#include "grid.h"
#include "packing.h"
#include "philox.h"

namespace hdrq::HDRQ_ISA {

constexpr uint32_t kWeightBits = ~0u << 12;

// What becomes of elements whose mean lies at v: their weights, their codes if they stay, and how far they go up, which
// is 0 where the clamp holds them.
struct Outcomes {
  vu weight;
  vi16 code, step;

  Outcomes(vf v, vf zero, const Merge& merge, float tau) {
    const vf low = floor(v), y = v - low, off = y - 0.5f;
    const vi near = (off < tau) & (off > -tau);
    weight = bits<vu>(__builtin_convertvector(near ? y * 0x1p20f : vf{}, vi)) << 12;
    code = clamped((near ? low : round_even(v)) + zero, merge);
    step = clamped(low + 1.0f + zero, merge) - code;
  }

 private:
  static vi16 clamped(vf q, const Merge& merge) {
    return __builtin_convertvector(__builtin_convertvector(clamp(q, merge.qmin, merge.qmax), vi), vi16);
  }
};

// One element after the other: 1 if it goes up, else 0.
class Carry {
 public:
  explicit Carry(uint32_t word) : passed_(word & kWeightBits) {}
  int operator()(uint32_t weight) { return __builtin_add_overflow(passed_, weight, &passed_); }

 private:
  uint32_t passed_;
};

// The words of a tile's groups.
class GroupWords {
 public:
  explicit GroupWords(Stream stream) : philox_(stream) {}
  void seek(int64_t tile) { philox_.fill(words_, tile * (kTile / kChunk), kTile / kChunk); }
  uint32_t of(int64_t begin) const { return words_[begin / kChunk % (kTile / kChunk)]; }

 private:
  Philox philox_;
  alignas(HDRQ_VECTOR_BYTES) uint32_t words_[kChunk];  // more than 16, since a fill writes many at once
};

// Any models: the outcomes of a chunk's elements, each computed.
class ComputedOutcomes {
 public:
  ComputedOutcomes(const Merge& merge, float tau)
      : merge_(merge), tau_(tau), steps_(merge.models), merged_(merge.merged_grid()) {
    for (int k = 0; k < merge.models; ++k) steps_[k] = ChunkGrid(merge.grid(k));
  }

  template <class Lane>
  void round(int64_t begin, int64_t n, uint32_t word, Lane* codes) {
    merged_.seek(begin, n);
    for (int k = 0; k < merge_.models; ++k) steps_[k].seek(begin, n);
    for_vectors(n, [&](int64_t i, auto count) {
      vf total{};
      for (int k = 0; k < merge_.models; ++k) {
        const vf integer = read_codes(merge_.types[k], merge_.codes[k], begin + i, count) - steps_[k].zero(i);
        const vf term = integer * steps_[k].scale(i) * merge_.weights[k];
        total = k == 0 ? term : total + term;
      }
      const Outcomes of(total / merged_.scale(i), merged_.zero(i), merge_, tau_);
      write(of.weight, weights_ + i, kLanes);
      write(of.code, codes_ + i, kLanes);
      write(of.step, steps_up_ + i, kLanes);
    });
    Carry carry(word);
    for (int64_t i = 0; i < n; ++i) codes[i] = Lane(codes_[i] + (-carry(weights_[i]) & steps_up_[i]));
  }

 private:
  const Merge& merge_;
  float tau_;
  Buffer<ChunkGrid> steps_;
  ChunkGrid merged_;
  alignas(HDRQ_VECTOR_BYTES) uint32_t weights_[kChunk];
  alignas(HDRQ_VECTOR_BYTES) int16_t codes_[kChunk], steps_up_[kChunk];
};

// Two models of 4-bit codes, packed, with one scale each: all 256 pairs of codes have their outcomes in tables.
class PairTable {
 public:
  PairTable(const Merge& merge, float tau) : first_(bytes(merge, 0)), second_(bytes(merge, 1)) {
    for (int pair = 0; pair < 256; pair += kLanes) {
      vf total{};
      for (int k = 0; k < 2; ++k) {
        vf integer;
        for (int lane = 0; lane < kLanes; ++lane) {
          const int nibble = (pair + lane) >> (4 * k) & 15;
          integer[lane] = float(merge.types[k] == Code::i4 ? (nibble ^ 8) - 8 : nibble);
        }
        const vf term = (integer - zero(merge.zero_points[k])) * merge.scales[k][0] * merge.weights[k];
        total = k == 0 ? term : total + term;
      }
      const Outcomes of(total / merge.merged_scale[0], splat(zero(merge.merged_zero)), merge, tau);
      for (int lane = 0; lane < kLanes; ++lane) {
        weight_[pair + lane] = of.weight[lane];
        code_[2 * (pair + lane)] = uint8_t(of.code[lane] & 15);
        code_[2 * (pair + lane) + 1] = uint8_t((of.code[lane] + of.step[lane]) & 15);
      }
    }
  }

  static bool serves(const Merge& merge, Code merged) {
    return merge.models == 2 && merge.channels == 1 && is_packed(merged) && is_packed(merge.types[0]) &&
           is_packed(merge.types[1]);
  }

  void round(int64_t begin, int64_t n, uint32_t word, uint8_t* merged) const {
    const int64_t count = n / 2;
    const uint8_t *a = first_ + begin / 2, *b = second_ + begin / 2;
    uint8_t even[kChunk / 2 + 1], odd[kChunk / 2 + 1];
    for (int64_t j = 0; j < (n + 1) / 2; ++j) {
      even[j] = uint8_t((a[j] & 15) | b[j] << 4);
      odd[j] = uint8_t(a[j] >> 4 | (b[j] & 0xf0));
    }
    Carry carry(word);
    for (int64_t j = 0; j < count; ++j) {
      const uint8_t low = code_[2 * even[j] + carry(weight_[even[j]])];
      merged[j] = uint8_t(low | code_[2 * odd[j] + carry(weight_[odd[j]])] << 4);
    }
    if (n % 2) merged[count] = code_[2 * even[count] + carry(weight_[even[count]])];
  }

 private:
  static const uint8_t* bytes(const Merge& merge, int k) { return static_cast<const uint8_t*>(merge.codes[k]); }
  static float zero(const float* zero_point) { return zero_point ? *zero_point : 0.0f; }

  const uint8_t *first_, *second_;
  uint32_t weight_[256];
  uint8_t code_[512];
};

// rounding(begin, n, word): all chunks, each with its group's word; one rounding to a tile.
template <class Make>
void for_groups(Job job, const Merge& merge, const Make& make) {
  for_tiles(job, [&](int64_t tile, int64_t tile_begin, int64_t tile_end) {
    GroupWords words(merge.stream);
    words.seek(tile);
    auto round = make();
    for_chunks(tile_begin, tile_end, [&](int64_t begin, int64_t n) { round(begin, n, words.of(begin)); });
  });
}

inline void merge_systematic(Job job, const Merge& merge, float tau, Code type, void* codes) {
  if (job.count == 0) return;
  if (PairTable::serves(merge, type)) {
    const PairTable table(merge, tau);
    for_groups(job, merge, [&] {
      return [&](int64_t begin, int64_t n, uint32_t word) {
        table.round(begin, n, word, static_cast<uint8_t*>(codes) + begin / 2);
      };
    });
    return;
  }
  for_groups(job, merge, [&] {
    return [&, outcomes = ComputedOutcomes(merge, tau)](int64_t begin, int64_t n, uint32_t word) mutable {
      if (type == Code::i8) return outcomes.round(begin, n, word, static_cast<int8_t*>(codes) + begin);
      if (type == Code::i16) return outcomes.round(begin, n, word, static_cast<int16_t*>(codes) + begin);
      int8_t integers[kChunk];
      outcomes.round(begin, n, word, integers);
      pack(integers, n, static_cast<uint8_t*>(codes) + begin / 2);
    };
  });
}

}  // namespace hdrq::HDRQ_ISA
