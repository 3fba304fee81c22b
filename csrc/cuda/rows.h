// What the CUDA kernels share: a tile of tokens in registers, and the sums of a row.
//
// A row is cut into tiles of `kTile` tokens whatever the number of rows, and sums are formed in one
// fixed order: a row's result is the same bits alone and in any batch.
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
constexpr int kRun = 8;  // neighbours that a thread owns where 16-byte loads fit

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

// A run as it lies in memory.
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

// The part of a tile that this thread holds: element j is token `begin + place<...>(j)`, ascending
// in j. Aligned: runs of neighbours, a warp's side by side. Otherwise a warp's tokens are side by
// side, so that scalar accesses coalesce.
template <bool kAligned, int kThreads>
SVD_DEVICE int place(int j) {
  const int thread = threadIdx.x;
  return kAligned ? (j / kRun * kThreads + thread) * kRun + j % kRun : j * kThreads + thread;
}

// Logits of the tile at `begin` in float32, -inf outside the vocabulary. Aligned, `vocab` is a
// multiple of kRun.
template <bool kAligned, int kThreads, class T, int kEach>
SVD_DEVICE void load(const T* row, int begin, int vocab, float (&values)[kEach]) {
  static_assert(kEach * kThreads == kTile && kEach % kRun == 0, "a tile is whole runs a thread");
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

// A struct of another lane.
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

// Sums over some tokens of a row, with e = exp(adapted - top).
struct alignas(16) Sums {
  float top;      // max adapted
  float mass;     // sum of e; NaN where a token spoils the row
  float opinion;  // the part of mass with a base logit above -inf
  float gap;      // sum of e * d
};

// e^x to a few roundings, 0 where it would be subnormal.
SVD_DEVICE float fast_exp(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
  return y;
#else
  return std::exp(x);
#endif
}

// exp(part - whole): what sums relative to `part` weigh relative to `whole`. 0, not NaN, where
// there is nothing in the part; a NaN that was summed survives the 0.
SVD_DEVICE float weight(float part, float whole) {
  const float e = fast_exp(part - whole);
  return part > -INFINITY ? e : 0.0f;
}

SVD_DEVICE Sums join(const Sums& a, const Sums& b) {
  const float top = fmaxf(a.top, b.top), wa = weight(a.top, top), wb = weight(b.top, top);
  return {top, wa * a.mass + wb * b.mass, wa * a.opinion + wb * b.opinion,
          wa * a.gap + wb * b.gap};
}

// Of all lanes, in all lanes, the same bits in each: a + b is b + a.
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
  const float top = max_of_warp(mine.top), w = weight(mine.top, top);
  return {top, sum_of_warp(w * mine.mass), sum_of_warp(w * mine.opinion),
          sum_of_warp(w * mine.gap)};
}

// Without kCareful, right only if `gap` comes out finite: -inf and whatever spoils a row do not
// survive e * (adapted - base).
template <bool kCareful, int kEach>
SVD_DEVICE Sums sum_from(float top, const float (&adapted)[kEach], const float (&base)[kEach]) {
  Sums sums = {top, 0.0f, 0.0f, 0.0f};
  const float origin = top > -INFINITY ? top : 0.0f;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    float e = fast_exp(adapted[j] - origin);
    if (kCareful) {
      e = base[j] < INFINITY ? e : NAN;
      sums.opinion += base[j] > -INFINITY ? e : 0.0f;
      sums.gap += e * difference(adapted[j], base[j]);
    } else {
      sums.gap += e * (adapted[j] - base[j]);
    }
    sums.mass += e;
  }
  if (!kCareful) sums.opinion = sums.mass;
  return sums;
}

template <int kEach>
SVD_DEVICE float top_of(const float (&values)[kEach]) {
  float top = -INFINITY;
#pragma unroll
  for (int j = 0; j < kEach; ++j) top = fmaxf(top, values[j]);  // NaN is passed over
  return top;
}

template <int kEach>
SVD_DEVICE void sum(const float (&adapted)[kEach], const float (&base)[kEach], Sums& sums) {
  const float top = top_of(adapted);
  sums = sum_from<false>(top, adapted, base);
  if (sums.gap - sums.gap != 0.0f) sums = sum_from<true>(top, adapted, base);
}

// What the divergence needs of some tokens: sums of both rows, each relative to its own top.
struct alignas(16) PairSums {
  float top;        // max adapted
  float mass;       // sum of e; NaN where a token spoils the row
  float gap;        // sum of e * ((adapted - top) - (base - base_top)); inf where only base is -inf
  float base_top;   // max base
  float base_mass;  // sum of exp(base - base_top)
};

// `part.gap` relative to the tops of `whole`.
SVD_DEVICE float moved_gap(const PairSums& part, float top, float base_top) {
  const float shift = (part.top - top) - (part.base_top - base_top);
  const float gap = weight(part.top, top) * (part.gap + part.mass * shift);
  return part.gap == INFINITY ? INFINITY : part.mass > 0.0f ? gap : 0.0f;
}

SVD_DEVICE PairSums join(const PairSums& a, const PairSums& b) {
  const float top = fmaxf(a.top, b.top), base_top = fmaxf(a.base_top, b.base_top);
  return {top, weight(a.top, top) * a.mass + weight(b.top, top) * b.mass,
          moved_gap(a, top, base_top) + moved_gap(b, top, base_top), base_top,
          weight(a.base_top, base_top) * a.base_mass + weight(b.base_top, base_top) * b.base_mass};
}

SVD_DEVICE PairSums join_warp(PairSums sums) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) sums = join(sums, across(sums, step));
  return sums;
}

template <bool kCareful, int kEach>
SVD_DEVICE PairSums pair_from(float top, float base_top, const float (&adapted)[kEach],
                              const float (&base)[kEach]) {
  PairSums sums = {top, 0.0f, 0.0f, base_top, 0.0f};
  const float origin = top > -INFINITY ? top : 0.0f;
  const float base_origin = base_top > -INFINITY ? base_top : 0.0f;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    float e = fast_exp(adapted[j] - origin);
    float gap = e * ((adapted[j] - origin) - (base[j] - base_origin));
    if (kCareful) {
      e = base[j] < INFINITY ? e : NAN;
      gap = adapted[j] > -INFINITY ? base[j] > -INFINITY ? gap : INFINITY : 0.0f;
    }
    sums.mass += e;
    sums.gap += gap;
    sums.base_mass += fast_exp(base[j] - base_origin);
  }
  return sums;
}

template <int kEach>
SVD_DEVICE void sum(const float (&adapted)[kEach], const float (&base)[kEach], PairSums& sums) {
  const float top = top_of(adapted), base_top = top_of(base);
  sums = pair_from<false>(top, base_top, adapted, base);
  if (sums.gap - sums.gap != 0.0f) sums = pair_from<true>(top, base_top, adapted, base);
}

// A row's statistics out of its tiles' sums: by every warp for itself, so no block has to meet, in
// the same order and to the same bits everywhere.
SVD_DEVICE RowStats combine(const Sums* tiles, int count, float log_alpha) {
  Sums sums = {-INFINITY, 0.0f, 0.0f, 0.0f};
  for (int tile = threadIdx.x % kWarp; tile < count; tile += kWarp) {
    const float4 part = reinterpret_cast<const float4*>(tiles)[tile];  // one load
    sums = join(sums, {part.x, part.y, part.z, part.w});
  }
  sums = join_warp(sums);
  return row_stats(sums.top, sums.mass, sums.opinion, sums.gap, log_alpha);
}

// Whether a tile of a valid row has a token that is neither impossible nor removed.
SVD_DEVICE bool is_live(float tile_top, const RowStats& row, float penalty) {
  return tile_top > -INFINITY && (penalty > -INFINITY || tile_top >= row.threshold);
}

}  // namespace
