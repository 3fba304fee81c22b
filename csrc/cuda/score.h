// Pass 2 of the operators that judge a row: score, project_strength and divergence.
#pragma once

#include "walk.h"

namespace {

struct Score {
  Steered of;
  const int64_t* target;
  float* logprob;
};

struct Project {
  Steered of;  // its strength and penalty do not count
  const int64_t* target;
  float* numerator;
  float* gauss_newton;
  float* newton;
  bool* in_support;
};

struct Diverge {
  Rows rows;
  float* out;
};

// A row's target as it is in both rows.
struct Target {
  bool exists;  // in the vocabulary
  float adapted;
  float base;
  float e;  // exp(adapted - top)
};

SVD_DEVICE Target target_of(const Rows& rows, const Row& row, const int64_t* targets) {
  const int64_t token = targets[row.index];
  if (token < 0 || token >= rows.vocab) return {false, -INFINITY, -INFINITY, 0.0f};
  const float adapted = read(rows.adapted, row.index, static_cast<int>(token));
  const float base = read(rows.base, row.index, static_cast<int>(token));
  return {true, adapted, base, fast_exp(adapted - row.stats.top)};
}

__global__ void __launch_bounds__(kWalkThreads) score_rows(const Score to) {
  wait_for_pass_1();
  const Rows& rows = to.of.rows;
  const Row row = open_row(to.of);
  const Target target = target_of(rows, row, to.target);
  float logprob = NAN;
  if (row.valid && target.exists) {
    const float logit = steered(target.adapted, target.base, target.e, row.stats, row.by);
    logprob = logprob_of(logit, log_sum(rows, row));
  }
  if (threadIdx.x == 0) to.logprob[row.index] = logprob;
}

// Mean and variance of x over tokens of weight e, without cancellation, and a sum of squares.
struct Moments {
  float mass;    // sum of e
  float mean;    // of x
  float spread;  // sum of e * (x - mean)^2
  float square;  // sum of (I delta)^2
};

SVD_DEVICE Moments join(const Moments& a, const Moments& b) {
  const float mass = a.mass + b.mass, share = mass > 0.0f ? b.mass / mass : 0.0f;
  const float step = b.mean - a.mean;
  return {mass, a.mean + share * step, a.spread + b.spread + a.mass * share * step * step,
          a.square + b.square};
}

// With x = I_y delta_y - I delta: the numerator is its mean, Var_p(I delta) its variance.
__global__ void __launch_bounds__(kWalkThreads) project_rows(const Project to) {
  wait_for_pass_1();
  const Rows& rows = to.of.rows;
  const Row row = open_row(to.of);
  const Target target = target_of(rows, row, to.target);
  const bool valid = row.valid && target.exists, kept = target.adapted >= row.stats.threshold;
  Moments sum = {};
  if (valid) {
    const float own =
        kept ? steering(target.adapted, target.base, target.e, row.stats) : 0.0f;
    walk(rows, row, [&](float top) { return has_support(top, row); },
         [&](int, const float (&z)[kRun], const float (&b)[kRun]) {
#pragma unroll
           for (int j = 0; j < kRun; ++j) {
             const float e = fast_exp(z[j] - row.stats.top);
             const float all = steering(z[j], b[j], e, row.stats);
             const float delta = z[j] >= row.stats.threshold ? all : 0.0f;
             sum = join(sum, Moments{e, own - delta, 0.0f, delta * delta});
           }
           return true;
         });
    each_tile_off_support(rows, row, [&](const Sums& tile) {
      sum = join(sum, Moments{weight(tile.top, row.stats.top) * tile.mass, own, 0.0f, 0.0f});
    });
    sum = of_block(sum, [](const Moments& a, const Moments& b) { return join(a, b); });
  }
  if (threadIdx.x == 0) {
    to.numerator[row.index] = valid ? sum.mean : NAN;
    to.gauss_newton[row.index] = valid ? sum.square : NAN;
    to.newton[row.index] = valid ? sum.spread / sum.mass : NAN;
    to.in_support[row.index] = valid && kept;
  }
}

// One warp a row.
__global__ void __launch_bounds__(kWarp) divergence_rows(const Diverge to) {
  wait_for_pass_1();
  const PairSums* tiles = sums_of<PairSums>(to.rows, blockIdx.x);
  PairSums sums = {-INFINITY, 0.0f, 0.0f, -INFINITY, 0.0f};
  for (int tile = threadIdx.x; tile < to.rows.tiles; tile += kWarp) sums = join(sums, tiles[tile]);
  sums = join_warp(sums);
  if (threadIdx.x == 0) {
    const bool valid = sums.mass == sums.mass && sums.top > -INFINITY && sums.top < INFINITY;
    const float kl = sums.gap / sums.mass + (logf(sums.base_mass) - logf(sums.mass));
    to.out[blockIdx.x] = !valid ? NAN : sums.gap == INFINITY ? INFINITY : kl;
  }
}

}  // namespace
