// Shared by the kernels that use one thread block per row: the walk over the tiles that are needed,
// and reductions over the block. These kernels read few tiles, so they branch on dtypes at run
// time.
#pragma once

#include "kernels.h"

namespace {

constexpr int kWalkThreads = 256;
static_assert(kWalkThreads * kRun == kTile, "a thread holds one run of a tile");

// The memory image of a run of any dtype.
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

// Loads the run of logits from `token` on, -inf outside the vocabulary, without converting it: the
// loads of both rows are issued before either is used.
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

// Calls f(token, adapted, base), with this thread's run from `token` on, for each tile for whose
// peak `takes` returns true: in ascending order, in all threads together, until f returns false (in
// every thread alike). 32 tiles are tested at a time, one per lane, with a ballot.
template <class Takes, class F>
SVD_DEVICE void walk(const Rows& rows, const Row& row, const Takes& takes, const F& f) {
  for (int group = 0; group < rows.tiles; group += kWarp) {
    const int mine = group + threadIdx.x % kWarp;
    const bool taken = mine < rows.tiles && takes(row.tile(mine).peak);
    // The ballot is over the lanes of one warp, but every warp tests the same tiles.
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

// `walk` over steered logits: f(token, logits).
template <class Takes, class F>
SVD_DEVICE void walk_steered(const Rows& rows, const Row& row, const Takes& takes, const F& f) {
  walk(rows, row, takes, [&](int token, float (&z)[kRun], const float (&b)[kRun]) {
#pragma unroll
    for (int j = 0; j < kRun; ++j)
      z[j] = steered(z[j], b[j], fast_exp(z[j] - row.stats.peak), row.stats, row.steering);
    return f(token, z);
  });
}

// `walk_steered` over all tiles with a token left.
template <class F>
SVD_DEVICE void walk_active(const Rows& rows, const Row& row, const F& f) {
  walk_steered(rows, row,
               [&](float peak) { return is_active(peak, row.stats, row.steering.penalty); },
               [&](int token, const float (&logits)[kRun]) {
                 f(token, logits);
                 return true;
               });
}

// Whether a tile has a token in the support.
SVD_DEVICE bool has_support(float tile_peak, const Row& row) {
  return is_active(tile_peak, row.stats, -INFINITY);
}

// Calls f(sums) for each tile without a token in the support, each in one thread.
template <class F>
SVD_DEVICE void each_tile_off_support(const Rows& rows, const Row& row, const F& f) {
  for (int tile = threadIdx.x; tile < rows.tiles; tile += kWalkThreads)
    if (row.tile(tile).peak > -INFINITY && !has_support(row.tile(tile).peak, row))
      f(row.tile(tile));
}

// Reduces `mine` over the thread block with `join`; every thread gets the result, the same bits.
template <class T, class Join>
SVD_DEVICE T of_block(T mine, const Join& join) {
  __shared__ T warps[kWalkThreads / kWarp];
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) mine = join(mine, across(mine, step));
  __syncthreads();  // the last call's values have been read
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = mine;
  __syncthreads();
  mine = warps[0];
  for (int warp = 1; warp < kWalkThreads / kWarp; ++warp) mine = join(mine, warps[warp]);
  return mine;
}

// The sum of `mine` over the threads before this one; `total` becomes that over all threads.
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

// The log-sum-exp of some steered logits is peak + log(sum_exp), with sums relative to their peak.
struct LogSumExp {
  float peak;
  float sum_exp;
};

SVD_DEVICE LogSumExp join(const LogSumExp& a, const LogSumExp& b) {
  const float peak = fmaxf(a.peak, b.peak);
  return {peak, rescale(a.peak, peak) * a.sum_exp + rescale(b.peak, peak) * b.sum_exp};
}

SVD_DEVICE void accumulate(LogSumExp& lse, const float (&logits)[kRun]) {
  const float peak = fmaxf(lse.peak, peak_of(logits));
  float sum_exp = rescale(lse.peak, peak) * lse.sum_exp;
#pragma unroll
  for (int j = 0; j < kRun; ++j) sum_exp += peak > -INFINITY ? fast_exp(logits[j] - peak) : 0.0f;
  lse = {peak, sum_exp};
}

// The log-probability of a token with this steered logit.
SVD_DEVICE float logprob_of(float logit, const LogSumExp& lse) {
  return logit - lse.peak - logf(lse.sum_exp);
}

// The log-sum-exp of a row's steered logits. Tiles without support are not read again: a finite
// penalty shifts all their logits by the same amount, so their sums of the first pass hold.
SVD_DEVICE LogSumExp log_sum_exp(const Rows& rows, const Row& row) {
  LogSumExp lse = {-INFINITY, 0.0f};
  walk_steered(rows, row, [&](float peak) { return has_support(peak, row); },
               [&](int, const float (&logits)[kRun]) {
                 accumulate(lse, logits);
                 return true;
               });
  if (row.steering.penalty > -INFINITY) {
    const float shift = std::fabs(row.steering.strength) * row.steering.penalty;
    each_tile_off_support(rows, row, [&](const Sums& tile) {
      lse = join(lse, LogSumExp{tile.peak + shift, tile.sum_exp});
    });
  }
  return of_block(lse, [](const LogSumExp& a, const LogSumExp& b) { return join(a, b); });
}

// Second pass, one thread block per row: `answer` is the function of an operator's operands.
template <class To>
__global__ void __launch_bounds__(kWalkThreads) answer_rows(const To to) {
  wait_for_first_pass();
  answer(to, blockIdx.x);
}

}  // namespace
