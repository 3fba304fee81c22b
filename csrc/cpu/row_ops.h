// What every operator does to one row: the scan of both rows, then a second look at the blocks that
// matter. `fork` shares the blocks out among threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "kernels.h"

namespace {

// Tokens that are worth a thread: below, waking it costs more than it saves.
constexpr int64_t kScanGrain = 32768;
constexpr int64_t kFinishGrain = 16384;

// One row's working memory, kept from call to call.
struct Scratch {
  Blocks blocks;
  Choices choices;
  Moments moments;
  std::vector<Candidate> candidates;  // grows as it is needed

  static Scratch& of_thread(int64_t count) {
    thread_local Scratch scratch;
    if (count > scratch.capacity_) scratch.reserve((count + 15) / 16 * 16);
    return scratch;
  }

 private:
  int64_t capacity_ = -1;
  std::unique_ptr<float[]> floats_;
  std::unique_ptr<int32_t[]> pending_;
  std::unique_ptr<int64_t[]> tokens_;

  void reserve(int64_t count) {
    floats_ = std::make_unique<float[]>(15 * count);
    pending_ = std::make_unique<int32_t[]>(count + 1);  // list_pending writes ahead
    tokens_ = std::make_unique<int64_t[]>(count);
    float* at = floats_.get();
    for (float** array :
         {&blocks.top, &blocks.mass, &blocks.opinion, &blocks.gap, &blocks.base_top,
          &blocks.base_mass, &choices.top, &choices.mass, &choices.tempered, &choices.merit,
          &choices.logit, &moments.mass, &moments.mean, &moments.spread, &moments.square}) {
      *array = at;
      at += count;
    }
    blocks.pending = pending_.get();
    choices.token = tokens_.get();
    capacity_ = count;
  }
};

template <class F>
void each(int64_t count, int64_t grain, bool fork, const F& f) {
  if (fork && count > grain)
    torch::stable::parallel_for(0, count, grain, f);
  else
    f(0, count);
}

int64_t blocks_of(const Row& row) { return (row.vocab + kBlock - 1) / kBlock; }

// A result that lies `stride` elements apart.
template <class T>
struct Column {
  T* data;
  int64_t stride;

  T& operator[](int64_t i) const { return data[i * stride]; }
};

struct Scanned {
  RowStats stats;
  int64_t blocks;
};

Scanned scan(const Kernels& kernels, const Row& row, const Scratch& scratch, bool fork) {
  const int64_t count = blocks_of(row);
  each(count, kScanGrain / kBlock, fork, [&](int64_t first, int64_t last) {
    kernels.scan(row, first, last, scratch.blocks);
  });
  return {kernels.merge(scratch.blocks, count, row.by.log_alpha), count};
}

// Appends the blocks for which `keep` holds to the `count` in `pending`.
template <class F>
int64_t list_pending(int64_t blocks, int32_t* pending, int64_t count, const F& keep) {
  for (int64_t k = 0; k < blocks; ++k) {
    const bool kept = keep(k);
    pending[count] = static_cast<int32_t>(k);
    count += kept;
  }
  return count;
}

void steer_row(const Kernels& kernels, const Row& row, bool fork) {
  const Scratch& scratch = Scratch::of_thread(blocks_of(row));
  const auto [stats, blocks] = scan(kernels, row, scratch, fork);
  if (!is_valid(stats)) return kernels.fill(row.out, 0, row.vocab, NAN, false);
  int32_t* pending = scratch.blocks.pending;
  const auto flagged = [&](int64_t k) { return pending[k] != 0; };
  const int64_t count = list_pending(blocks, pending, 0, flagged);
  each(count, kFinishGrain / kBlock, fork, [&, &stats = stats](int64_t first, int64_t last) {
    kernels.write(row, stats, first, last, scratch.blocks);
  });
}

void vector_row(const Kernels& kernels, const Row& row, bool fork) {
  const auto [stats, blocks] = scan(kernels, row, Scratch::of_thread(blocks_of(row)), fork);
  if (!is_valid(stats)) return kernels.fill(row.out, 0, row.vocab, NAN, false);
  each(blocks, kFinishGrain / kBlock, fork, [&, &stats = stats](int64_t first, int64_t last) {
    kernels.write_vector(row, stats, first, last);
  });
}

float divergence_row(const Kernels& kernels, const Row& row, bool fork) {
  const int64_t count = blocks_of(row);
  const Scratch& scratch = Scratch::of_thread(count);
  each(count, kScanGrain / kBlock, fork, [&](int64_t first, int64_t last) {
    kernels.scan_both(row, first, last, scratch.blocks);
  });
  return kernels.divergence(scratch.blocks, count);
}

struct Looked {
  RowStats stats;
  int64_t blocks;  // in `pending` and `choices`; 0 in a row that is not valid
};

// Makes a choice in every block of the support. With a finite penalty the other blocks follow, in
// which the scan has seen all: their logits moved together. `at_all` looks at them too, in order.
Looked look(const Kernels& kernels, const Row& row, const Noise& noise, bool at_all,
            const Scratch& scratch, bool fork) {
  const auto [stats, blocks] = scan(kernels, row, scratch, fork);
  if (!is_valid(stats)) return {stats, 0};
  const Blocks& seen = scratch.blocks;
  const Choices& choices = scratch.choices;
  const bool removes = row.by.penalty == -INFINITY;
  const bool all = at_all && !removes;
  const float threshold = stats.threshold;
  int64_t count = list_pending(blocks, seen.pending, 0, [&](int64_t k) {
    return all || seen.top[k] >= threshold;
  });
  each(count, kFinishGrain / kBlock, fork, [&, &stats = stats](int64_t first, int64_t last) {
    kernels.choose(row, stats, noise, first, last, seen, choices);
  });
  if (all || removes) return {stats, count};
  const int64_t looked_at = count;
  count = list_pending(blocks, seen.pending, count, [&](int64_t k) {
    return seen.top[k] < threshold;
  });
  const float off = std::fabs(row.by.strength) * row.by.penalty;
  for (int64_t i = looked_at; i < count; ++i) {
    choices.top[i] = seen.top[seen.pending[i]] + off;
    choices.mass[i] = seen.mass[seen.pending[i]];
  }
  return {stats, count};
}

float log_prob(float logit, const LogSum& of) { return logit - of.top - of.log; }

void sample_row(const Kernels& kernels, const Row& row, const Noise& noise, bool fork,
                int64_t& token, float& logprob) {
  const Scratch& scratch = Scratch::of_thread(blocks_of(row));
  const Choices& choices = scratch.choices;
  const int64_t count = look(kernels, row, noise, true, scratch, fork).blocks;
  token = -1;
  logprob = NAN;
  if (count == 0) return;
  const int64_t best = std::max_element(choices.merit, choices.merit + count) - choices.merit;
  token = choices.token[best];
  logprob = log_prob(choices.logit[best], kernels.log_sum(choices.top, choices.mass, count, 1.0f));
}

constexpr Noise kNoNoise = {};

float score_row(const Kernels& kernels, const Row& row, int64_t target, bool fork) {
  const Scratch& scratch = Scratch::of_thread(blocks_of(row));
  const Choices& choices = scratch.choices;
  const auto [stats, count] = look(kernels, row, kNoNoise, false, scratch, fork);
  if (count == 0) return NAN;
  return log_prob(kernels.view(row, stats, target).logit,
                  kernels.log_sum(choices.top, choices.mass, count, 1.0f));
}

bool precedes(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
}

// A logit that the k-th best token does not lie below: that of the k-th best block.
float floor_of_best(const Choices& choices, int64_t blocks, int64_t k) {
  if (k > blocks) return -INFINITY;
  std::copy_n(choices.top, blocks, choices.merit);
  std::nth_element(choices.merit, choices.merit + (k - 1), choices.merit + blocks,
                   [](float a, float b) { return a > b; });
  // A step down, because a compiler may round what is above once less than the kernels.
  return std::nextafter(choices.merit[k - 1], -INFINITY);
}

// The tokens of the listed blocks whose steered logit is `floor` or more, first in `candidates`.
int64_t gather(const Kernels& kernels, const Row& row, const Looked& looked, float floor,
               const Scratch& scratch, std::vector<Candidate>& candidates) {
  int64_t count = 0;
  for (int64_t i = 0; i < looked.blocks; ++i) {
    if (!(scratch.choices.top[i] >= floor)) continue;
    if (int64_t(candidates.size()) < count + kBlock) candidates.resize(2 * count + 4 * kBlock);
    const int32_t block = scratch.blocks.pending[i];
    count += kernels.gather(row, looked.stats, block, floor, candidates.data() + count);
  }
  return count;
}

void topk_row(const Kernels& kernels, const Row& row, int64_t k, bool fork,
              const Column<float>& logprob, const Column<int64_t>& token) {
  Scratch& scratch = Scratch::of_thread(blocks_of(row));
  const Looked looked = look(kernels, row, kNoNoise, false, scratch, fork);
  if (looked.blocks == 0) {
    for (int64_t i = 0; i < k; ++i) logprob[i] = NAN, token[i] = -1;
    return;
  }
  const Choices& choices = scratch.choices;
  const LogSum sum = kernels.log_sum(choices.top, choices.mass, looked.blocks, 1.0f);
  const float floor = floor_of_best(choices, looked.blocks, k);
  int64_t count = gather(kernels, row, looked, floor, scratch, scratch.candidates);
  Candidate* const best = scratch.candidates.data();
  if (count > k) {
    std::nth_element(best, best + k, best + count, precedes);
    count = k;
  }
  std::sort(best, best + count, precedes);
  for (int64_t i = 0; i < count; ++i) {
    logprob[i] = log_prob(best[i].logit, sum);
    token[i] = best[i].token;
  }
  // Then the lowest of the tokens that are left, all of them impossible.
  std::sort(best, best + count,
            [](const Candidate& a, const Candidate& b) { return a.token < b.token; });
  for (int64_t i = count, next = 0, taken = 0; i < k; ++next) {
    if (taken < count && best[taken].token == next) {
      ++taken;
      continue;
    }
    logprob[i] = -INFINITY;
    token[i++] = next;
  }
}

struct Cut {
  int64_t top_k;  // 0: no limit
  double top_p;
  double log_min_p;
};

// How many of the candidates are kept; they come first.
int64_t cut(Candidate* best, int64_t count, const Cut& by, float temperature,
            const LogSum& tempered) {
  if (by.top_k > 0 && by.top_k < count) {
    std::nth_element(best, best + by.top_k, best + count, precedes);
    count = by.top_k;
  }
  if (by.top_p >= 1) return count;
  // The cut lies in [first, last], and `before` is what precedes `first`: halve, then walk.
  const double enough = by.top_p * tempered.sum;
  const auto weight = [&](int64_t i) {
    return std::exp((best[i].logit - tempered.top) / temperature);
  };
  double before = 0;
  int64_t first = 0, last = count;
  while (last - first > 64) {
    const int64_t middle = first + (last - first) / 2;
    std::nth_element(best + first, best + middle, best + last, precedes);
    double after = before;
    for (int64_t i = first; i < middle; ++i) after += weight(i);
    if (after >= enough) {
      last = middle;
    } else {
      before = after;
      first = middle;
    }
  }
  std::sort(best + first, best + last, precedes);
  for (int64_t i = first; i < last; ++i) {
    if (i > 0 && before >= enough) return i;
    before += weight(i);
  }
  return last;
}

// A logit below which the cuts keep nothing: by top_p, because all tokens that are less likely than
// (1 - top_p) / V together have no more than 1 - top_p.
float floor_of_cut(const Cut& by, const Row& row, const Choices& choices, int64_t blocks,
                   float temperature, const LogSum& tempered) {
  double depth = by.log_min_p;
  if (by.top_p < 1)
    depth = std::max(depth, tempered.log + std::log1p(-by.top_p) - std::log(row.vocab) - 1e-3);
  const double exact = tempered.top + temperature * depth;
  float floor = static_cast<float>(exact);
  if (floor < exact) floor = std::nextafter(floor, INFINITY);
  return by.top_k > 0 ? std::max(floor, floor_of_best(choices, blocks, by.top_k)) : floor;
}

void sample_cut_row(const Kernels& kernels, const Row& row, const Noise& noise, const Cut& by,
                    bool fork, int64_t& token, float& logprob) {
  Scratch& scratch = Scratch::of_thread(blocks_of(row));
  const Choices& choices = scratch.choices;
  const Looked looked = look(kernels, row, noise, by.top_p < 1, scratch, fork);
  token = -1;
  logprob = NAN;
  if (looked.blocks == 0) return;
  const LogSum plain = kernels.log_sum(choices.top, choices.mass, looked.blocks, 1.0f);
  // Of use to top_p alone, for which every block that is not removed has been looked at.
  const LogSum tempered =
      by.top_p < 1
          ? kernels.log_sum(choices.top, choices.tempered, looked.blocks, noise.temperature)
          : plain;
  const float floor =
      floor_of_cut(by, row, choices, looked.blocks, noise.temperature, tempered);
  int64_t count = gather(kernels, row, looked, floor, scratch, scratch.candidates);
  Candidate* const kept = scratch.candidates.data();
  count = cut(kept, count, by, noise.temperature, tempered);
  const int64_t winner = kernels.draw(kept, count, looked.stats.top, noise);
  if (winner < 0) return;
  token = kept[winner].token;
  logprob = log_prob(kept[winner].logit, plain);
}

struct Projection {
  float numerator;
  float gauss_newton;
  float newton;
  bool in_support;
};

Projection project_row(const Kernels& kernels, const Row& row, int64_t target, bool fork) {
  const Scratch& scratch = Scratch::of_thread(blocks_of(row));
  const auto [stats, blocks] = scan(kernels, row, scratch, fork);
  if (!is_valid(stats)) return {NAN, NAN, NAN, false};
  const Blocks& seen = scratch.blocks;
  const Moments& moments = scratch.moments;
  const float threshold = stats.threshold;
  const int64_t count = list_pending(blocks, seen.pending, 0, [&](int64_t k) {
    return seen.top[k] >= threshold;
  });
  each(count, kFinishGrain / kBlock, fork, [&, &stats = stats](int64_t first, int64_t last) {
    kernels.project(row, stats, first, last, seen, moments);
  });

  double mean = 0, square = 0, spread = 0;
  for (int64_t i = 0; i < count; ++i) {
    mean += double(moments.mass[i]) * moments.mean[i];
    square += moments.square[i];
    spread += moments.spread[i];
    seen.mass[seen.pending[i]] = 0.0f;  // which leaves the blocks off the support, where x is 0
  }
  for (int64_t i = 0; i < count; ++i) {
    const double away = moments.mean[i] - mean;
    spread += moments.mass[i] * away * away;
  }
  spread += double(kernels.mass_of(seen, blocks, stats.top)) / stats.mass * mean * mean;
  const TokenView token = kernels.view(row, stats, target);
  const bool in_support = token.adapted >= stats.threshold;
  const double delta = in_support ? token.delta : 0.0;
  return {float(delta - mean), float(square), float(spread), in_support};
}

}  // namespace
