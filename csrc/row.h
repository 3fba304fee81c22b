// The mathematics of one token and the sampling noise, the same on every device.
//
// `F` is a float, or a vector of floats in csrc/cpu/rows.h: conditions select, they never branch.
// Everything has internal linkage: rows.h is compiled for several instruction sets, and a function
// shared between those objects could be taken from the wrong one.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define SVD_HD static __host__ __device__ __forceinline__
#else
#define SVD_HD static inline __attribute__((always_inline, unused))
#endif

// What a row's tokens need to know about the row. D is the mean of d = adapted - base under p.
struct RowStats {
  float top;        // max adapted
  float mass;       // sum of exp(adapted - top), NaN for a row with NaN or +inf
  float mean;       // D, over the tokens on which the base has an opinion
  float threshold;  // the support is adapted >= threshold
};

struct Steering {
  float strength;
  float log_alpha;
  float penalty;
};

// `opinion` and `gap` are the sums of exp(adapted - top) and exp(adapted - top) * d over the tokens
// with a base logit above -inf.
SVD_HD RowStats row_stats(float top, float mass, float opinion, float gap, float log_alpha) {
  return {top, mass, opinion > 0 ? gap / opinion : 0.0f, top + log_alpha};
}

SVD_HD bool is_valid(const RowStats& row) {
  return row.mass == row.mass && row.top > -INFINITY && row.top < INFINITY;
}

// d = adapted - base, 0 where either is -inf.
template <class F>
SVD_HD F difference(F adapted, F base) {
  return ((adapted > -INFINITY) & (base > -INFINITY)) ? adapted - base : F{};
}

// (10) for a token of weight e = exp(adapted - top) in a valid row.
template <class F>
SVD_HD F steering(F adapted, F base, F e, const RowStats& row) {
  return base > -INFINITY ? e / row.mass * (row.mean - difference(adapted, base)) : F{};
}

// (12)-(14) for a token of weight e = exp(adapted - top) in a valid row.
template <class F>
SVD_HD F steered(F adapted, F base, F e, const RowStats& row, const Steering& by) {
  const F delta = steering(adapted, base, e, row);
  // strength * -inf is never formed: it is NaN at 0 and +inf below.
  const F off = by.penalty == -INFINITY ? F{} - INFINITY
                                        : adapted + std::fabs(by.strength) * by.penalty;
  const F kept = adapted >= row.threshold ? adapted + by.strength * delta : off;
  return adapted > -INFINITY ? kept : adapted;
}

// First word of Philox4x32-10 with key = seed and counter = (token, position, 0). A Word is a
// uint64_t, or a vector of them, that holds 32 bits.
template <class Word>
SVD_HD Word philox(uint64_t seed, Word token, uint64_t position) {
  constexpr uint64_t mask = 0xFFFFFFFF;
  Word c0 = token & mask, c1 = Word{} + (position & mask), c2 = Word{} + (position >> 32);
  Word c3 = Word{};
  uint64_t k0 = seed & mask, k1 = seed >> 32;
  for (int round = 0; round < 10; ++round) {
    const Word product0 = c0 * uint64_t{0xD2511F53}, product1 = c2 * uint64_t{0xCD9E8D57};
    c0 = (product1 >> 32) ^ c1 ^ k0;
    c1 = product1 & mask;
    c2 = (product0 >> 32) ^ c3 ^ k1;
    c3 = product0 & mask;
    k0 = (k0 + 0x9E3779B9) & mask;
    k1 = (k1 + 0xBB67AE85) & mask;
  }
  return c0;
}

// -log(-log(1 - u)) of u = (bits + 1/2) / 2^32. Each tail is formed from the side where the
// logarithm is dense, so none of the 32 bits is lost: also in float, whose error is a few 1e-7.
template <class Real = double>
SVD_HD float gumbel(uint32_t bits) {
  constexpr Real unit = Real(1.0 / 4294967296.0), half = Real(0.5);
  const Real exponential = bits < 0x80000000u ? -std::log1p(-(bits + half) * unit)
                                              : -std::log((0xFFFFFFFFu - bits + half) * unit);
  return static_cast<float>(-std::log(exponential));
}
