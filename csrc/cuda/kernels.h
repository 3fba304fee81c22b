// The kernels that stream tiles. The first pass reads both rows once and writes the sums of every
// tile; the second pass, here or in choose.h and score.h, reads again only the tiles that it needs.
// No thread block waits for another within a kernel, nothing is accumulated in memory, and the host
// reads nothing back.
#pragma once

#include <climits>

#include "rows.h"

namespace {

constexpr int kStreamThreads = 128;

// A per-row argument: one number per row in `each`, or `shared` for all rows if `each` is null.
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
  int tiles;        // per row
  bool aligned;     // 16-byte accesses fit both tensors
  void* workspace;  // [rows, tiles] of Sums or PairSums
};

// The sums of a row's tiles in the workspace; S is Sums or PairSums.
template <class S>
SVD_DEVICE const S* sums_of(const Rows& rows, int row) {
  return static_cast<const S*>(rows.workspace) + int64_t{row} * rows.tiles;
}

// The operands of a steered row.
struct Steered {
  Rows rows;
  PerRow<float> strength;
  float log_alpha;
  float penalty;
  bool projected;
};

struct Steer {
  Steered of;
  Logits out;
  int span;     // tiles per thread block
  bool vector;  // write the steering vector in place of the steered logits
};

// A row in the second pass.
struct Row {
  int index;
  const Sums* tiles;
  int step;  // from one tile to the next
  RowStats stats;
  Steering steering;
  bool valid;  // the same in every thread

  __device__ __forceinline__ const Sums& tile(int k) const { return tiles[k * step]; }
};

// S is Sums or PairSums, whichever the first pass has left.
template <class S = Sums>
SVD_DEVICE Row open_row(const Steered& of, int index) {
  constexpr int step = sizeof(S) / sizeof(Sums);
  const Sums* tiles = reinterpret_cast<const Sums*>(sums_of<S>(of.rows, index));
  const RowStats stats = combine(tiles, step, of.rows.tiles, of.log_alpha);
  const float strength = value_of(of.strength, index);
  return {index, tiles, step, stats, {strength, of.log_alpha, of.penalty, of.projected},
          is_valid(stats) && strength - strength == 0.0f};
}

// Programmatic dependent launch (sm_90 and later). The second pass is launched with an attribute
// that lets its thread blocks become resident as soon as every block of the first pass has called
// let_second_pass_start, so its launch latency is hidden. It may read the workspace only after
// wait_for_first_pass, which returns when the first pass has finished and its writes are visible.
// On older devices both are empty, and the passes run one after the other in the stream.
SVD_DEVICE void let_second_pass_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

SVD_DEVICE void wait_for_first_pass() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// What a thread holds of a tile.
using Held = float[kTile / kStreamThreads];

template <class A, class B, bool kAligned>
SVD_DEVICE void read_tile(const Rows& rows, int row, int tile, Held& z, Held& b) {
  const int begin = tile * kTile;
  load<kAligned, kStreamThreads>(row_of<const A>(rows.adapted, row), begin, rows.vocab, z);
  load<kAligned, kStreamThreads>(row_of<const B>(rows.base, row), begin, rows.vocab, b);
}

// First pass, one thread block per tile; S is Sums or PairSums.
template <class A, class B, bool kAligned, class S>
__global__ void __launch_bounds__(kStreamThreads) measure_tiles(const Rows rows) {
  let_second_pass_start();
  const int row = blockIdx.x / rows.tiles, tile = blockIdx.x % rows.tiles;
  Held z, b;
  read_tile<A, B, kAligned>(rows, row, tile, z, b);

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

// Whether a tile of a row has a token left.
SVD_DEVICE bool is_left(const Row& row, int tile) {
  return row.valid && is_active(row.tile(tile).peak, row.stats, row.steering.penalty);
}

// Writes a tile of `steer` or `steering_vector`. z and b hold its logits if a token is `left`.
template <bool kAligned>
SVD_DEVICE void steer_tile(const Steer& to, const Row& row, int tile, bool left, Held& z,
                           const Held& b) {
  if (left) {
#pragma unroll
    for (int j = 0; j < kTile / kStreamThreads; ++j) {
      const float e = fast_exp(z[j] - row.stats.peak);
      z[j] = to.vector ? delta_of(z[j], b[j], e, row.stats, row.steering.projected)
                       : steered(z[j], b[j], e, row.stats, row.steering);
    }
  } else {
    const float fill = !row.valid ? NAN : to.vector ? 0.0f : -INFINITY;
#pragma unroll
    for (int j = 0; j < kTile / kStreamThreads; ++j) z[j] = fill;
  }
  store<kAligned, kStreamThreads>(to.out, row.index, tile * kTile, to.of.rows.vocab, z);
}

// Second pass of `steer` and `steering_vector`, one thread block per `span` adjacent tiles. A tile
// without a token left is filled, not read. `out` may be `adapted` or `base` itself: a thread
// writes only tokens that it has read.
template <class A, class B, bool kAligned>
__global__ void __launch_bounds__(kStreamThreads) steer_tiles(const Steer to) {
  wait_for_first_pass();
  const Rows& rows = to.of.rows;
  const int blocks = (rows.tiles + to.span - 1) / to.span;  // per row
  const Row row = open_row(to.of, blockIdx.x / blocks);
  const int first_tile = blockIdx.x % blocks * to.span;
  const int end_tile = first_tile + to.span < rows.tiles ? first_tile + to.span : rows.tiles;
  for (int tile = first_tile; tile < end_tile; ++tile) {
    const bool left = is_left(row, tile);
    Held z, b;
    if (left) read_tile<A, B, kAligned>(rows, row.index, tile, z, b);
    steer_tile<kAligned>(to, row, tile, left, z, b);
  }
}

}  // namespace
