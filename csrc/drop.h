// Family `drop`: QDrop's mixing of two tensors. Definition: hdrq/reference/drop.py.
#pragma once

#include "philox.h"

namespace hdrq::HDRQ_ISA {

// Calls body(begin + i, count, keep) for the vectors of all elements, `keep` a mask of lanes.
template <class Body>
void for_kept(Job job, uint32_t threshold, Stream stream, const Body& body) {
  stream.stream ^= 0x80000000u;
  for_tiles(job, [&](int64_t, int64_t tile_begin, int64_t tile_end) {
    const Philox philox(stream);
    alignas(HDRQ_VECTOR_BYTES) uint32_t words[kChunk];
    for_chunks(tile_begin, tile_end, [&](int64_t begin, int64_t n) {
      philox.fill(words, begin, n);
      for_vectors(n, [&](int64_t i, auto count) {
        body(begin + i, count, bits<vi>((read<vu>(words + i, kLanes) >> 8) < threshold));
      });
    });
  });
}

template <class T>
void drop_mix(Job job, const typename T::type* a, const typename T::type* b, typename T::type* y, uint32_t threshold,
              Stream stream) {
  for_kept(job, threshold, stream, [&](int64_t e, auto count, vi keep) {
    T::store(keep ? T::load(a + e, count) : T::load(b + e, count), y + e, count);
  });
}

template <class T>
void drop_mix_backward(Job job, const typename T::type* grad, typename T::type* grad_a, typename T::type* grad_b,
                       uint32_t threshold, Stream stream) {
  for_kept(job, threshold, stream, [&](int64_t e, auto count, vi keep) {
    const vf g = T::load(grad + e, count);
    T::store(keep ? g : vf{}, grad_a + e, count);
    T::store(keep ? vf{} : g, grad_b + e, count);
  });
}

}  // namespace hdrq::HDRQ_ISA
