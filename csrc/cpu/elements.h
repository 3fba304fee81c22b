// Loads and stores of float32 and bfloat16 rows as vectors of floats.
#pragma once

#include "simd.h"

namespace SVD_VARIANT {
namespace {

// Loads the first `count` elements of a vector; the others are zero.
template <class V>
SVD_HD V load_part(const char* from, int64_t count) {
  constexpr int kSize = sizeof(V) / kLanes;
#if SVD_LANES == 16
  if constexpr (kSize == 4) return (V)_mm512_maskz_loadu_epi32((1u << count) - 1, from);
  if constexpr (kSize == 2) return (V)_mm256_maskz_loadu_epi16((1u << count) - 1, from);
#endif
  V v = {};
  std::memcpy(&v, from, count * kSize);
  return v;
}

struct Float32 {
  static constexpr int kSize = 4;
  SVD_HD Vec whole(const char* from) { return load<Vec>(from); }
  SVD_HD Vec part(const char* from, int64_t count) { return load_part<Vec>(from, count); }
  SVD_HD Vec narrow(Vec v) { return v; }
  SVD_HD Vec rounded(Vec v) { return v; }
};

struct BFloat16 {
  static constexpr int kSize = 2;
  SVD_HD Vec whole(const char* from) { return widen_bfloat16(load<Half>(from)); }
  SVD_HD Vec part(const char* from, int64_t count) {
    return widen_bfloat16(load_part<Half>(from, count));
  }
  SVD_HD Half narrow(Vec v) { return narrow_bfloat16(v); }
  SVD_HD Vec rounded(Vec v) { return widen_bfloat16(narrow_bfloat16(v)); }
};

// Loads elements [k, k + kLanes) of a row of n, zeros past its end.
template <class E>
SVD_HD Vec get(const char* row, int64_t k, int64_t n) {
  const char* from = row + k * E::kSize;
  return k + kLanes <= n ? E::whole(from) : E::part(from, n - k);
}

// Stores elements [k, k + kLanes) of a row of n, none past its end.
template <class E>
SVD_HD void put(char* row, int64_t k, int64_t n, Vec v) {
  const auto narrow = E::narrow(v);
  char* to = row + k * E::kSize;
  if (k + kLanes <= n) return store(to, narrow);
  std::memcpy(to, &narrow, (n - k) * E::kSize);
}

}  // namespace
}  // namespace SVD_VARIANT
