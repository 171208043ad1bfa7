#include "prelude.h"

#ifdef HDRQ_X86
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define HDRQ_AVX512
#include "table.h"

const hdrq::Kernels& hdrq::avx512_kernels() {
  static const Kernels kernels = avx512::table("avx512");
  return kernels;
}
#endif
