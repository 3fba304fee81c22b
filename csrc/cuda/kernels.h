// The kernels. Pass 1 reads both rows once and leaves `Sums` a tile; pass 2 writes the steered
// logits or picks a token, and looks again only at tiles that matter. No block waits for another
// within a kernel, nothing is accumulated in memory, and the host reads nothing back.
#pragma once

#include <climits>

#include "rows.h"

namespace {

constexpr int kStreamThreads = 128;  // blocks that stream tiles
constexpr int kSampleThreads = 256;  // a block that walks a row's tiles one after the other

// A number for all rows, or one for each.
template <class T>
struct PerRow {
  const T* each;
  T shared;
};

template <class T>
SVD_DEVICE T value_of(const PerRow<T>& value, int row) {
  return value.each ? value.each[row] : value.shared;
}

struct Rows {
  Logits adapted;
  Logits base;
  int vocab;
  int tiles;        // a row
  Sums* workspace;  // [rows, tiles]
};

struct Steer {
  Rows rows;
  PerRow<float> strength;
  float log_alpha;
  float penalty;
  Logits out;
  int span;  // tiles a block
};

struct Sample {
  Rows rows;
  PerRow<float> strength;
  float log_alpha;
  float penalty;
  float temperature;  // 0: greedy
  PerRow<int64_t> seed;
  PerRow<int64_t> position;
  int64_t* token;
  float* logprob;
};

// From sm_90 on the blocks of pass 2 may start, and wait, before pass 1 is done.
SVD_DEVICE void let_pass_2_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

SVD_DEVICE void wait_for_pass_1() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Pass 1: one block a tile.
template <class A, class B, bool kAligned>
__global__ void __launch_bounds__(kStreamThreads) measure_tiles(const Rows rows) {
  let_pass_2_start();
  const int row = blockIdx.x / rows.tiles, begin = blockIdx.x % rows.tiles * kTile;
  float z[kTile / kStreamThreads], b[kTile / kStreamThreads];
  load<kAligned, kStreamThreads>(row_of<const A>(rows.adapted, row), begin, rows.vocab, z);
  load<kAligned, kStreamThreads>(row_of<const B>(rows.base, row), begin, rows.vocab, b);

  __shared__ Sums warps[kStreamThreads / kWarp];
  Sums sums = join_warp(sum(z, b));
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = sums;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kStreamThreads / kWarp; ++warp) sums = join(sums, warps[warp]);
    rows.workspace[blockIdx.x] = sums;
  }
}

// Pass 2 of `steer`: one block `span` neighbouring tiles. A tile without a live token is not read.
// `out` may be one of the rows: every thread has read the tokens that it writes.
template <class A, class B, bool kAligned>
__global__ void __launch_bounds__(kStreamThreads) steer_tiles(const Steer to) {
  wait_for_pass_1();
  const Rows& rows = to.rows;
  const int blocks = (rows.tiles + to.span - 1) / to.span;  // a row
  const int row = blockIdx.x / blocks, first = blockIdx.x % blocks * to.span;
  const Sums* tiles = rows.workspace + int64_t{row} * rows.tiles;
  const RowStats stats = combine(tiles, rows.tiles, to.log_alpha);
  const bool valid = is_valid(stats);
  const Steering by = {value_of(to.strength, row), to.log_alpha, to.penalty};

  const int last = first + to.span < rows.tiles ? first + to.span : rows.tiles;
  for (int tile = first; tile < last; ++tile) {
    const int begin = tile * kTile;
    float z[kTile / kStreamThreads];
    if (valid && is_live(tiles[tile].top, stats, by.penalty)) {
      float b[kTile / kStreamThreads];
      load<kAligned, kStreamThreads>(row_of<const A>(rows.adapted, row), begin, rows.vocab, z);
      load<kAligned, kStreamThreads>(row_of<const B>(rows.base, row), begin, rows.vocab, b);
#pragma unroll
      for (int j = 0; j < kTile / kStreamThreads; ++j)
        z[j] = steered(z[j], b[j], fast_exp(z[j] - stats.top), stats, by);
    } else {
#pragma unroll
      for (int j = 0; j < kTile / kStreamThreads; ++j) z[j] = valid ? -INFINITY : NAN;
    }
    store<kAligned, kStreamThreads>(to.out, row, begin, rows.vocab, z);
  }
}

constexpr int kNone = INT_MAX;

// The best token of some, and log sum exp of the steered logits of all: peak + log(mass).
struct Choice {
  float merit;
  int token;  // kNone: none
  float logit;
  float peak;
  float mass;
};

SVD_DEVICE Choice better(const Choice& a, const Choice& b) {
  const bool second = b.merit > a.merit || (b.merit == a.merit && b.token < a.token);
  const float peak = fmaxf(a.peak, b.peak);
  return {second ? b.merit : a.merit, second ? b.token : a.token, second ? b.logit : a.logit, peak,
          weight(a.peak, peak) * a.mass + weight(b.peak, peak) * b.mass};
}

SVD_DEVICE Choice across(const Choice& mine, int step) {
  return {__shfl_xor_sync(kAllLanes, mine.merit, step), __shfl_xor_sync(kAllLanes, mine.token, step),
          __shfl_xor_sync(kAllLanes, mine.logit, step), __shfl_xor_sync(kAllLanes, mine.peak, step),
          __shfl_xor_sync(kAllLanes, mine.mass, step)};
}

// Pass 2 of `sample`: one block a row, over the tiles with a live token.
template <class A, class B, bool kAligned>
__global__ void __launch_bounds__(kSampleThreads) sample_rows(const Sample to) {
  wait_for_pass_1();
  constexpr int kEach = kTile / kSampleThreads;
  const Rows& rows = to.rows;
  const int row = blockIdx.x, lane = threadIdx.x % kWarp;
  const Sums* tiles = rows.workspace + int64_t{row} * rows.tiles;
  const RowStats stats = combine(tiles, rows.tiles, to.log_alpha);
  if (!is_valid(stats)) {  // the same in every thread
    if (threadIdx.x == 0) {
      to.token[row] = -1;
      to.logprob[row] = NAN;
    }
    return;
  }
  const Steering by = {value_of(to.strength, row), to.log_alpha, to.penalty};
  const uint64_t seed = value_of(to.seed, row), position = value_of(to.position, row);

  Choice choice = {-INFINITY, kNone, -INFINITY, -INFINITY, 0.0f};  // of this thread's tokens
  for (int group = 0; group < rows.tiles; group += kWarp) {
    const int mine = group + lane;
    const bool live = mine < rows.tiles && is_live(tiles[mine].top, stats, by.penalty);
    // Every warp finds the same tiles.
    for (unsigned left = __ballot_sync(kAllLanes, live); left; left &= left - 1) {
      const int begin = (group + __ffs(left) - 1) * kTile;
      float z[kEach], b[kEach];
      load<kAligned, kSampleThreads>(row_of<const A>(rows.adapted, row), begin, rows.vocab, z);
      load<kAligned, kSampleThreads>(row_of<const B>(rows.base, row), begin, rows.vocab, b);
      float peak = choice.peak;
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        z[j] = steered(z[j], b[j], fast_exp(z[j] - stats.top), stats, by);
        peak = fmaxf(peak, z[j]);
      }
      float mass = weight(choice.peak, peak) * choice.mass;
#pragma unroll
      for (int j = 0; j < kEach; ++j) mass += peak > -INFINITY ? fast_exp(z[j] - peak) : 0.0f;
      choice.peak = peak;
      choice.mass = mass;
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const int token = begin + place<kAligned, kSampleThreads>(j);
        float merit = z[j];
        if (to.temperature > 0.0f && merit > -INFINITY) {
          const uint32_t bits = static_cast<uint32_t>(philox(seed, uint64_t(token), position));
          // Relative to the top, so that large logits do not round the noise away.
          merit = (merit - stats.top) / to.temperature + gumbel<float>(bits);
        }
        if (merit > choice.merit) {  // strictly: the lowest of equals stays
          choice.merit = merit;
          choice.token = token;
          choice.logit = z[j];
        }
      }
    }
  }

  __shared__ Choice warps[kSampleThreads / kWarp];
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2)
    choice = better(choice, across(choice, step));
  if (lane == 0) warps[threadIdx.x / kWarp] = choice;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kSampleThreads / kWarp; ++warp) choice = better(choice, warps[warp]);
    to.token[row] = choice.token == kNone ? -1 : choice.token;
    to.logprob[row] = choice.logit - choice.peak - logf(choice.mass);
  }
}

}  // namespace
