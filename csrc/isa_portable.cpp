#include "prelude.h"

#include "table.h"

const hdrq::Kernels& hdrq::portable_kernels() {
  static const Kernels kernels = portable::table("portable");
  return kernels;
}
