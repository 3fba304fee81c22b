// The mathematics of one token and the sampling noise, for the CPU and for CUDA. The names are
// those of the glossary in kernels/reference.py, and so are the equation numbers.
//
// `F` is a float, or in csrc/cpu/rows.h a vector of floats: conditions select, they never branch.
//
// Everything has internal linkage. csrc/cpu compiles this header once per instruction set, and the
// linker keeps one copy of an inline function that has external linkage: AVX-512 code could then
// end up in the variant for older processors, where it is an illegal instruction. For the same
// reason the headers of the variants instantiate no standard template.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define SVD_HD static __host__ __device__ __forceinline__
#else
#define SVD_HD static inline __attribute__((always_inline, unused))
#endif

// The statistics of a row that its tokens are steered with.
struct RowStats {
  float peak;       // max adapted
  float sum_exp;    // sum of e = exp(adapted - peak); NaN for a row with NaN or +inf
  float mean_d;     // E_p[d] over the tokens in base
  float threshold;  // peak + log(alpha): a token is in the support if adapted >= threshold
};

struct Steering {
  float strength;
  float log_alpha;
  float penalty;
  bool projected;  // delta is p (mean_d - d), otherwise mean_d - d
};

// From the max and the three sums of a whole row.
SVD_HD RowStats row_stats(float peak, float sum_exp, float sum_exp_in_base, float sum_exp_d,
                          float log_alpha) {
  return {peak, sum_exp, sum_exp_in_base > 0 ? sum_exp_d / sum_exp_in_base : 0.0f,
          peak + log_alpha};
}

SVD_HD bool is_valid(const RowStats& row) {
  return row.sum_exp == row.sum_exp && row.peak > -INFINITY && row.peak < INFINITY;
}

// d = adapted - base, 0 where either is -inf.
template <class F>
SVD_HD F difference(F adapted, F base) {
  return ((adapted > -INFINITY) & (base > -INFINITY)) ? adapted - base : F{};
}

// delta = p (E_p[d] - d)  (10) of a token in a valid row, or without the factor p; 0 if the token is
// impossible or not in base; e = exp(adapted - peak).
template <class F>
SVD_HD F delta_of(F adapted, F base, F e, const RowStats& row, bool projected) {
  const F away = row.mean_d - difference(adapted, base);
  const F delta = projected ? e / row.sum_exp * away : away;
  return ((adapted > -INFINITY) & (base > -INFINITY)) ? delta : F{};
}

// The steered logit  (12)-(14) of a token in a valid row; e = exp(adapted - peak).
template <class F>
SVD_HD F steered(F adapted, F base, F e, const RowStats& row, const Steering& steering) {
  const F delta = delta_of(adapted, base, e, row, steering.projected);
  // strength * -inf is never formed: it is NaN for strength 0 and +inf for a negative one.
  const F off = steering.penalty == -INFINITY
                    ? F{} - INFINITY
                    : adapted + std::fabs(steering.strength) * steering.penalty;
  const F kept = adapted >= row.threshold ? adapted + steering.strength * delta : off;
  return adapted > -INFINITY ? kept : adapted;
}

// (logit - peak) / temperature + noise for `away` = logit - peak, times the temperature if that is
// below 1, so that the quotient does not overflow: the greatest merit is chosen.
SVD_HD float merit_of(float away, float noise, float temperature) {
  return away / std::fmax(temperature, 1.0f) + std::fmin(temperature, 1.0f) * noise;
}

// The four output words of Philox4x32-10 with key = seed and counter = (four, position, 0): the random
// bits of tokens 4 four to 4 four + 3. A Word is a uint64_t, or a vector of uint64_t, and holds 32
// bits per element.
template <class Word>
struct FourWords {
  Word of[4];
};
template <class Word>
SVD_HD FourWords<Word> philox(uint64_t seed, Word four, uint64_t position) {
  constexpr uint64_t mask = 0xFFFFFFFF;
  Word c0 = four & mask, c1 = Word{} + (position & mask), c2 = Word{} + (position >> 32);
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
  return {{c0, c1, c2, c3}};
}

// Standard Gumbel noise -log(-log(1 - u)) with u = (bits + 1/2) / 2^32. Each tail is computed from
// the side where floating-point numbers are dense, so none of the 32 bits is lost, not even in
// float, where the error is a few 1e-7.
template <class Real = double>
SVD_HD float gumbel(uint32_t bits) {
  constexpr Real unit = Real(1.0 / 4294967296.0), half = Real(0.5);
  const Real exponential = bits < 0x80000000u ? -std::log1p(-(bits + half) * unit)
                                              : -std::log((0xFFFFFFFFu - bits + half) * unit);
  return static_cast<float>(-std::log(exponential));
}
