// Family `drop`: QDrop's mixing of two tensors. Definition: hdrq/backends/reference/drop.py.
#pragma once

#include "philox.h"

namespace hdrq::HDRQ_ISA {

// Which elements of a chunk are quantized: all of them.
struct KeepAll {
  void seek(int64_t, int64_t) {}
  vi at(int64_t) const { return ~vi{}; }
};

// Those whose coin keeps them: half a word each.
class KeepSome {
 public:
  KeepSome(Stream stream, uint32_t threshold) : philox_(second(stream)), threshold_(int32_t(threshold)) {}

  void seek(int64_t begin, int64_t n) { philox_.fill(pairs_, begin / 2, (n + 1) / 2); }
  vi at(int64_t i) const {
    const auto* coins = reinterpret_cast<const uint16_t*>(pairs_);  // a word's low half first, as this machine has it
    return __builtin_convertvector(read<vu16>(coins + i, kLanes), vi) < threshold_;
  }

 private:
  static Stream second(Stream stream) {
    stream.stream ^= 0x80000000u;
    return stream;
  }

  Philox philox_;
  int32_t threshold_;
  alignas(HDRQ_VECTOR_BYTES) uint32_t pairs_[kChunk / 2];
};

// Calls body(begin + i, count, keep) for the vectors of all elements, `keep` a mask of lanes.
template <class Body>
void for_kept(Job job, uint32_t threshold, Stream stream, const Body& body) {
  for_tiles(job, [&](int64_t, int64_t tile_begin, int64_t tile_end) {
    KeepSome keep(stream, threshold);
    for_chunks<kDraw>(tile_begin, tile_end, [&](int64_t begin, int64_t n) {
      keep.seek(begin, n);
      for_vectors(n, [&](int64_t i, auto count) { body(begin + i, count, keep.at(i)); });
    });
  });
}

template <class T>
void drop_mix(Job job, const typename T::type* a, const typename T::type* b, typename T::type* y, uint32_t threshold,
              Stream stream) {
  for_kept(job, threshold, stream, [&](int64_t e, auto count, vi keep) {
    const vf kept = loaded(T::load(a + e, count)), other = loaded(T::load(b + e, count));
    T::store(keep ? kept : other, y + e, count);
  });
}

template <class T>
void drop_mix_backward(Job job, const typename T::type* grad, typename T::type* grad_a, typename T::type* grad_b,
                       uint32_t threshold, Stream stream) {
  for_kept(job, threshold, stream, [&](int64_t e, auto count, vi keep) {
    const vf g = loaded(T::load(grad + e, count));
    T::store(keep ? g : vf{}, grad_a + e, count);
    T::store(keep ? vf{} : g, grad_b + e, count);
  });
}

}  // namespace hdrq::HDRQ_ISA
