// Elementary functions as fixed sequences of float32 operations. Definition: hdrq/backends/reference/elementary.py.
#pragma once

#include "simd.h"

namespace hdrq::HDRQ_ISA {

// The polynomial with these coefficients, highest power first.
template <int N>
inline vf horner(const double (&coefficients)[N], vf x) {
  vf total = splat(float(coefficients[0]));
  for (int i = 1; i < N; ++i) total = total * x + float(coefficients[i]);
  return total;
}

// e^r·2^k for r in [−½ ln 2, ½ ln 2], k an integer in [−126, 127].
inline vf exp_of_parts(vf r, vf k) {
  constexpr double kTaylor[] = {1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 1.0 / 2};
  return (1.0f + (r + (r * r) * horner(kTaylor, r))) * bits<vf>((__builtin_convertvector(k, vi) + 127) << 23);
}

// 1/(1 + e^−x), within 2 ulp; beyond ±16 as at ±16.
inline vf sigmoid(vf x) {
  const vf a = -clamp(x, -16.0f, 16.0f);
  const vf k = round_even(a * 1.4426950408889634f);
  const vf r = (a - k * (22713.0f / 32768)) - k * 1.42860682030941723e-6f;
  const vf result = 1.0f / (1.0f + exp_of_parts(r, k == k ? k : vf{}));
  return x == x ? result : x;
}

// t^p for t ≥ 0 and p ≥ 0.
inline vf power(vf t, float p) {
  const vi u = bits<vi>(t), e = (u - 0x3f3504f3) >> 23;
  const vf m = bits<vf>(u - (e << 23)), s = (m - 1.0f) / (m + 1.0f);
  constexpr double kTwo = 2 * 1.4426950408889634;  // log2(e²)
  constexpr double kLog2[] = {kTwo / 9, kTwo / 7, kTwo / 5, kTwo / 3, kTwo};
  const vf x = p * (__builtin_convertvector(e, vf) + s * horner(kLog2, s * s)), k = round_even(clamp(x, -126.0f, 127.0f));
  vf y = exp_of_parts((x - k) * 0.6931471805599453f, k == k ? k : vf{});
  y = (t < 0x1p-126f) | (x < -126.0f) ? vf{} : y;
  y = x > 127.0f ? splat(__builtin_inff()) : y;
  return t == t ? y : t;
}

}  // namespace hdrq::HDRQ_ISA
