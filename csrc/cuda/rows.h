// Shared by the CUDA kernels: loading and storing a tile of a row, and the sums of a tile. Names
// are those of the glossary in kernels/reference.py.
//
// A row is cut into tiles of `kTile` tokens regardless of the number of rows, and sums are formed
// in one fixed order: a row's result has the same bits alone and in any batch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../row.h"

#define SVD_DEVICE static __device__ __forceinline__

namespace {

constexpr int kTile = 2048;
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFF;
constexpr int kRun = 8;  // consecutive tokens per thread where 16-byte accesses fit

enum class Dtype : int { kFloat32, kBFloat16, kFloat16 };

// Rows of logits; `stride` counts elements.
struct Logits {
  void* data;
  int64_t stride;
  Dtype dtype;
};

template <class T>
SVD_DEVICE T* row_of(const Logits& logits, int row) {
  return static_cast<T*>(logits.data) + row * logits.stride;
}

SVD_DEVICE float widen(float x) { return x; }
SVD_DEVICE float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
SVD_DEVICE float widen(__half x) { return __half2float(x); }

template <class T>
SVD_DEVICE T narrow(float x) {
  if constexpr (sizeof(T) == 4) return x;
  else if constexpr (std::is_same<T, __half>::value) return __float2half_rn(x);
  else return __float2bfloat16_rn(x);
}

// The memory image of a run.
template <class T>
struct Run {
  static constexpr int kWords = kRun * sizeof(T) / sizeof(uint4);
  uint4 word[kWords];
};

template <class T>
constexpr uint32_t kImpossible = 0xFF800000;  // four bytes of -inf
template <>
constexpr uint32_t kImpossible<__nv_bfloat16> = 0xFF80FF80;
template <>
constexpr uint32_t kImpossible<__half> = 0xFC00FC00;

// Which tokens of a tile this thread holds: element j is token `begin + place<...>(j)`, ascending
// in j. Aligned: each thread holds runs of consecutive tokens, and the runs of a warp are adjacent.
// Otherwise the tokens of a warp are adjacent, so that scalar accesses coalesce.
template <bool kAligned, int kThreads>
SVD_DEVICE int place(int j) {
  const int thread = threadIdx.x;
  return kAligned ? (j / kRun * kThreads + thread) * kRun + j % kRun : j * kThreads + thread;
}

// Loads the logits of the tile at `begin` as float32, -inf outside the vocabulary. If aligned,
// `vocab` is a multiple of kRun.
template <bool kAligned, int kThreads, class T, int kEach>
SVD_DEVICE void load(const T* row, int begin, int vocab, float (&values)[kEach]) {
  static_assert(kEach * kThreads == kTile && kEach % kRun == 0, "a thread holds whole runs");
  if constexpr (kAligned) {
    Run<T> runs[kEach / kRun];
#pragma unroll
    for (int i = 0; i < kEach / kRun; ++i) {
      const int token = begin + place<kAligned, kThreads>(i * kRun);
#pragma unroll
      for (int k = 0; k < Run<T>::kWords; ++k) {
        runs[i].word[k] = {kImpossible<T>, kImpossible<T>, kImpossible<T>, kImpossible<T>};
        if (token < vocab) runs[i].word[k] = reinterpret_cast<const uint4*>(row + token)[k];
      }
    }
    T narrow_values[kEach];
    std::memcpy(static_cast<void*>(narrow_values), runs, sizeof runs);
#pragma unroll
    for (int j = 0; j < kEach; ++j) values[j] = widen(narrow_values[j]);
  } else {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int token = begin + place<kAligned, kThreads>(j);
      values[j] = token < vocab ? widen(row[token]) : -INFINITY;
    }
  }
}

template <bool kAligned, int kThreads, class T, int kEach>
SVD_DEVICE void store_as(T* row, int begin, int vocab, const float (&values)[kEach]) {
  if constexpr (kAligned) {
#pragma unroll
    for (int i = 0; i < kEach / kRun; ++i) {
      const int token = begin + place<kAligned, kThreads>(i * kRun);
      T narrow_values[kRun];
#pragma unroll
      for (int j = 0; j < kRun; ++j) narrow_values[j] = narrow<T>(values[i * kRun + j]);
      Run<T> run;
      std::memcpy(&run, narrow_values, sizeof run);
      if (token < vocab) {
#pragma unroll
        for (int k = 0; k < Run<T>::kWords; ++k)
          reinterpret_cast<uint4*>(row + token)[k] = run.word[k];
      }
    }
  } else {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int token = begin + place<kAligned, kThreads>(j);
      if (token < vocab) row[token] = narrow<T>(values[j]);
    }
  }
}

template <bool kAligned, int kThreads, int kEach>
SVD_DEVICE void store(const Logits& out, int row, int begin, int vocab,
                      const float (&values)[kEach]) {
  if (out.dtype == Dtype::kFloat32)
    store_as<kAligned, kThreads>(row_of<float>(out, row), begin, vocab, values);
  else if (out.dtype == Dtype::kBFloat16)
    store_as<kAligned, kThreads>(row_of<__nv_bfloat16>(out, row), begin, vocab, values);
  else
    store_as<kAligned, kThreads>(row_of<__half>(out, row), begin, vocab, values);
}

// The value that the lane `step` away (by xor) passes; T is any trivially copyable struct.
template <class T>
SVD_DEVICE T across(T mine, int step) {
  using Word = std::conditional_t<sizeof(T) % 8 == 0, unsigned long long, unsigned>;
  Word word[sizeof(T) / sizeof(Word)];
  std::memcpy(word, &mine, sizeof mine);
#pragma unroll
  for (Word& each : word) each = __shfl_xor_sync(kAllLanes, each, step);
  std::memcpy(static_cast<void*>(&mine), word, sizeof mine);
  return mine;
}

// Sums over some tokens of a row, with e = exp(adapted - peak).
struct alignas(16) Sums {
  float peak;             // max adapted
  float sum_exp;          // sum of e; NaN if a token makes the row invalid
  float sum_exp_in_base;  // the part of sum_exp on tokens in base
  float sum_exp_d;        // sum of e * d
};

// e^x with an error of a few roundings; 0 where it would be subnormal.
SVD_DEVICE float fast_exp(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
  return y;
#else
  return std::exp(x);
#endif
}

// exp(part_peak - peak): the factor that turns sums relative to `part_peak` into sums relative to
// `peak`. 0, not NaN, if the part is empty; a sum that is NaN stays NaN when multiplied by 0.
SVD_DEVICE float rescale(float part_peak, float peak) {
  const float e = fast_exp(part_peak - peak);
  return part_peak > -INFINITY ? e : 0.0f;
}

SVD_DEVICE Sums join(const Sums& a, const Sums& b) {
  const float peak = fmaxf(a.peak, b.peak);
  const float sa = rescale(a.peak, peak), sb = rescale(b.peak, peak);
  return {peak, sa * a.sum_exp + sb * b.sum_exp,
          sa * a.sum_exp_in_base + sb * b.sum_exp_in_base,
          sa * a.sum_exp_d + sb * b.sum_exp_d};
}

// Sum over the lanes of a warp, returned in every lane with the same bits: a + b is b + a.
SVD_DEVICE float sum_of_warp(float x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

SVD_DEVICE float max_of_warp(float x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

SVD_DEVICE Sums join_warp(const Sums& mine) {
  const float peak = max_of_warp(mine.peak), scale = rescale(mine.peak, peak);
  return {peak, sum_of_warp(scale * mine.sum_exp), sum_of_warp(scale * mine.sum_exp_in_base),
          sum_of_warp(scale * mine.sum_exp_d)};
}

// The sums of one thread's tokens. The fast form (not kCareful) skips the tests for -inf, NaN and
// +inf, and is right if its sum_exp_d is finite: each of those values, in either row, makes
// e * (adapted - base) NaN or infinite, and the sum with it. `sum` tries the fast form and repeats
// the careful one only then, from registers; a row without masked tokens never pays for the tests.
template <bool kCareful, int kEach>
SVD_DEVICE Sums sum_from(float peak, const float (&adapted)[kEach], const float (&base)[kEach]) {
  Sums sums = {peak, 0.0f, 0.0f, 0.0f};
  const float origin = peak > -INFINITY ? peak : 0.0f;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    float e = fast_exp(adapted[j] - origin);
    if (kCareful) {
      e = base[j] < INFINITY ? e : NAN;
      sums.sum_exp_in_base += base[j] > -INFINITY ? e : 0.0f;
      sums.sum_exp_d = std::fma(e, difference(adapted[j], base[j]), sums.sum_exp_d);
    } else {
      sums.sum_exp_d = std::fma(e, adapted[j] - base[j], sums.sum_exp_d);
    }
    sums.sum_exp += e;
  }
  if (!kCareful) sums.sum_exp_in_base = sums.sum_exp;
  return sums;
}

template <int kEach>
SVD_DEVICE float peak_of(const float (&values)[kEach]) {
  float peak = -INFINITY;
#pragma unroll
  for (int j = 0; j < kEach; ++j) peak = fmaxf(peak, values[j]);  // fmaxf ignores NaN
  return peak;
}

template <int kEach>
SVD_DEVICE void sum(const float (&adapted)[kEach], const float (&base)[kEach], Sums& sums) {
  const float peak = peak_of(adapted);
  sums = sum_from<false>(peak, adapted, base);
  if (sums.sum_exp_d - sums.sum_exp_d != 0.0f) sums = sum_from<true>(peak, adapted, base);
}

// Sums over some tokens for divergence and support. The gap of a token is
// (adapted - peak) - (base - base_peak), so that a shift common to all logits is not rounded away.
struct alignas(16) PairSums {
  Sums own;
  float base_peak;     // max base
  float base_sum_exp;  // sum of exp(base - base_peak)
  float sum_exp_gap;   // sum of e * gap; +inf if a token is possible in adapted and not in base
};
constexpr PairSums kNoPairs = {{-INFINITY, 0.0f, 0.0f, 0.0f}, -INFINITY, 0.0f, 0.0f};

// `part.sum_exp_gap` relative to these peaks in place of its own.
SVD_DEVICE float rescaled_gap(const PairSums& part, float peak, float base_peak) {
  const float shift = (part.own.peak - peak) - (part.base_peak - base_peak);
  const float moved = rescale(part.own.peak, peak) * (part.sum_exp_gap + part.own.sum_exp * shift);
  return part.sum_exp_gap == INFINITY ? INFINITY : part.own.sum_exp > 0.0f ? moved : 0.0f;
}

SVD_DEVICE PairSums join(const PairSums& a, const PairSums& b) {
  const Sums own = join(a.own, b.own);
  const float base_peak = fmaxf(a.base_peak, b.base_peak);
  return {own, base_peak,
          rescale(a.base_peak, base_peak) * a.base_sum_exp +
              rescale(b.base_peak, base_peak) * b.base_sum_exp,
          rescaled_gap(a, own.peak, base_peak) + rescaled_gap(b, own.peak, base_peak)};
}

SVD_DEVICE PairSums join_warp(PairSums sums) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) sums = join(sums, across(sums, step));
  return sums;
}

template <bool kCareful, int kEach>
SVD_DEVICE PairSums pair_from(float peak, float base_peak, const float (&adapted)[kEach],
                              const float (&base)[kEach]) {
  PairSums sums = {{peak, 0.0f, 0.0f, 0.0f}, base_peak, 0.0f, 0.0f};
  const float origin = peak > -INFINITY ? peak : 0.0f;
  const float base_origin = base_peak > -INFINITY ? base_peak : 0.0f;
  bool apart = false;  // a token is possible in adapted and not in base
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    float e = fast_exp(adapted[j] - origin);
    const float base_away = base[j] - base_origin;
    float exp_gap = e * ((adapted[j] - origin) - base_away);
    if (kCareful) {
      const bool possible = adapted[j] > -INFINITY, in_base = base[j] > -INFINITY;
      e = base[j] < INFINITY ? e : NAN;
      exp_gap = possible && in_base ? exp_gap : 0.0f;
      apart = apart || (possible && !in_base);
      sums.own.sum_exp_in_base += in_base ? e : 0.0f;
    }
    sums.own.sum_exp += e;
    sums.sum_exp_gap += exp_gap;
    sums.base_sum_exp += fast_exp(base_away);
  }
  if (!kCareful) sums.own.sum_exp_in_base = sums.own.sum_exp;
  sums.own.sum_exp_d = sums.sum_exp_gap + sums.own.sum_exp_in_base * (origin - base_origin);
  if (apart) sums.sum_exp_gap = INFINITY;
  return sums;
}

template <int kEach>
SVD_DEVICE void sum(const float (&adapted)[kEach], const float (&base)[kEach], PairSums& sums) {
  const float peak = peak_of(adapted), base_peak = peak_of(base);
  sums = pair_from<false>(peak, base_peak, adapted, base);
  if (sums.sum_exp_gap - sums.sum_exp_gap != 0.0f)
    sums = pair_from<true>(peak, base_peak, adapted, base);
}

// Joins `sums`, of no tokens, with those of `count` tiles, `step` of S from one to the next. Every
// warp does it for itself, in the same order and so with the same bits: no warp waits for another.
// A lane issues the loads of four tiles before it uses any.
template <class S>
SVD_DEVICE S join_tiles(S sums, const S* tiles, int step, int count) {
  constexpr int ahead = 4, words = sizeof(S) / sizeof(uint4);
  for (int first = threadIdx.x % kWarp; first < count; first += ahead * kWarp) {
    uint4 raw[ahead][words];
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      const int tile = first + i * kWarp;
#pragma unroll
      for (int k = 0; k < words; ++k)
        if (tile < count) raw[i][k] = reinterpret_cast<const uint4*>(tiles + tile * step)[k];
    }
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      if (first + i * kWarp >= count) break;
      S part;
      std::memcpy(&part, raw[i], sizeof part);
      sums = join(sums, part);
    }
  }
  return join_warp(sums);
}

// The statistics of a row from the sums of its tiles.
SVD_DEVICE RowStats combine(const Sums* tiles, int step, int count, float log_alpha) {
  const Sums sums = join_tiles({-INFINITY, 0.0f, 0.0f, 0.0f}, tiles, step, count);
  return row_stats(sums.peak, sums.sum_exp, sums.sum_exp_in_base, sums.sum_exp_d, log_alpha);
}

// Whether a tile of a valid row has a token left: one that is neither impossible nor removed.
SVD_DEVICE bool is_active(float tile_peak, const RowStats& row, float penalty) {
  return tile_peak > -INFINITY && (penalty > -INFINITY || tile_peak >= row.threshold);
}

}  // namespace
