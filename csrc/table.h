// The table of this translation unit's instruction set.
#pragma once

#include "distance.h"
#include "merging.h"
#include "quantizer.h"
#include "ranges.h"
#include "rounding.h"
#include "systematic.h"

namespace hdrq {
namespace HDRQ_ISA {

inline Kernels table(const char* name) {
  Kernels k;
  k.name = name;
  k.quantizer_forward = [](int threads, Float f, const Quantizer* quantizers, int count) {
    with_float(f, [&](auto t) { quantizer_forward<decltype(t)>(threads, quantizers, count); });
  };
  k.quantizer_backward = [](int threads, Float f, const Quantizer* quantizers, int count) {
    with_float(f, [&](auto t) { quantizer_backward<decltype(t)>(threads, quantizers, count); });
  };
  k.error_histogram = [](Job j, Float f, const void* x, int64_t* counts, Grid g) {
    with_float(f, [&](auto t) {
      using T = decltype(t);
      error_histogram<T>(j, T::in(x), counts, g);
    });
  };
  k.quantize = [](Job j, Float f, const void* x, Code code, void* codes, Grid g) {
    int64_t nan = 0;
    with_float(f, [&](auto t) {
      using T = decltype(t);
      nan = code == Code::i8 ? quantize<T>(j, T::in(x), (vi8*)nullptr, codes, g)
                                         : quantize<T>(j, T::in(x), (vi16*)nullptr, codes, g);
    });
    return nan;
  };
  k.dequantize = [](Job j, Code code, const void* codes, float* y, Grid g) {
    if (code == Code::i8) dequantize(j, (vi8*)nullptr, codes, y, g);
    else dequantize(j, (vi16*)nullptr, codes, y, g);
  };
  k.drop_mix = [](Job j, Float f, const void* a, const void* b, void* y, uint32_t threshold, Stream s) {
    with_float(f, [&](auto t) {
      using T = decltype(t);
      drop_mix<T>(j, T::in(a), T::in(b), T::out(y), threshold, s);
    });
  };
  k.drop_mix_backward = [](Job j, Float f, const void* grad, void* grad_a, void* grad_b, uint32_t threshold, Stream s) {
    with_float(f, [&](auto t) {
      using T = decltype(t);
      drop_mix_backward<T>(j, T::in(grad), T::out(grad_a), T::out(grad_b), threshold, s);
    });
  };
  k.squared_distance = [](Job j, Float f, const void* w, const void* w_src) {
    double sum = 0;
    with_float(f, [&](auto t) {
      using T = decltype(t);
      sum = squared_distance<T>(j, T::in(w), T::in(w_src));
    });
    return sum;
  };
  k.scaled_difference = [](Job j, Float f, const void* w, const void* w_src, void* y, float factor) {
    with_float(f, [&](auto t) {
      using T = decltype(t);
      scaled_difference<T>(j, T::in(w), T::in(w_src), T::out(y), factor);
    });
  };
  k.adaround = [](Job j, Float f, const void* x, const float* alpha, void* y, Grid g, const float* beta, bool hard) {
    double penalty = 0;
    with_float(f, [&](auto t) {
      using T = decltype(t);
      penalty = adaround<T>(j, T::in(x), alpha, T::out(y), g, beta, hard);
    });
    return penalty;
  };
  k.adaround_backward = [](Job j, Float f, const void* grad, float grad_penalty, const void* x, const float* alpha,
                           float* grad_alpha, Grid g, const float* beta) {
    with_float(f, [&](auto t) {
      using T = decltype(t);
      adaround_backward<T>(j, T::in(grad), grad_penalty, T::in(x), alpha, grad_alpha, g, beta);
    });
  };
  k.range_errors = [](int threads, Float f, const void* x, const RangeSearch& search, double* errors) {
    with_float(f, [&](auto t) { range_errors<decltype(t)>(threads, t.in(x), search, errors); });
  };
  k.range_table = [](int threads, Float f, const void* x, const RangeTable& shape, int64_t* table) {
    with_float(f, [&](auto t) { range_table<decltype(t)>(threads, t.in(x), shape, table); });
  };
  k.merge_score = [](Job j, const Merge& m, int draws, double* sums) { merge_score(j, m, draws, sums); };
  k.merge_codes = [](Job j, const Merge& m, int draw, Code code, void* codes) {
    merge_codes(j, m, draw, code, codes);
  };
  k.merge_systematic = [](Job j, const Merge& m, float tau, Code code, void* codes) {
    merge_systematic(j, m, tau, code, codes);
  };
  return k;
}

}  // namespace HDRQ_ISA
}  // namespace hdrq
