#include "prelude.h"

#ifdef HDRQ_X86
#pragma GCC target("avx2,f16c")
#define HDRQ_AVX2
#include "table.h"

const hdrq::Kernels& hdrq::avx2_kernels() {
  static const Kernels kernels = avx2::table("avx2");
  return kernels;
}
#endif
