// Codes in memory: bytes, half-words, or two 4-bit codes to a byte, the low nibble first.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace hdrq::HDRQ_ISA {

typedef uint8_t vu8_half __attribute__((vector_size(HDRQ_VECTOR_BYTES / 8)));
typedef uint16_t vu16_half __attribute__((vector_size(HDRQ_VECTOR_BYTES / 4)));

inline bool is_packed(Code type) { return type == Code::i4 || type == Code::u4; }

// Narrow integers as float32. g++ 12 would widen them lane by lane.
inline vf as_float(vi8 v) {
#if defined(HDRQ_AVX512)
  return __builtin_convertvector((vi)_mm512_cvtepi8_epi32((__m128i)v), vf);
#elif defined(HDRQ_AVX2)
  return __builtin_convertvector((vi)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bits<int64_t>(v))), vf);
#else
  return __builtin_convertvector(v, vf);
#endif
}

inline vf as_float(vi16 v) {
#if defined(HDRQ_AVX512)
  return __builtin_convertvector((vi)_mm512_cvtepi16_epi32((__m256i)v), vf);
#elif defined(HDRQ_AVX2)
  return __builtin_convertvector((vi)_mm256_cvtepi16_epi32((__m128i)v), vf);
#else
  return __builtin_convertvector(v, vf);
#endif
}

// `count` codes from element e (even) on, as float32.
inline vf read_codes(Code type, const void* codes, int64_t e, int count) {
  if (type == Code::i8) return as_float(read<vi8>(static_cast<const int8_t*>(codes) + e, count));
  if (type == Code::i16) return as_float(read<vi16>(static_cast<const int16_t*>(codes) + e, count));
  vu8_half pairs{};
  const uint8_t* first = static_cast<const uint8_t*>(codes) + e / 2;
  if (count == kLanes) __builtin_memcpy(&pairs, first, sizeof(pairs));
  else __builtin_memcpy(&pairs, first, (count + 1) / 2);
  const vu16_half wide = __builtin_convertvector(pairs, vu16_half);
  const vi8 nibbles = bits<vi8>((wide & 0x0f) | ((wide & 0xf0) << 4));
  return as_float(type == Code::i4 ? (nibbles ^ 8) - 8 : nibbles);
}

// Two codes to a byte; the code after an odd number of them is 0.
inline void pack(const int8_t* codes, int64_t n, uint8_t* bytes) {
  for (int64_t j = 0; j < n / 2; ++j) bytes[j] = uint8_t((codes[2 * j] & 15) | (codes[2 * j + 1] & 15) << 4);
  if (n % 2) bytes[n / 2] = codes[n - 1] & 15;
}

}  // namespace hdrq::HDRQ_ISA
