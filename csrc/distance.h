// Family `distance`: the norm of w − w_src, and its gradient. Definition: hdrq/backends/reference/distance.py.
#pragma once

#include "simd.h"

namespace hdrq::HDRQ_ISA {

template <class T>
double squared_distance(Job job, const typename T::type* w, const typename T::type* w_src) {
  Buffer<double> partial(tiles(job.count));
  for_tiles(job, [&](int64_t tile, int64_t begin, int64_t end) {
    Sum sum;
    for_vectors(end - begin, [&](int64_t i, auto count) {
      const vf d = T::load(w + begin + i, count) - T::load(w_src + begin + i, count);
      sum.add_product(d, d);
    });
    partial[tile] = sum.total();
  });
  double sum = 0;
  for (int64_t tile = 0; tile < partial.size(); ++tile) sum += partial[tile];
  return sum;
}

template <class T>
void scaled_difference(Job job, const typename T::type* w, const typename T::type* w_src, typename T::type* y,
                       float factor) {
  for_tiles(job, [&](int64_t, int64_t begin, int64_t end) {
    for_vectors(end - begin, [&](int64_t i, auto count) {
      const int64_t e = begin + i;
      T::store((T::load(w + e, count) - T::load(w_src + e, count)) * factor, y + e, count);
    });
  });
}

}  // namespace hdrq::HDRQ_ISA
