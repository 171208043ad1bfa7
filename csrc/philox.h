// Philox4x32-7 (Salmon et al., SC 2011) over vectors, four neighbouring elements to a counter; see hdrq/rng.py.
#pragma once

#include "simd.h"

namespace hdrq::HDRQ_ISA {

// The product of the low 32 bits of each 64-bit lane.
inline vu64 multiply_low(vu64 a, vu64 b) {
#if defined(HDRQ_AVX512)
  return (vu64)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(HDRQ_AVX2)
  return (vu64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (vu64)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// a ^ b ^ c: one instruction where there is one, which g++ 12 does not find by itself.
inline vu64 exclusive_or(vu64 a, vu64 b, vu64 c) {
#if defined(HDRQ_AVX512)
  return (vu64)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
#else
  return a ^ b ^ c;
#endif
}

// Per 64-bit lane: the low half of `first`, then the low half of `second`.
inline vu64 low_halves(vu64 first, vu64 second) {
#if defined(HDRQ_AVX512)
  return (vu64)_mm512_mask_shuffle_epi32((__m512i)first, 0xAAAA, (__m512i)second, _MM_PERM_CCAA);
#elif defined(HDRQ_AVX2)
  return (vu64)_mm256_blend_epi32((__m256i)first, (__m256i)(second << 32), 0xAA);
#else
  return (first & 0xffffffffu) | (second << 32);
#endif
}

// One counter to a 64-bit lane. Only the low half of a lane counts: what a round leaves in the high half is never read,
// which spares the masks. Lanes are numbered so that interleaving 64-bit halves puts the words in order.
class Philox {
 public:
  explicit Philox(Stream s) : stream_(vu64{} + s.stream), step_(vu64{} + s.step) {
    uint32_t k0 = uint32_t(s.seed), k1 = uint32_t(s.seed >> 32);
    for (int r = 0; r < kRounds; ++r, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) key_[r][0] = k0, key_[r][1] = k1;
    for (int lane = 0; lane < kGroups; ++lane) lane_[lane] = (lane >> 1) + (lane & 1) * (kGroups / 2);
  }

  // The words of the elements from `first` (a multiple of 4) on; writes up to the next multiple of 4·kGroups·kTogether.
  // No multiple of 2^34 may lie among them but as the first: the high half of their counters is one number. All but
  // the counter's low half being constant, half of the first two rounds is too, and the first product grows by addition.
  // Counters are worked on kTogether vectors at a time, to fill the waits of each other's multiplications: four
  // where there are 32 registers, two where there are 16, since four would not fit.
  void fill(uint32_t* words, int64_t first, int64_t count) const {
    const vu64 stream_product = multiply_low(stream_, kSecond), high = vu64{} + (uint64_t(first) >> 34);
    const vu64 constant = exclusive_or(stream_product >> 32, high, vu64{} + key_[0][0]);
    const vu64 constant_product = multiply_low(constant, kFirst);
    const vu64 first_key = step_ ^ key_[0][1];
    const vu64 second_key0 = stream_product ^ key_[1][0], second_key1 = (constant_product >> 32) ^ key_[1][1];
    vu64 product = multiply_low(lane_ + (uint64_t(first) >> 2), kFirst);
    for (int64_t i = 0; i < count; i += 4 * kGroups * kTogether) {
      vu64 c0[kTogether], c1[kTogether], c2[kTogether], c3[kTogether];
#pragma GCC unroll 4
      for (int t = 0; t < kTogether; ++t, product += kGroups * uint64_t{0xD2511F53u}) {
        c1[t] = multiply_low((product >> 32) ^ first_key, kSecond);
        c0[t] = (c1[t] >> 32) ^ second_key0;
        c2[t] = product ^ second_key1;
        c3[t] = constant_product;
      }
#pragma GCC unroll 7
      for (int r = 2; r < kRounds; ++r) {
        const vu64 k0 = vu64{} + key_[r][0], k1 = vu64{} + key_[r][1];
#pragma GCC unroll 4
        for (int t = 0; t < kTogether; ++t) {
          const vu64 p0 = multiply_low(c0[t], kFirst), p1 = multiply_low(c2[t], kSecond);
          c0[t] = exclusive_or(p1 >> 32, c1[t], k0);
          c2[t] = exclusive_or(p0 >> 32, c3[t], k1);
          c1[t] = p1;
          c3[t] = p0;
        }
      }
#pragma GCC unroll 4
      for (int t = 0; t < kTogether; ++t) {
        const vu64 first_two = low_halves(c0[t], c1[t]), last_two = low_halves(c2[t], c3[t]);
        const vu64 ordered[2] = {interleave_low(first_two, last_two), interleave_high(first_two, last_two)};
        __builtin_memcpy(words + i + 4 * kGroups * t, ordered, sizeof(ordered));
      }
    }
  }

 private:
  static constexpr int kRounds = 7, kGroups = HDRQ_VECTOR_BYTES / 8, kTogether = HDRQ_VECTOR_BYTES == 64 ? 4 : 2;
  static constexpr vu64 kFirst = vu64{} + 0xD2511F53u, kSecond = vu64{} + 0xCD9E8D57u;

#if defined(HDRQ_AVX512)
  static vu64 interleave_low(vu64 a, vu64 b) { return (vu64)_mm512_unpacklo_epi64((__m512i)a, (__m512i)b); }
  static vu64 interleave_high(vu64 a, vu64 b) { return (vu64)_mm512_unpackhi_epi64((__m512i)a, (__m512i)b); }
#elif defined(HDRQ_AVX2)
  static vu64 interleave_low(vu64 a, vu64 b) { return (vu64)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b); }
  static vu64 interleave_high(vu64 a, vu64 b) { return (vu64)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b); }
#else
  static vu64 interleave_low(vu64 a, vu64 b) { return vu64{a[0], b[0]}; }
  static vu64 interleave_high(vu64 a, vu64 b) { return vu64{a[1], b[1]}; }
#endif

  vu64 lane_{}, stream_, step_;
  uint64_t key_[kRounds][2];
};

}  // namespace hdrq::HDRQ_ISA
