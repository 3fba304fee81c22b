#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#pragma GCC target("avx2,fma")
#define SVD_LANES 8
#define SVD_VARIANT avx2
#include "rows.h"
#endif
