// The second pass of the operators that choose tokens: sample, with or without cuts, and topk.
#pragma once

#include "walk.h"

namespace {

constexpr int kNone = INT_MAX;
constexpr int kList = 512;  // tokens listed in shared memory; rows with more are read again

struct Sample {
  Steered of;
  float temperature;  // 0: greedy
  int top_k;          // INT_MAX: all
  float top_p;        // inf: all
  float log_min_p;    // -inf: all
  PerRow<int64_t> seed;
  PerRow<int64_t> position;
  int64_t* token;
  float* logprob;
};

struct CutSample : Sample {};  // top_k, top_p or log_min_p removes tokens

struct TopK {
  Steered of;
  int k;
  float* logprob;
  int64_t* token;
};

// Packs a steered logit and a token id into one integer, greater for the token that comes first:
// the one with the greater logit, or of equal logits with the lower id. The float's bits, with all
// bits of a negative float flipped and the sign bit of a positive one set, sort as unsigned
// integers in the order of the floats; they are the high word, and the complement of the id is the
// low word. So the max over a block, a comparison and a bisection need no separate rule for ties.
SVD_DEVICE uint64_t order_of(float logit, int token) {
  logit += 0.0f;  // turns -0 into 0
  uint32_t bits;
  std::memcpy(&bits, &logit, sizeof bits);
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return uint64_t{bits} << 32 | ~static_cast<uint32_t>(token);
}

SVD_DEVICE int token_of(uint64_t order) { return static_cast<int>(~static_cast<uint32_t>(order)); }

SVD_DEVICE float logit_of(uint64_t order) {
  uint32_t bits = static_cast<uint32_t>(order >> 32);
  bits = bits & 0x80000000u ? bits & 0x7FFFFFFFu : ~bits;
  float logit;
  std::memcpy(&logit, &bits, sizeof logit);
  return logit;
}

SVD_DEVICE uint64_t greatest_of_block(uint64_t mine) {
  return of_block(mine, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
}

// Lists the orders of the first kList tokens that are not removed, lowest id first; returns how
// many such tokens there are in all.
SVD_DEVICE int collect(const Rows& rows, const Row& row, uint64_t* list) {
  int count = 0;
  walk_active(rows, row, [&](int token, const float (&logits)[kRun]) {
    int mine = 0, total;
#pragma unroll
    for (int j = 0; j < kRun; ++j) mine += logits[j] > -INFINITY;
    int at = count + sum_before(mine, total);
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      const bool left = logits[j] > -INFINITY;
      if (left && at < kList) list[at] = order_of(logits[j], token + j);
      at += left;
    }
    count += total;
  });
  __syncthreads();
  return count;
}

// Of the tokens that come before some token: how many there are, and the sum of their
// exp((logit - best) / temperature), where `best` is the greatest steered logit of the row.
struct Before {
  int count;
  float sum_exp;
};

SVD_DEVICE Before join(const Before& a, const Before& b) {
  return {a.count + b.count, a.sum_exp + b.sum_exp};
}

// The order of the last token that the cuts keep. Every cut keeps the first token, and with a token
// also all those before it, so what is kept is a prefix of the order. A row with up to kList tokens
// left is resolved in shared memory; a longer one by bisection over orders, one walk per step.
SVD_DEVICE uint64_t last_kept(const Sample& to, const Row& row) {
  __shared__ uint64_t list[kList];
  __shared__ float tempered[kList];
  const Rows& rows = to.of.rows;
  const int count = collect(rows, row, list);
  const auto keeps = [&](float best, float sum_exp, uint64_t order, const Before& before) {
    return before.count < to.top_k && before.sum_exp < to.top_p * sum_exp &&
           (logit_of(order) - best) / to.temperature >= to.log_min_p;
  };
  const auto tempered_exp = [&](float logit, float best) {
    return fast_exp((logit - best) / to.temperature);
  };

  if (count <= kList) {
    uint64_t first = 0;
    for (int i = threadIdx.x; i < count; i += kWalkThreads)
      first = list[i] > first ? list[i] : first;
    first = greatest_of_block(first);
    const float best = logit_of(first);
    for (int i = threadIdx.x; i < count; i += kWalkThreads)
      tempered[i] = tempered_exp(logit_of(list[i]), best);
    __syncthreads();
    float sum_exp = 0.0f;
    for (int i = 0; i < count; ++i) sum_exp += tempered[i];
    uint64_t removed = 0;  // the first token that is not kept
    for (int i = threadIdx.x; i < count; i += kWalkThreads) {
      const uint64_t order = list[i];
      Before before = {};
      for (int j = 0; j < count; ++j)
        if (list[j] > order) before = join(before, {1, tempered[j]});
      if (order != first && !keeps(best, sum_exp, order, before) && order > removed)
        removed = order;
    }
    return greatest_of_block(removed) + 1;
  }

  uint64_t first = 0;
  walk_active(rows, row, [&](int token, const float (&logits)[kRun]) {
    for (int j = 0; j < kRun; ++j) {
      const uint64_t order = order_of(logits[j], token + j);
      first = logits[j] > -INFINITY && order > first ? order : first;
    }
  });
  first = greatest_of_block(first);
  const float best = logit_of(first);
  const auto before_order = [&](uint64_t order) {
    Before before = {};
    walk_active(rows, row, [&](int token, const float (&logits)[kRun]) {
#pragma unroll
      for (int j = 0; j < kRun; ++j)
        if (order_of(logits[j], token + j) > order)
          before = join(before, {1, tempered_exp(logits[j], best)});
    });
    return of_block(before, [](const Before& a, const Before& b) { return join(a, b); });
  };
  uint64_t low = order_of(-INFINITY, 0), high = first;  // low < the answer <= high
  const float sum_exp = before_order(low).sum_exp;
  while (high - low > 1) {
    const uint64_t middle = low + (high - low) / 2;
    (keeps(best, sum_exp, middle, before_order(middle)) ? high : low) = middle;
  }
  return high;
}

// The best token of some, and the log-sum-exp of all of them.
struct Choice {
  float merit;
  int token;  // kNone if there is none
  float logit;
  LogSumExp lse;
};

SVD_DEVICE Choice better(const Choice& a, const Choice& b) {
  const bool second = b.merit > a.merit || (b.merit == a.merit && b.token < a.token);
  return {second ? b.merit : a.merit, second ? b.token : a.token, second ? b.logit : a.logit,
          join(a.lse, b.lse)};
}

template <bool kCut>
SVD_DEVICE void choose(const Sample& to, int index) {
  const Rows& rows = to.of.rows;
  const Row row = open_row(to.of, index);
  if (!row.valid) {
    if (threadIdx.x == 0) {
      to.token[row.index] = -1;
      to.logprob[row.index] = NAN;
    }
    return;
  }
  const uint64_t last = kCut ? last_kept(to, row) : 0;
  const uint64_t seed = value_of(to.seed, row.index), position = value_of(to.position, row.index);

  Choice choice = {-INFINITY, kNone, -INFINITY, {-INFINITY, 0.0f}};
  walk_active(rows, row, [&](int token, const float (&logits)[kRun]) {
    accumulate(choice.lse, logits);
    FourWords<uint64_t> bits = {};  // of four tokens
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      if (j % 4 == 0 && to.temperature > 0.0f)
        bits = philox(seed, static_cast<uint64_t>(token + j) / 4, position);
      if (kCut && order_of(logits[j], token + j) < last) continue;
      float merit = logits[j];
      if (to.temperature > 0.0f && merit > -INFINITY) {
        const float noise = gumbel<float>(static_cast<uint32_t>(bits.of[j % 4]));
        // Relative to the peak, so that large logits do not round the noise away.
        merit = merit_of(merit - row.stats.peak, noise, to.temperature);
      }
      if (merit > choice.merit) {  // strictly: of equals the lowest token id wins
        choice.merit = merit;
        choice.token = token + j;
        choice.logit = logits[j];
      }
    }
  });
  choice = of_block(choice, [](const Choice& a, const Choice& b) { return better(a, b); });
  if (threadIdx.x == 0) {
    to.token[row.index] = choice.token == kNone ? -1 : choice.token;
    to.logprob[row.index] = logprob_of(choice.logit, choice.lse);
  }
}

SVD_DEVICE void answer(const Sample& to, int index) { choose<false>(to, index); }
SVD_DEVICE void answer(const CutSample& to, int index) { choose<true>(to, index); }

// Fills the slots from `slot` on with the tokens of logit -inf, lowest id first.
SVD_DEVICE void list_removed(const TopK& to, const Row& row, int slot) {
  const Rows& rows = to.of.rows;
  walk_steered(rows, row, [](float) { return true; }, [&](int token, const float (&logits)[kRun]) {
    int mine = 0, total;
#pragma unroll
    for (int j = 0; j < kRun; ++j) mine += token + j < rows.vocab && !(logits[j] > -INFINITY);
    int at = slot + sum_before(mine, total);
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      const bool removed = token + j < rows.vocab && !(logits[j] > -INFINITY);
      if (removed && at < to.k) {
        to.token[int64_t{row.index} * to.k + at] = token + j;
        to.logprob[int64_t{row.index} * to.k + at] = -INFINITY;
      }
      at += removed;
    }
    slot += total;
    return slot < to.k;
  });
}

SVD_DEVICE void answer(const TopK& to, int index) {
  const Rows& rows = to.of.rows;
  const Row row = open_row(to.of, index);
  const int64_t start = int64_t{row.index} * to.k;
  if (!row.valid) {
    for (int slot = threadIdx.x; slot < to.k; slot += kWalkThreads) {
      to.token[start + slot] = -1;
      to.logprob[start + slot] = NAN;
    }
    return;
  }
  const LogSumExp lse = log_sum_exp(rows, row);
  const auto put = [&](int slot, uint64_t order) {
    to.token[start + slot] = token_of(order);
    to.logprob[start + slot] = logprob_of(logit_of(order), lse);
  };

  __shared__ uint64_t list[kList];
  const int count = collect(rows, row, list);
  if (count <= kList) {
    for (int i = threadIdx.x; i < count; i += kWalkThreads) {
      int before = 0;
      for (int j = 0; j < count; ++j) before += list[j] > list[i];
      if (before < to.k) put(before, list[i]);
    }
  } else {
    uint64_t last = UINT64_MAX;
    for (int slot = 0; slot < to.k && slot < count; ++slot) {
      uint64_t next = 0;
      walk_active(rows, row, [&](int token, const float (&logits)[kRun]) {
#pragma unroll
        for (int j = 0; j < kRun; ++j) {
          const uint64_t order = order_of(logits[j], token + j);
          next = logits[j] > -INFINITY && order < last && order > next ? order : next;
        }
      });
      last = greatest_of_block(next);
      if (threadIdx.x == 0) put(slot, last);
    }
  }
  if (count < to.k) list_removed(to, row, count);
}

}  // namespace
