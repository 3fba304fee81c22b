// The kernels that stream tiles. Pass 1 reads both rows once and leaves the sums of every tile;
// pass 2, here or in choose.h and score.h, looks again only at tiles that matter. No block waits
// for another within a kernel, nothing is accumulated in memory, the host reads nothing back.
#pragma once

#include <climits>

#include "rows.h"

namespace {

constexpr int kStreamThreads = 128;

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
  bool aligned;     // 16-byte accesses fit both
  void* workspace;  // [rows, tiles] of Sums or PairSums
};

// `Sums` or `PairSums` of a row's tiles.
template <class S>
SVD_DEVICE const S* sums_of(const Rows& rows, int row) {
  return static_cast<const S*>(rows.workspace) + int64_t{row} * rows.tiles;
}

struct Steered {
  Rows rows;
  PerRow<float> strength;
  float log_alpha;
  float penalty;
};

struct Steer {
  Steered of;
  Logits out;
  int span;     // tiles a block
  bool vector;  // the steering vector, not the steered logits
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

// Pass 1: one block a tile. S is Sums or PairSums.
template <class A, class B, bool kAligned, class S>
__global__ void __launch_bounds__(kStreamThreads) measure_tiles(const Rows rows) {
  let_pass_2_start();
  const int row = blockIdx.x / rows.tiles, begin = blockIdx.x % rows.tiles * kTile;
  float z[kTile / kStreamThreads], b[kTile / kStreamThreads];
  load<kAligned, kStreamThreads>(row_of<const A>(rows.adapted, row), begin, rows.vocab, z);
  load<kAligned, kStreamThreads>(row_of<const B>(rows.base, row), begin, rows.vocab, b);

  __shared__ S warps[kStreamThreads / kWarp];
  S sums;
  sum(z, b, sums);
  sums = join_warp(sums);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = sums;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kStreamThreads / kWarp; ++warp) sums = join(sums, warps[warp]);
    static_cast<S*>(rows.workspace)[blockIdx.x] = sums;
  }
}

// Pass 2 of `steer` and `steering_vector`: one block `span` neighbouring tiles. A tile without a
// live token is not read. `out` may be one of the rows: a thread has read the tokens it writes.
template <class A, class B, bool kAligned>
__global__ void __launch_bounds__(kStreamThreads) steer_tiles(const Steer to) {
  wait_for_pass_1();
  const Rows& rows = to.of.rows;
  const int blocks = (rows.tiles + to.span - 1) / to.span;  // a row
  const int row = blockIdx.x / blocks, first = blockIdx.x % blocks * to.span;
  const Sums* tiles = sums_of<Sums>(rows, row);
  const RowStats stats = combine(tiles, rows.tiles, to.of.log_alpha);
  const bool valid = is_valid(stats);
  const Steering by = {value_of(to.of.strength, row), to.of.log_alpha, to.of.penalty};
  const float dead = !valid ? NAN : to.vector ? 0.0f : -INFINITY;

  const int last = first + to.span < rows.tiles ? first + to.span : rows.tiles;
  for (int tile = first; tile < last; ++tile) {
    const int begin = tile * kTile;
    float z[kTile / kStreamThreads];
    if (valid && is_live(tiles[tile].top, stats, by.penalty)) {
      float b[kTile / kStreamThreads];
      load<kAligned, kStreamThreads>(row_of<const A>(rows.adapted, row), begin, rows.vocab, z);
      load<kAligned, kStreamThreads>(row_of<const B>(rows.base, row), begin, rows.vocab, b);
#pragma unroll
      for (int j = 0; j < kTile / kStreamThreads; ++j) {
        const float e = fast_exp(z[j] - stats.top);
        z[j] = to.vector ? steering(z[j], b[j], e, stats) : steered(z[j], b[j], e, stats, by);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kTile / kStreamThreads; ++j) z[j] = dead;
    }
    store<kAligned, kStreamThreads>(to.out, row, begin, rows.vocab, z);
  }
}

}  // namespace
