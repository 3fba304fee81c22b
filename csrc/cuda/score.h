// The second pass of the operators that return a few numbers per row: score, project_strength,
// divergence and support.
#pragma once

#include "walk.h"

namespace {

struct Score {
  Steered of;
  const int64_t* target;
  float* logprob;
};

struct Project {
  Steered of;  // strength and penalty are unused
  const int64_t* target;
  float* numerator;
  float* gauss_newton;
  float* newton;
  bool* in_support;
};

struct Support {
  Steered of;  // strength and penalty are unused
  const int64_t* target;
  int capacity;  // slots per row
  int64_t* token;
  float* p;
  float* delta;
  float* logp;
  float* logq;
  float* mean_d;
  float* divergence;
  int64_t* size;
};

struct Diverge {
  Rows rows;
  float* out;
};

// The logits of a row's target token.
struct Target {
  bool exists;  // in the vocabulary
  float adapted;
  float base;
  float e;  // exp(adapted - peak)
};

SVD_DEVICE Target target_of(const Rows& rows, const Row& row, const int64_t* targets) {
  const int64_t token = targets[row.index];
  if (token < 0 || token >= rows.vocab) return {false, -INFINITY, -INFINITY, 0.0f};
  const float adapted = read(rows.adapted, row.index, static_cast<int>(token));
  const float base = read(rows.base, row.index, static_cast<int>(token));
  return {true, adapted, base, fast_exp(adapted - row.stats.peak)};
}

SVD_DEVICE void answer(const Score& to, int index) {
  const Rows& rows = to.of.rows;
  const Row row = open_row(to.of, index);
  const Target target = target_of(rows, row, to.target);
  float logprob = NAN;
  if (row.valid && target.exists) {
    const float logit = steered(target.adapted, target.base, target.e, row.stats, row.steering);
    logprob = logprob_of(logit, log_sum_exp(rows, row));
  }
  if (threadIdx.x == 0) to.logprob[row.index] = logprob;
}

// Moments of x over tokens weighted by e, and a sum of squares. Two sets are joined by the update
// of Chan et al. (1979): no difference of large sums is formed, so a small variance keeps its
// digits.
struct Moments {
  float sum_exp;  // sum of e
  float mean;     // mean of x under e / sum_exp
  float spread;   // sum of e * (x - mean)^2
  float squares;  // sum of (I delta)^2
};

SVD_DEVICE Moments join(const Moments& a, const Moments& b) {
  const float sum_exp = a.sum_exp + b.sum_exp;
  const float share = sum_exp > 0.0f ? b.sum_exp / sum_exp : 0.0f;
  const float step = b.mean - a.mean;
  return {sum_exp, a.mean + share * step, a.spread + b.spread + a.sum_exp * share * step * step,
          a.squares + b.squares};
}

// With x = I_y delta_y - I delta, the numerator is the mean of x and Var_p(I delta) its variance.
SVD_DEVICE void answer(const Project& to, int index) {
  const Rows& rows = to.of.rows;
  const Row row = open_row(to.of, index);
  const Target target = target_of(rows, row, to.target);
  const bool valid = row.valid && target.exists, kept = target.adapted >= row.stats.threshold;
  Moments sum = {};
  if (valid) {
    const float target_delta =
        kept ? delta_of(target.adapted, target.base, target.e, row.stats, to.of.projected) : 0.0f;
    walk(rows, row, [&](float peak) { return has_support(peak, row); },
         [&](int, const float (&z)[kRun], const float (&b)[kRun]) {
#pragma unroll
           for (int j = 0; j < kRun; ++j) {
             const float e = fast_exp(z[j] - row.stats.peak);
             const float delta = delta_of(z[j], b[j], e, row.stats, to.of.projected);
             const float masked = z[j] >= row.stats.threshold ? delta : 0.0f;  // I delta
             sum = join(sum, Moments{e, target_delta - masked, 0.0f, masked * masked});
           }
           return true;
         });
    each_tile_off_support(rows, row, [&](const Sums& tile) {
      sum = join(sum, Moments{rescale(tile.peak, row.stats.peak) * tile.sum_exp, target_delta, 0.0f,
                              0.0f});
    });
    sum = of_block(sum, [](const Moments& a, const Moments& b) { return join(a, b); });
  }
  if (threadIdx.x == 0) {
    to.numerator[row.index] = valid ? sum.mean : NAN;
    to.gauss_newton[row.index] = valid ? sum.squares : NAN;
    to.newton[row.index] = valid ? sum.spread / sum.sum_exp : NAN;
    to.in_support[row.index] = valid && kept;
  }
}

SVD_DEVICE PairSums pair_sums_of(const Rows& rows, int row) {
  return join_tiles(kNoPairs, sums_of<PairSums>(rows, row), 1, rows.tiles);
}

// KL(p || q)  (6), NaN for an invalid row.
SVD_DEVICE float divergence_of(const PairSums& sums) {
  const Sums& own = sums.own;
  const bool valid = own.sum_exp == own.sum_exp && own.peak > -INFINITY && own.peak < INFINITY;
  const float nats =
      sums.sum_exp_gap / own.sum_exp + (logf(sums.base_sum_exp) - logf(own.sum_exp));
  return !valid ? NAN : sums.sum_exp_gap == INFINITY ? INFINITY : nats;
}

// One warp per row.
SVD_DEVICE void answer(const Diverge& to, int index) {
  const float nats = divergence_of(pair_sums_of(to.rows, index));
  if (threadIdx.x == 0) to.out[index] = nats;
}

SVD_DEVICE void answer(const Support& to, int index) {
  const Rows& rows = to.of.rows;
  const Row row = open_row<PairSums>(to.of, index);
  const int64_t start = int64_t{row.index} * to.capacity;
  int size = 0;
  if (row.valid)
    walk(rows, row, [&](float peak) { return has_support(peak, row); },
         [&](int token, const float (&z)[kRun], const float (&b)[kRun]) {
           int mine = 0, total;
#pragma unroll
           for (int j = 0; j < kRun; ++j)
             mine += z[j] > -INFINITY && z[j] >= row.stats.threshold;
           int at = size + sum_before(mine, total);
#pragma unroll
           for (int j = 0; j < kRun; ++j) {
             const bool kept = z[j] > -INFINITY && z[j] >= row.stats.threshold;
             if (kept && at < to.capacity) {
               const float e = fast_exp(z[j] - row.stats.peak);
               to.token[start + at] = token + j;
               to.p[start + at] = e / row.stats.sum_exp;
               to.delta[start + at] = delta_of(z[j], b[j], e, row.stats, to.of.projected);
             }
             at += kept;
           }
           size += total;
           return true;
         });
  for (int slot = size + threadIdx.x; slot < to.capacity; slot += kWalkThreads) {
    to.token[start + slot] = -1;
    to.p[start + slot] = to.delta[start + slot] = row.valid ? 0.0f : NAN;
  }
  const Target target = target_of(rows, row, to.target);
  const PairSums sums = pair_sums_of(rows, row.index);
  if (threadIdx.x > 0) return;
  const bool scored = row.valid && target.exists;
  const float logp = target.adapted - row.stats.peak - logf(row.stats.sum_exp);
  const float logq = target.base - sums.base_peak - logf(sums.base_sum_exp);
  to.logp[row.index] = scored ? logp : NAN;
  to.logq[row.index] = !scored ? NAN : target.base > -INFINITY ? logq : -INFINITY;
  to.mean_d[row.index] = row.valid ? row.stats.mean_d : NAN;
  to.divergence[row.index] = row.valid ? divergence_of(sums) : NAN;
  to.size[row.index] = size;
}

}  // namespace
