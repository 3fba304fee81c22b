// What the kernels of one block a row share: the walk over the row's tiles that matter, and the
// meetings of the block. They read few tiles, so dtypes are told apart at run time.
#pragma once

#include "kernels.h"

namespace {

constexpr int kWalkThreads = 256;
static_assert(kWalkThreads * kRun == kTile, "a thread holds one run of a tile");

// A run of any dtype as it lies in memory.
struct Raw {
  uint4 word[2];
};

template <class T, class Bits>
SVD_DEVICE Raw fetch_as(const Rows& rows, const Logits& logits, int row, int token) {
  const Bits* from = row_of<const Bits>(logits, row) + token;
  Raw raw = {};
  if (rows.aligned && token < rows.vocab) {
#pragma unroll
    for (int k = 0; k < Run<T>::kWords; ++k)
      raw.word[k] = reinterpret_cast<const uint4*>(from)[k];
  } else {
    Bits bits[kRun];
#pragma unroll
    for (int j = 0; j < kRun; ++j)
      bits[j] = token + j < rows.vocab ? from[j] : static_cast<Bits>(kImpossible<T>);
    std::memcpy(&raw, bits, sizeof bits);
  }
  return raw;
}

// The logits from `token` on, -inf outside the vocabulary. Nothing looks at them yet, so that two
// reads can be under way.
SVD_DEVICE Raw fetch(const Rows& rows, const Logits& logits, int row, int token) {
  if (logits.dtype == Dtype::kFloat32) return fetch_as<float, uint32_t>(rows, logits, row, token);
  if (logits.dtype == Dtype::kBFloat16)
    return fetch_as<__nv_bfloat16, uint16_t>(rows, logits, row, token);
  return fetch_as<__half, uint16_t>(rows, logits, row, token);
}

template <class T>
SVD_DEVICE void widen_as(const Raw& raw, float (&values)[kRun]) {
  T narrow_values[kRun];
  std::memcpy(static_cast<void*>(narrow_values), &raw, sizeof narrow_values);
#pragma unroll
  for (int j = 0; j < kRun; ++j) values[j] = widen(narrow_values[j]);
}

SVD_DEVICE void widen(const Raw& raw, Dtype dtype, float (&values)[kRun]) {
  if (dtype == Dtype::kFloat32) widen_as<float>(raw, values);
  else if (dtype == Dtype::kBFloat16) widen_as<__nv_bfloat16>(raw, values);
  else widen_as<__half>(raw, values);
}

SVD_DEVICE float read(const Logits& logits, int row, int token) {
  if (logits.dtype == Dtype::kFloat32) return row_of<const float>(logits, row)[token];
  if (logits.dtype == Dtype::kBFloat16)
    return widen(row_of<const __nv_bfloat16>(logits, row)[token]);
  return widen(row_of<const __half>(logits, row)[token]);
}

// The row of a block.
struct Row {
  int index;
  const Sums* tiles;
  RowStats stats;
  Steering by;
  bool valid;  // the same in every thread
};

SVD_DEVICE Row open_row(const Steered& of) {
  const int index = blockIdx.x;
  const Sums* tiles = sums_of<Sums>(of.rows, index);
  const RowStats stats = combine(tiles, of.rows.tiles, of.log_alpha);
  const float strength = value_of(of.strength, index);
  return {index, tiles, stats, {strength, of.log_alpha, of.penalty},
          is_valid(stats) && strength - strength == 0.0f};
}

// Calls f(token, adapted, base) with the runs from `token` on of all threads: for the tiles whose
// top `takes` takes, in order, until f returns false, in every thread at once.
template <class Takes, class F>
SVD_DEVICE void walk(const Rows& rows, const Row& row, const Takes& takes, const F& f) {
  for (int group = 0; group < rows.tiles; group += kWarp) {
    const int mine = group + threadIdx.x % kWarp;
    const bool taken = mine < rows.tiles && takes(row.tiles[mine].top);
    // Every warp finds the same tiles.
    for (unsigned left = __ballot_sync(kAllLanes, taken); left; left &= left - 1) {
      const int begin = (group + __ffs(left) - 1) * kTile;
      const int token = begin + place<true, kWalkThreads>(0);
      const Raw adapted = fetch(rows, rows.adapted, row.index, token);
      const Raw base = fetch(rows, rows.base, row.index, token);
      float z[kRun], b[kRun];
      widen(adapted, rows.adapted.dtype, z);
      widen(base, rows.base.dtype, b);
      if (!f(token, z, b)) return;
    }
  }
}

// The same of steered logits: f(token, logits).
template <class Takes, class F>
SVD_DEVICE void walk_steered(const Rows& rows, const Row& row, const Takes& takes, const F& f) {
  walk(rows, row, takes, [&](int token, float (&z)[kRun], const float (&b)[kRun]) {
#pragma unroll
    for (int j = 0; j < kRun; ++j)
      z[j] = steered(z[j], b[j], fast_exp(z[j] - row.stats.top), row.stats, row.by);
    return f(token, z);
  });
}

// ... of all tiles with a token that is not removed.
template <class F>
SVD_DEVICE void walk_live(const Rows& rows, const Row& row, const F& f) {
  walk_steered(rows, row, [&](float top) { return is_live(top, row.stats, row.by.penalty); },
               [&](int token, const float (&z)[kRun]) {
                 f(token, z);
                 return true;
               });
}

SVD_DEVICE bool has_support(float tile_top, const Row& row) {
  return is_live(tile_top, row.stats, -INFINITY);
}

// For the tiles of penalised tokens alone: f(sums of the tile), of one thread each.
template <class F>
SVD_DEVICE void each_tile_off_support(const Rows& rows, const Row& row, const F& f) {
  for (int tile = threadIdx.x; tile < rows.tiles; tile += kWalkThreads)
    if (row.tiles[tile].top > -INFINITY && !has_support(row.tiles[tile].top, row))
      f(row.tiles[tile]);
}

// Joined over all threads, in all threads, the same bits in each.
template <class T, class Join>
SVD_DEVICE T of_block(T mine, const Join& join) {
  __shared__ T warps[kWalkThreads / kWarp];
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) mine = join(mine, across(mine, step));
  __syncthreads();  // what was there has been read
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = mine;
  __syncthreads();
  mine = warps[0];
  for (int warp = 1; warp < kWalkThreads / kWarp; ++warp) mine = join(mine, warps[warp]);
  return mine;
}

// The sum of `mine` over the threads below this one; over all in `total`.
SVD_DEVICE int sum_before(int mine, int& total) {
  __shared__ int warps[kWalkThreads / kWarp];
  const int lane = threadIdx.x % kWarp;
  int up_to = mine;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, up_to, step);
    up_to += lane >= step ? other : 0;
  }
  __syncthreads();
  if (lane == kWarp - 1) warps[threadIdx.x / kWarp] = up_to;
  __syncthreads();
  int before = up_to - mine;
  total = 0;
  for (int warp = 0; warp < kWalkThreads / kWarp; ++warp) {
    before += warp < static_cast<int>(threadIdx.x) / kWarp ? warps[warp] : 0;
    total += warps[warp];
  }
  return before;
}

// log sum exp of some logits is peak + log(mass).
struct LogSum {
  float peak;
  float mass;
};

SVD_DEVICE LogSum join(const LogSum& a, const LogSum& b) {
  const float peak = fmaxf(a.peak, b.peak);
  return {peak, weight(a.peak, peak) * a.mass + weight(b.peak, peak) * b.mass};
}

SVD_DEVICE void add(LogSum& sum, const float (&logits)[kRun]) {
  const float peak = fmaxf(sum.peak, top_of(logits));
  float mass = weight(sum.peak, peak) * sum.mass;
#pragma unroll
  for (int j = 0; j < kRun; ++j) mass += peak > -INFINITY ? fast_exp(logits[j] - peak) : 0.0f;
  sum = {peak, mass};
}

// A token's log-probability.
SVD_DEVICE float logprob_of(float logit, const LogSum& all) {
  return logit - all.peak - logf(all.mass);
}

// Of a row's steered logits. Tiles of penalised tokens alone are not read again: a penalty lowers
// all their logits alike.
SVD_DEVICE LogSum log_sum(const Rows& rows, const Row& row) {
  LogSum sum = {-INFINITY, 0.0f};
  walk_steered(rows, row, [&](float top) { return has_support(top, row); },
               [&](int, const float (&z)[kRun]) {
                 add(sum, z);
                 return true;
               });
  if (row.by.penalty > -INFINITY) {
    const float lower = std::fabs(row.by.strength) * row.by.penalty;
    each_tile_off_support(rows, row, [&](const Sums& tile) {
      sum = join(sum, LogSum{tile.top + lower, tile.mass});
    });
  }
  return of_block(sum, [](const LogSum& a, const LogSum& b) { return join(a, b); });
}

}  // namespace
