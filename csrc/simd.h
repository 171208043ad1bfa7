// Vectors of the instruction set that this translation unit is compiled for, as GCC vector types: arithmetic and
// comparisons are the language's own operators, lane by lane. Included after `#pragma GCC target`, inside no namespace.
#pragma once

#include "parallel.h"

#if defined(HDRQ_AVX512)
#define HDRQ_ISA avx512
#define HDRQ_VECTOR_BYTES 64
#elif defined(HDRQ_AVX2)
#define HDRQ_ISA avx2
#define HDRQ_VECTOR_BYTES 32
#else
#define HDRQ_ISA portable
#define HDRQ_VECTOR_BYTES 16
#endif

// For what a loop does to each vector: where it stands in many loops, a compiler leaves a call in some.
#define HDRQ_INLINE inline __attribute__((always_inline))

namespace hdrq::HDRQ_ISA {

constexpr int kLanes = HDRQ_VECTOR_BYTES / 4;

typedef float vf __attribute__((vector_size(HDRQ_VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(HDRQ_VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(HDRQ_VECTOR_BYTES)));
typedef uint64_t vu64 __attribute__((vector_size(HDRQ_VECTOR_BYTES)));
typedef double vd __attribute__((vector_size(HDRQ_VECTOR_BYTES)));
typedef float vf_half __attribute__((vector_size(HDRQ_VECTOR_BYTES / 2)));
typedef int32_t vi_half __attribute__((vector_size(HDRQ_VECTOR_BYTES / 2)));
typedef uint16_t vu16 __attribute__((vector_size(HDRQ_VECTOR_BYTES / 2)));
typedef int16_t vi16 __attribute__((vector_size(HDRQ_VECTOR_BYTES / 2)));
typedef int8_t vi8 __attribute__((vector_size(HDRQ_VECTOR_BYTES / 4)));

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a < b ? b : a; }

template <class T>
inline void fill(T* p, int64_t count, T value) {
  for (int64_t i = 0; i < count; ++i) p[i] = value;
}

// Zeroed memory, aligned for vectors. Not std::vector: see prelude.h.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : size_(count), data_(allocate(count < 0 ? 0 : count)) {
    for (int64_t i = 0; i < count; ++i) new (data_ + i) T{};
  }
  ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  T* at(int64_t i) { return data_ + i; }
  const T* at(int64_t i) const { return data_ + i; }
  int64_t size() const { return size_; }

 private:
  static T* allocate(int64_t count) {
    return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(64)));
  }
  int64_t size_;
  T* data_;
};

inline vf splat(float v) { return vf{} + v; }

template <class V>
using lane_of = std::remove_reference_t<decltype(V{}[0])>;

// A reinterpretation of the same bits.
template <class To, class From>
inline To bits(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  __builtin_memcpy(&result, &v, sizeof(v));
  return result;
}

// Raw lanes from and to memory; `count` of them at a tensor's end.
template <class V, class T>
inline V read(const T* p, int count) {
  V v{};
  if (count == kLanes)
    __builtin_memcpy(&v, p, sizeof(v));
  else
    __builtin_memcpy(&v, p, count * sizeof(T));
  return v;
}

template <class V, class T>
inline void write(V v, T* p, int count) {
  if (count == kLanes)
    __builtin_memcpy(p, &v, sizeof(v));
  else
    __builtin_memcpy(p, &v, count * sizeof(T));
}

// Elements of each type, widened to float32 and rounded once, to nearest even, on the way out.
template <class Raw>
struct Elements {
  using type = Raw;
  static const Raw* in(const void* p) { return static_cast<const Raw*>(p); }
  static Raw* out(void* p) { return static_cast<Raw*>(p); }
};

struct F32 : Elements<float> {
  static vf load(const type* p, int count) { return read<vf>(p, count); }
  static void store(vf v, type* p, int count) { write(v, p, count); }
};

struct BF16 : Elements<uint16_t> {
  static vf load(const type* p, int count) {
    return bits<vf>(__builtin_convertvector(read<vu16>(p, count), vu) << 16);
  }
  static void store(vf v, type* p, int count) {
    const vu u = bits<vu>(v);
    const vu even = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    const vu nan = (u >> 16) | 0x40;
    write(__builtin_convertvector(v == v ? even : nan, vu16), p, count);
  }
};

struct F16 : Elements<uint16_t> {
  static vf load(const type* p, int count) { return widen(read<vu16>(p, count)); }
  static void store(vf v, type* p, int count) { write(narrow(v), p, count); }

#if defined(HDRQ_AVX512)
  static vf widen(vu16 h) { return (vf)_mm512_cvtph_ps((__m256i)h); }
  static vu16 narrow(vf v) { return (vu16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#elif defined(HDRQ_AVX2)
  static vf widen(vu16 h) { return (vf)_mm256_cvtph_ps((__m128i)h); }
  static vu16 narrow(vf v) { return (vu16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#else
  static vf widen(vu16 half) {
    // The exponent is rebiased by a product with 2^112, which also makes subnormals normal; infinity and NaN apart.
    const vu h = __builtin_convertvector(half, vu);
    const vu magnitude = (h & 0x7fff) << 13;
    const vf finite = bits<vf>(magnitude) * 0x1p112f;
    const vu special = magnitude | 0x7f800000;
    return bits<vf>(((h & 0x8000) << 16) | ((h & 0x7c00) == 0x7c00 ? special : bits<vu>(finite)));
  }
  static vu16 narrow(vf v) {
    const vu u = bits<vu>(v), magnitude = u & 0x7fffffff;
    // Subnormal halves: adding 0.5 makes float32's own rounding drop the right number of bits.
    const vu small = bits<vu>(bits<vf>(magnitude) + 0.5f) - bits<vu>(splat(0.5f));
    const vu normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
    vu h = magnitude < (113u << 23) ? small : normal;
    h = magnitude >= 0x477ff000 ? 0x7c00 + (vu{}) : h;  // 65520 and more round to infinity
    h = magnitude > 0x7f800000 ? 0x7e00 + (vu{}) : h;
    return __builtin_convertvector(h | ((u >> 16) & 0x8000), vu16);
  }
#endif
};

// Whether any lane of a mask is true.
inline bool any(vi mask) {
#if defined(HDRQ_AVX512)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(HDRQ_AVX2)
  return _mm256_movemask_epi8((__m256i)mask);
#else
  int32_t all = 0;
  for (int lane = 0; lane < kLanes; ++lane) all |= mask[lane];
  return all;
#endif
}

// table[index], lane by lane.
inline vu gather(const uint32_t* table, vu index) {
#if defined(HDRQ_AVX512)
  return (vu)_mm512_i32gather_epi32((__m512i)index, table, 4);
#else
  vu v;
  for (int lane = 0; lane < kLanes; ++lane) v[lane] = table[index[lane]];
  return v;
#endif
}

// A vector that is in a register from here on. Without this a compiler turns "load, then choose" into a masked load,
// which AMD's prefetcher does not follow: it doubled the time of drop_mix.
inline vf loaded(vf v) {
#if defined(HDRQ_AVX512)
  asm("" : "+v"(v));
#endif
  return v;
}

// Round to nearest even: adding 2^23 leaves no fraction bits. Larger magnitudes, infinities and NaN are themselves.
inline vf round_even(vf v) {
  const vu sign = bits<vu>(v) & 0x80000000u;
  const vf magnitude = bits<vf>(bits<vu>(v) & 0x7fffffffu);
  const vf rounded = bits<vf>(bits<vu>((magnitude + 0x1p23f) - 0x1p23f) | sign);
  return magnitude < 0x1p23f ? rounded : v;
}

// To the next integer below.
inline vf floor(vf v) {
  const vf rounded = round_even(v);
  return rounded > v ? rounded - 1.0f : rounded;
}

// NaN passes through. With both sides of a choice in its comparison it is one instruction.
inline vf clamp(vf v, float low, float high) {
  const vf lowest = splat(low), highest = splat(high);
  v = highest < v ? highest : v;
  return lowest > v ? lowest : v;
}

// The lanes of a vector that hold elements: the rest of a partial vector must not count in a sum.
inline vf only(vf v, int count) {
  for (int lane = count; lane < kLanes; ++lane) v[lane] = 0.0f;
  return v;
}

// A vector's lanes in float64.
struct Wide {
  vd low, high;
  explicit Wide(vf v) {
    vf_half half[2];
    __builtin_memcpy(half, &v, sizeof(v));
    low = __builtin_convertvector(half[0], vd);
    high = __builtin_convertvector(half[1], vd);
  }
};

inline vi joined(vi_half low, vi_half high) {
  vi both;
  __builtin_memcpy(&both, &low, sizeof(low));
  __builtin_memcpy(reinterpret_cast<char*>(&both) + sizeof(low), &high, sizeof(high));
  return both;
}

// A sum in float64 of float32 terms, or of products of them, lane by lane.
struct Sum {
  vd low{}, high{};
  void add(vf v) {
    const Wide a(v);
    low += a.low;
    high += a.high;
  }
  void add_product(vf v, vf w) {
    const Wide a(v), b(w);
    low += a.low * b.low;
    high += a.high * b.high;
  }
  double total() const {
    const vd both = low + high;
    double sum = 0;
    for (int i = 0; i < kLanes / 2; ++i) sum += both[i];
    return sum;
  }
};

// body(i, count): vectors of a run of n elements, the last one maybe partial. A whole vector's count is a constant of
// its type, so its loads and stores are single instructions whatever the compiler inlines.
template <class Body>
inline void for_vectors(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, std::integral_constant<int, kLanes>{});
  if (i < n) body(i, int(n - i));
}

// body(unit): all units, over threads of at least `fewest` units each.
template <class Body>
inline void for_units(int64_t units, int64_t fewest, int threads, const Body& body) {
  run_units(
      units, fewest, threads,
      [](const void* context, int64_t unit) { (*static_cast<const Body*>(context))(unit); }, &body);
}

// body(tile, begin, end): all tiles, over threads.
template <class Body>
inline void for_tiles(Job job, const Body& body) {
  for_units(tiles(job.count), kTilesPerThread, job.threads,
            [&](int64_t tile) { body(tile, tile * kTile, min((tile + 1) * kTile, job.count)); });
}

// Begin to fetch kDraw elements of each tensor, line by line in turn; an address that is no memory does no harm.
template <class T, class... Same>
inline void prefetch(const T* p, const Same*... others) {
  for (int64_t i = 0; i < kDraw; i += 64 / int64_t(sizeof(T))) {
    __builtin_prefetch(p + i);
    (__builtin_prefetch(others + i), ...);
  }
}

// body(begin, n): chunks of a tile, or parts of `size` elements.
template <int64_t size = kChunk, class Body>
inline void for_chunks(int64_t begin, int64_t end, const Body& body) {
  for (int64_t c = begin; c < end; c += size) body(c, min(size, end - c));
}

// Calls body with the struct of an element type.
template <class Body>
inline void with_float(Float type, const Body& body) {
  if (type == Float::f32) body(F32{});
  else if (type == Float::bf16) body(BF16{});
  else body(F16{});
}

}  // namespace hdrq::HDRQ_ISA
