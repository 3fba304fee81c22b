// Vectors of floats: reductions, the exponential, and conversions from and to 16-bit floats. The
// including source sets SVD_LANES and SVD_VARIANT. Do not instantiate a standard template here
// (row.h says why).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../row.h"

#define SVD_INLINE __attribute__((always_inline))

namespace SVD_VARIANT {
namespace {

constexpr int kLanes = SVD_LANES;

typedef float Vec __attribute__((vector_size(4 * SVD_LANES)));
typedef int32_t Int __attribute__((vector_size(4 * SVD_LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * SVD_LANES)));
typedef uint16_t Half __attribute__((vector_size(2 * SVD_LANES)));
typedef uint64_t Words __attribute__((vector_size(4 * SVD_LANES)));  // kLanes / 2 of them

template <class V, class T>
SVD_HD V load(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class V, class T>
SVD_HD void store(T* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

SVD_HD Vec max(Vec a, Vec b) { return a > b ? a : b; }  // b where either is NaN

// Reduces the lanes to one value, in a fixed order.
template <class Join>
SVD_HD float fold(Vec v, const Join& join) {
  typedef float Four __attribute__((vector_size(16)));
  Four part[4];
  std::memcpy(part, &v, sizeof v);
  if constexpr (kLanes == 16) part[0] = join(part[0], part[2]), part[1] = join(part[1], part[3]);
  if constexpr (kLanes >= 8) part[0] = join(part[0], part[1]);
  return join(join(part[0][0], part[0][2]), join(part[0][1], part[0][3]));
}

SVD_HD float max_of(Vec v) {
  return fold(v, [](auto a, auto b) SVD_INLINE { return a > b ? a : b; });
}

SVD_HD float sum_of(Vec v) {
  return fold(v, [](auto a, auto b) SVD_INLINE { return a + b; });
}

SVD_HD bool any(Int mask) {
  int32_t lane[kLanes], seen = 0;
  store(lane, mask);
  for (int i = 0; i < kLanes; ++i) seen |= lane[i];
  return seen != 0;
}

// e^x for x <= 0, with an error of at most 1.4 ulp, or 5 ulp below e^-20; 0 where it would be
// subnormal; NaN for NaN. With n = x / log 2 rounded to an integer, it is 2^n e^r, where e^r is a
// polynomial in r = x - n log 2.
SVD_HD Vec exp(Vec x) {
  // Adding 1.5 * 2^23 leaves no room for a fraction: the sum's low bits are n + 127, the exponent
  // field of the float 2^n, which a shift by 23 then puts in place.
  const Vec shifted = x * 1.44269504f + (12582912.0f + 127.0f);
  const Vec n = shifted - (12582912.0f + 127.0f);
  // Without a fused multiply-add the product must be exact, so log 2 is split into two parts.
  const Vec r = kLanes == 4 ? (x - n * 0.693359375f) - n * -2.12194440e-4f : x - n * 0.69314718f;
  Vec y = Vec{} + 1.38149318e-3f;
  y = y * r + 8.36870819e-3f;
  y = y * r + 4.16683853e-2f;
  y = y * r + 1.66665211e-1f;
  y = y * r + 0.49999994f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  return x < -87.3f ? Vec{} : y * (Vec)((Int)shifted << 23);
}

SVD_HD Bits widen(Half h) {
#if SVD_LANES == 16
  return (Bits)_mm512_cvtepu16_epi32((__m256i)h);  // GCC 12 splits the conversion in two
#elif SVD_LANES == 8
  return (Bits)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, Bits);
#endif
}

SVD_HD Vec widen_bfloat16(Half h) { return (Vec)(widen(h) << 16); }

SVD_HD Vec widen_float16(Half h) {
  const Bits bits = widen(h), magnitude = (bits & 0x7FFF) << 13;
  // The exponent bias of float16 is 112 less. The product also normalises subnormals; the exponent
  // of inf and NaN is set below.
  const Bits scaled = (Bits)((Vec)magnitude * 0x1p112f);
  const Bits special = (Bits)(magnitude >= 0x0F800000) & 0x7F800000;
  return (Vec)(scaled | special | (bits & 0x8000) << 16);
}

SVD_HD Half narrow_bfloat16(Vec v) {
  const Bits bits = (Bits)v, rounded = bits + 0x7FFF + (bits >> 16 & 1);
  return __builtin_convertvector((v == v ? rounded : Bits{} + 0x7FC00000) >> 16, Half);
}

SVD_HD Half narrow_float16(Vec v) {
  const Bits sign = (Bits)v >> 16 & 0x8000, bits = (Bits)v & 0x7FFFFFFF;
  const Bits normal = (bits - 0x38000000 + 0xFFF + (bits >> 13 & 1)) >> 13;
  const Bits subnormal = (Bits)((Vec)bits + 0.5f) - 0x3F000000;  // the sum rounds to 2^-24
  const Bits special = bits > 0x7F800000 ? Bits{} + 0x7E00 : Bits{} + 0x7C00;
  const Bits finite = bits < 0x38800000 ? subnormal : normal;
  return __builtin_convertvector((bits < 0x47800000 ? finite : special) | sign, Half);
}

}  // namespace
}  // namespace SVD_VARIANT
