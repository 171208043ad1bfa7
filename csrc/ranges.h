// Family `ranges`: errors of candidate scales, and tables of values. Definition: hdrq/backends/reference/ranges.py.
#pragma once

#include "simd.h"

namespace hdrq::HDRQ_ISA {

// Even and odd powers apart: half as many steps that wait for one another.
template <int N>
inline vf polynomial(vf x, const float (&coefficients)[N]) {
  const vf square = x * x;
  vf sums[2] = {splat(coefficients[N - 1]), splat(coefficients[N - 2])};
  for (int i = N - 3; i >= 0; --i) {
    vf& sum = sums[(N - 1 - i) & 1];
    sum = sum * square + coefficients[i];
  }
  return N & 1 ? sums[0] + sums[1] * x : sums[1] + sums[0] * x;
}

// x^p of x ≥ 0, faster than the `power` of the contract: within about 1e-6 for moderate p·log2(x): 2^(p·log2 x), with polynomials fitted at Chebyshev's points
// to log2(1 + f) on [√½ − 1, √2 − 1] and to 2^f on [−½, ½]. 0 of a subnormal x; at least 2^-126 of any other.
inline vf fast_power(vf x, float p) {
  constexpr float kLog2[] = {4.1276955e-08f, 1.4426948f,  -0.72136116f, 0.48093262f, -0.35998312f,
                             0.28684822f,    -0.25111422f, 0.23610973f, -0.14199515f};
  constexpr float kExp2[] = {1.0000001f, 0.69314718f, 0.24022107f, 0.055503272f, 0.0096760374f, 0.0013400433f};
  constexpr float kToInteger = 0x1.8p23f;  // in [2^23, 2^24) float32 holds the integers and nothing between
  const vi exponent = (bits<vi>(x) - 0x3f3504f3) >> 23;  // of x over √½: the rest is in [√½, √2)
  const vf f = bits<vf>(bits<vi>(x) - (exponent << 23)) - 1.0f;
  vf t = (__builtin_convertvector(exponent, vf) + polynomial(f, kLog2)) * p;
  t = clamp(t, -126.0f, 128.0f);
  const vf shifted = t + kToInteger;  // its low bits are the integer
  const vf y = polynomial(t - (shifted - kToInteger), kExp2);
  const vf scaled = bits<vf>(bits<vi>(y) + (bits<vi>(shifted) << 23));
  return x < 0x1p-126f ? vf{} : scaled;
}

constexpr int64_t kCandidates = 64;  // that are scored together on a tile
constexpr int kShortRun = 16;        // vectors whose sum is kept in float32

// errors[r, c] = Σ w·(|x − clamp(round(x/s), low, high)·s|/unit)^norm over row r, s, low and high those of candidate c.
template <class T>
void range_errors(int threads, const typename T::type* x, const RangeSearch& search, double* errors) {
  const int64_t count = search.candidates, blocks = (count + kCandidates - 1) / kCandidates, parts = tiles(search.length);
  const int64_t work = min(search.length, kTile) * min(count, kCandidates) + 1;
  Buffer<double> partial(search.rows * parts * count);
  for_units(search.rows * parts * blocks, (1 << 18) / work + 1, threads, [&](int64_t unit) {
    const int64_t row = unit / blocks / parts, part = unit / blocks % parts, first = unit % blocks * kCandidates;
    const int64_t candidates = min(kCandidates, count - first), begin = row * search.length;
    const float over_unit = 1.0f / search.unit[row];
    alignas(HDRQ_VECTOR_BYTES) float values[kChunk], weights[kChunk];
    double* sums = partial.at((row * parts + part) * count + first);
    for_chunks(part * kTile, min((part + 1) * kTile, search.length), [&](int64_t i, int64_t n) {
      for_vectors(n, [&](int64_t j, auto width) {
        const int64_t e = begin + i + j;
        write(T::load(x + e, width), values + j, kLanes);
        write(search.weights ? F32::load(search.weights + e, width) : splat(1.0f), weights + j, kLanes);
      });
      fill(weights + n, -n & (kLanes - 1), 0.0f);  // what is beyond the end has no weight
      for (int64_t c = 0; c < candidates; ++c) {
        const int64_t at = row * count + first + c;
        const float s = search.scale[at], low = search.low[at], high = search.high[at];
        Sum sum;
        for (int64_t run = 0; run < n; run += kShortRun * kLanes) {
          vf total{};
          for (int64_t j = run; j < min(n, run + kShortRun * kLanes); j += kLanes) {
            const vf v = read<vf>(values + j, kLanes);
            const vf e = v - (clamp(v / s, low, high) + 0x1.8p23f - 0x1.8p23f) * s;
            const vf magnitude = bits<vf>(bits<vi>(e) & 0x7fffffff) * over_unit;
            total += fast_power(magnitude, search.norm) * read<vf>(weights + j, kLanes);
          }
          sum.add(total);
        }
        sums[c] += sum.total();
      }
    });
  });
  fill(errors, search.rows * count, 0.0);
  for (int64_t row = 0; row < search.rows; ++row)
    for (int64_t i = 0; i < parts * count; ++i) errors[row * count + i % count] += partial[row * parts * count + i];
}

// table[r, b] = how many elements of row r lie in bin b, and the sum of their offsets: of a position's 24 bits the upper
// ones are the bin, the rest is the offset.
template <class T>
void range_table(int threads, const typename T::type* x, const RangeTable& shape, int64_t* table) {
  constexpr int kCount = 36;  // the bit of a cell where the count begins; below it is the sum, of 2^20 to 2^28 offsets
  const int offset_bits = 24 - __builtin_ctzll(shape.bins);
  const int64_t part = shape.length / 64 + (1 << 20), parts = (shape.length + part - 1) / part;
  Buffer<uint64_t> cells(shape.rows * parts * shape.bins);
  for_units(shape.rows * parts, 1, threads, [&](int64_t unit) {
    const int64_t row = unit / parts, first = unit % parts * part;
    const typename T::type* values = x + row * shape.length;
    uint64_t* own = cells.at(unit * shape.bins);
    alignas(HDRQ_VECTOR_BYTES) uint32_t position[kChunk];
    for_chunks(first, min(first + part, shape.length), [&](int64_t begin, int64_t n) {
      for_vectors(n, [&](int64_t i, auto count) {
        const vf v = (T::load(values + begin + i, count) * 0.5f - shape.origin[row]) * shape.factor[row];
        write(__builtin_convertvector(clamp(v, 0.0f, 0x1p24f - 1.0f), vi), position + i, kLanes);
      });
      for (int64_t i = 0; i < n; ++i)
        own[position[i] >> offset_bits] += uint64_t(1) << kCount | (position[i] & ((1u << offset_bits) - 1));
    });
  });
  fill<int64_t>(table, shape.rows * shape.bins * 2, 0);
  for (int64_t i = 0; i < cells.size(); ++i) {
    int64_t* bin = table + (i / (parts * shape.bins) * shape.bins + i % shape.bins) * 2;
    bin[0] += cells[i] >> kCount;
    bin[1] += cells[i] & ((uint64_t(1) << kCount) - 1);
  }
}

}  // namespace hdrq::HDRQ_ISA
