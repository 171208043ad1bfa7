// Every standard header, before a translation unit turns to its instruction set: what they define inline must stay code
// that runs anywhere. For the same reason no template of the standard library is instantiated after this point: the
// linker keeps one copy of an instantiation for all, and it might keep the one that needs AVX-512.
#pragma once

#include <cstdint>
#include <new>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"
#include "parallel.h"
