// Both passes in one launch, where rows are few (sm_90 and later). A cluster of thread blocks has a
// row: it measures the row's tiles, all at once if they are not many, meets at a barrier, and goes
// on to the second pass. Both passes are the functions of the two launches, with the sums in the
// same workspace, so a row's bits are the same in either form.
#pragma once

#include "choose.h"
#include "score.h"

namespace {

constexpr int kMostBlocks = 16;  // of a cluster; the driver has to be asked for more than 8
// Groups of kStreamThreads threads in a block, each with a tile. The second pass needs two, and 640
// threads leave each the registers that both passes need; 16 blocks of five take 163,840 tokens.
constexpr int kLeastGroups = kWalkThreads / kStreamThreads;
constexpr int kMostGroups = 5;

// The first pass over every `step`th tile of a row from `first` on, by a group of kStreamThreads
// threads; z and b become the logits of the last of these tiles. All groups of the block take part
// together; one that has fewer tiles waits.
template <class T, class S>
SVD_DEVICE void measure_row(const Rows& rows, int row, int first, int step, Held& z, Held& b) {
  __shared__ S warps[kMostGroups][kStreamThreads / kWarp];
  S* mine = warps[threadIdx.x / kStreamThreads];
  for (int tile = first; tile - first < rows.tiles; tile += step) {
    if (tile > first) __syncthreads();  // the last tile's warps have been joined
    if (tile < rows.tiles) {
      read_tile<T, T, true>(rows, row, tile, z, b);
      measure_warps(z, b, mine);
    }
    __syncthreads();
    if (tile < rows.tiles) join_warps(mine, sums_of<S>(rows, row) + tile);
  }
}

// An operator whose rows both have type T and 16-byte accesses. The tile that a group measures last
// is still in registers when `steer` writes it. Otherwise the first block answers; it needs nothing
// of the blocks that have ended but the workspace. The kernel is never launched on older devices.
template <class T, class To>
__global__ void __launch_bounds__(kMostGroups * kStreamThreads) answer_at_once(To to) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  Rows& rows = to.of.rows;
  rows.adapted.dtype = rows.base.dtype = kDtype<T>;  // known here, so that nothing branches on it
  rows.aligned = true;
  const int blocks = __clusterSizeInBlocks();
  const int row = blockIdx.x / blocks, block = blockIdx.x % blocks;
  const int first = threadIdx.x / kStreamThreads * blocks + block;
  const int step = blockDim.x / kStreamThreads * blocks;
  Held z, b;
  measure_row<T, typename To::Measured>(rows, row, first, step, z, b);
  __cluster_barrier_arrive();  // a release: the sums are visible to the cluster
  __cluster_barrier_wait();    // an acquire
  if constexpr (std::is_same<To, Steer>::value) {
    if (first >= rows.tiles) return;
    const Row opened = open_row(to.of, row);
    const int last = rows.tiles - 1 - (rows.tiles - 1 - first) % step;
    for (int tile = last; tile >= 0; tile -= step) {
      const bool left = is_left(opened, tile);
      if (left && tile < last) read_tile<T, T, true>(rows, row, tile, z, b);
      steer_tile<true>(to, opened, tile, left, z, b);
    }
  } else {
    if (block == 0 && threadIdx.x < kWalkThreads) answer(to, row);
  }
#endif
}

}  // namespace
