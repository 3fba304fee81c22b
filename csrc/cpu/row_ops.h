// Each operator on one row: the first pass over all tiles, then a second pass over the tiles that
// it needs. With `fork` the tiles of a pass are divided among threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "kernels.h"

namespace {

// The least number of tokens per thread: for fewer, waking the thread costs more than it saves.
constexpr int64_t kFirstPassGrain = 32768;
constexpr int64_t kSecondPassGrain = 16384;

// Working memory for one row, kept from call to call.
struct Scratch {
  TileSums tiles;
  Choices choices;
  Moments moments;
  std::vector<Candidate> candidates;  // grows on demand

  static Scratch& of_thread(int64_t count) {
    thread_local Scratch scratch;
    if (count > scratch.capacity_) scratch.reserve((count + 15) / 16 * 16);
    return scratch;
  }

 private:
  int64_t capacity_ = -1;
  std::unique_ptr<float[]> floats_;
  std::unique_ptr<int32_t[]> active_;
  std::unique_ptr<int64_t[]> tokens_;

  void reserve(int64_t count) {
    floats_ = std::make_unique<float[]>(15 * count);
    active_ = std::make_unique<int32_t[]>(count + 1);  // list_active writes one past its list
    tokens_ = std::make_unique<int64_t[]>(count);
    float* at = floats_.get();
    for (float** array :
         {&tiles.peak, &tiles.sum_exp, &tiles.sum_exp_in_base, &tiles.sum_exp_d, &tiles.base_peak,
          &tiles.base_sum_exp, &choices.peak, &choices.sum_exp, &choices.tempered_sum_exp,
          &choices.merit, &choices.logit, &moments.sum_p, &moments.mean, &moments.spread,
          &moments.squares}) {
      *array = at;
      at += count;
    }
    tiles.active = active_.get();
    choices.token = tokens_.get();
    capacity_ = count;
  }
};

// Calls f(begin, end) on [0, count), with `fork` in several threads.
template <class F>
void each(int64_t count, int64_t grain, bool fork, const F& f) {
  if (fork && count > grain)
    torch::stable::parallel_for(0, count, grain, f);
  else
    f(0, count);
}

int64_t tiles_of(const Row& row) { return (row.vocab + kTile - 1) / kTile; }

// A result whose elements are `stride` apart.
template <class T>
struct Column {
  T* data;
  int64_t stride;

  T& operator[](int64_t i) const { return data[i * stride]; }
};

struct Measured {
  RowStats stats;
  int64_t tiles;
};

// The first pass. A row is invalid if its strength is not finite.
Measured measure(const Kernels& kernels, const Row& row, const Scratch& scratch, bool fork) {
  const int64_t count = tiles_of(row);
  each(count, kFirstPassGrain / kTile, fork, [&](int64_t begin, int64_t end) {
    kernels.measure_tiles(row, begin, end, scratch.tiles);
  });
  Measured measured = {kernels.combine(scratch.tiles, count, row.steering.log_alpha), count};
  if (!std::isfinite(row.steering.strength)) measured.stats.sum_exp = NAN;
  return measured;
}

// Appends the tiles for which keep(tile) is true to the `count` tiles in `active`. It writes every
// tile number and advances past those to keep, without a branch, so it may write one past the list.
template <class F>
int64_t list_active(int64_t tiles, int32_t* active, int64_t count, const F& keep) {
  for (int64_t k = 0; k < tiles; ++k) {
    const bool kept = keep(k);
    active[count] = static_cast<int32_t>(k);
    count += kept;
  }
  return count;
}

void steer_row(const Kernels& kernels, const Row& row, bool fork) {
  const Scratch& scratch = Scratch::of_thread(tiles_of(row));
  const auto [stats, tiles] = measure(kernels, row, scratch, fork);
  if (!is_valid(stats)) return kernels.fill(row.out, 0, row.vocab, NAN, false);
  int32_t* active = scratch.tiles.active;
  const auto flagged = [&](int64_t k) { return active[k] != 0; };
  const int64_t count = list_active(tiles, active, 0, flagged);
  each(count, kSecondPassGrain / kTile, fork, [&, &stats = stats](int64_t begin, int64_t end) {
    kernels.write(row, stats, begin, end, scratch.tiles);
  });
}

void vector_row(const Kernels& kernels, const Row& row, bool fork) {
  const auto [stats, tiles] = measure(kernels, row, Scratch::of_thread(tiles_of(row)), fork);
  if (!is_valid(stats)) return kernels.fill(row.out, 0, row.vocab, NAN, false);
  each(tiles, kSecondPassGrain / kTile, fork, [&, &stats = stats](int64_t begin, int64_t end) {
    kernels.write_vector(row, stats, begin, end);
  });
}

float divergence_row(const Kernels& kernels, const Row& row, bool fork) {
  const int64_t count = tiles_of(row);
  const Scratch& scratch = Scratch::of_thread(count);
  each(count, kFirstPassGrain / kTile, fork, [&](int64_t begin, int64_t end) {
    kernels.measure_pair_tiles(row, begin, end, scratch.tiles);
  });
  return kernels.divergence(scratch.tiles, count);
}

struct Chosen {
  RowStats stats;
  int64_t tiles;  // in `active` and `choices`; 0 if the row is invalid
};

// Both passes: fills `active` and `choices` for every tile with a token left. With a finite
// penalty, tiles off the support only shift by a constant, so their sums of the first pass are
// reused and they follow the others in the list, without a best token. With `read_all` they too are
// read, and all tiles are in order.
Chosen choose_tiles(const Kernels& kernels, const Row& row, const Noise& noise, bool read_all,
                    const Scratch& scratch, bool fork) {
  const auto [stats, tiles] = measure(kernels, row, scratch, fork);
  if (!is_valid(stats)) return {stats, 0};
  const TileSums& sums = scratch.tiles;
  const Choices& choices = scratch.choices;
  const bool removes = row.steering.penalty == -INFINITY;
  const bool all = read_all && !removes;
  const float threshold = stats.threshold;
  int64_t count = list_active(tiles, sums.active, 0, [&](int64_t k) {
    return all || sums.peak[k] >= threshold;
  });
  each(count, kSecondPassGrain / kTile, fork, [&, &stats = stats](int64_t begin, int64_t end) {
    kernels.choose(row, stats, noise, begin, end, sums, choices);
  });
  if (all || removes) return {stats, count};
  const int64_t read = count;
  count = list_active(tiles, sums.active, count, [&](int64_t k) {
    return sums.peak[k] < threshold;
  });
  const float shift = std::fabs(row.steering.strength) * row.steering.penalty;
  for (int64_t i = read; i < count; ++i) {
    choices.peak[i] = sums.peak[sums.active[i]] + shift;
    choices.sum_exp[i] = sums.sum_exp[sums.active[i]];
  }
  return {stats, count};
}

float logprob_of(float logit, const LogSumExp& lse) { return logit - lse.peak - lse.log; }

void sample_row(const Kernels& kernels, const Row& row, const Noise& noise, bool fork,
                int64_t& token, float& logprob) {
  const Scratch& scratch = Scratch::of_thread(tiles_of(row));
  const Choices& choices = scratch.choices;
  const int64_t count = choose_tiles(kernels, row, noise, true, scratch, fork).tiles;
  token = -1;
  logprob = NAN;
  if (count == 0) return;
  const int64_t best = std::max_element(choices.merit, choices.merit + count) - choices.merit;
  token = choices.token[best];
  logprob = logprob_of(choices.logit[best],
                       kernels.log_sum_exp(choices.peak, choices.sum_exp, count, 1.0f));
}

constexpr Noise kNoNoise = {};

float score_row(const Kernels& kernels, const Row& row, int64_t target, bool fork) {
  const Scratch& scratch = Scratch::of_thread(tiles_of(row));
  const Choices& choices = scratch.choices;
  const auto [stats, count] = choose_tiles(kernels, row, kNoNoise, false, scratch, fork);
  if (count == 0) return NAN;
  return logprob_of(kernels.token_at(row, stats, target).logit,
                    kernels.log_sum_exp(choices.peak, choices.sum_exp, count, 1.0f));
}

bool precedes(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
}

// A lower bound of the k-th greatest steered logit: the k-th greatest peak of the tiles, since each
// of k tiles has a token that reaches its peak. Overwrites choices.merit.
float floor_of_best(const Choices& choices, int64_t tiles, int64_t k) {
  if (k > tiles) return -INFINITY;
  std::copy_n(choices.peak, tiles, choices.merit);
  std::nth_element(choices.merit, choices.merit + (k - 1), choices.merit + tiles,
                   [](float a, float b) { return a > b; });
  // One float down: the compiler may fuse the shift of an unread tile into a multiply-add, which
  // rounds once less than the kernels do.
  return std::nextafter(choices.merit[k - 1], -INFINITY);
}

// Writes the tokens of the active tiles whose steered logit is `floor` or more to the front of
// `candidates`, and returns their number.
int64_t gather(const Kernels& kernels, const Row& row, const Chosen& chosen, float floor,
               const Scratch& scratch, std::vector<Candidate>& candidates) {
  int64_t count = 0;
  for (int64_t i = 0; i < chosen.tiles; ++i) {
    if (!(scratch.choices.peak[i] >= floor)) continue;
    if (int64_t(candidates.size()) < count + kTile) candidates.resize(2 * count + 4 * kTile);
    const int32_t tile = scratch.tiles.active[i];
    count += kernels.gather(row, chosen.stats, tile, floor, candidates.data() + count);
  }
  return count;
}

void topk_row(const Kernels& kernels, const Row& row, int64_t k, bool fork,
              const Column<float>& logprob, const Column<int64_t>& token) {
  Scratch& scratch = Scratch::of_thread(tiles_of(row));
  const Chosen chosen = choose_tiles(kernels, row, kNoNoise, false, scratch, fork);
  if (chosen.tiles == 0) {
    for (int64_t i = 0; i < k; ++i) logprob[i] = NAN, token[i] = -1;
    return;
  }
  const Choices& choices = scratch.choices;
  const LogSumExp lse = kernels.log_sum_exp(choices.peak, choices.sum_exp, chosen.tiles, 1.0f);
  const float floor = floor_of_best(choices, chosen.tiles, k);
  int64_t count = gather(kernels, row, chosen, floor, scratch, scratch.candidates);
  Candidate* const best = scratch.candidates.data();
  if (count > k) {
    std::nth_element(best, best + k, best + count, precedes);
    count = k;
  }
  std::sort(best, best + count, precedes);
  for (int64_t i = 0; i < count; ++i) {
    logprob[i] = logprob_of(best[i].logit, lse);
    token[i] = best[i].token;
  }
  // The remaining slots get the other tokens, all of logit -inf, lowest id first.
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

// Moves the candidates that the cuts keep to the front, and returns their number.
int64_t cut(Candidate* best, int64_t count, const Cut& cuts, float temperature,
            const LogSumExp& tempered) {
  if (cuts.top_k > 0 && cuts.top_k < count) {
    std::nth_element(best, best + cuts.top_k, best + count, precedes);
    count = cuts.top_k;
  }
  if (cuts.top_p >= 1) return count;
  // top_p keeps a prefix of the sorted candidates, but sorting all of them is not needed. The end
  // of the prefix lies in [low, high], and `before` is the sum over the candidates before `low`:
  // partition by nth_element and halve the range, then sort the last 64 and walk them.
  const double limit = cuts.top_p * tempered.sum_exp;
  const auto tempered_exp = [&](int64_t i) {
    return std::exp((best[i].logit - tempered.peak) / temperature);
  };
  double before = 0;
  int64_t low = 0, high = count;
  while (high - low > 64) {
    const int64_t middle = low + (high - low) / 2;
    std::nth_element(best + low, best + middle, best + high, precedes);
    double after = before;
    for (int64_t i = low; i < middle; ++i) after += tempered_exp(i);
    if (after >= limit) {
      high = middle;
    } else {
      before = after;
      low = middle;
    }
  }
  std::sort(best + low, best + high, precedes);
  for (int64_t i = low; i < high; ++i) {
    if (i > 0 && before >= limit) return i;
    before += tempered_exp(i);
  }
  return high;
}

// A logit below which the cuts keep no token. For top_p: all tokens of probability below
// (1 - top_p) / V together have at most 1 - top_p, so none of them is kept.
float floor_of_cut(const Cut& cuts, const Row& row, const Choices& choices, int64_t tiles,
                   float temperature, const LogSumExp& tempered) {
  double depth = cuts.log_min_p;
  if (cuts.top_p < 1)
    depth = std::max(depth, tempered.log + std::log1p(-cuts.top_p) - std::log(row.vocab) - 1e-3);
  const double exact = tempered.peak + temperature * depth;
  float floor = static_cast<float>(exact);
  if (floor < exact) floor = std::nextafter(floor, INFINITY);
  return cuts.top_k > 0 ? std::max(floor, floor_of_best(choices, tiles, cuts.top_k)) : floor;
}

void sample_cut_row(const Kernels& kernels, const Row& row, const Noise& noise, const Cut& cuts,
                    bool fork, int64_t& token, float& logprob) {
  Scratch& scratch = Scratch::of_thread(tiles_of(row));
  const Choices& choices = scratch.choices;
  const Chosen chosen = choose_tiles(kernels, row, noise, cuts.top_p < 1, scratch, fork);
  token = -1;
  logprob = NAN;
  if (chosen.tiles == 0) return;
  const LogSumExp plain = kernels.log_sum_exp(choices.peak, choices.sum_exp, chosen.tiles, 1.0f);
  // Only top_p needs this, and for it choose_tiles has read every active tile.
  const LogSumExp tempered =
      cuts.top_p < 1
          ? kernels.log_sum_exp(choices.peak, choices.tempered_sum_exp, chosen.tiles,
                                noise.temperature)
          : plain;
  const float floor =
      floor_of_cut(cuts, row, choices, chosen.tiles, noise.temperature, tempered);
  int64_t count = gather(kernels, row, chosen, floor, scratch, scratch.candidates);
  Candidate* const kept = scratch.candidates.data();
  count = cut(kept, count, cuts, noise.temperature, tempered);
  const int64_t winner = kernels.draw(kept, count, chosen.stats.peak, noise);
  if (winner < 0) return;
  token = kept[winner].token;
  logprob = logprob_of(kept[winner].logit, plain);
}

struct Projection {
  float numerator;
  float gauss_newton;
  float newton;
  bool in_support;
};

Projection project_row(const Kernels& kernels, const Row& row, int64_t target, bool fork) {
  const Scratch& scratch = Scratch::of_thread(tiles_of(row));
  const auto [stats, tiles] = measure(kernels, row, scratch, fork);
  if (!is_valid(stats)) return {NAN, NAN, NAN, false};
  const TileSums& sums = scratch.tiles;
  const Moments& moments = scratch.moments;
  const float threshold = stats.threshold;
  const int64_t count = list_active(tiles, sums.active, 0, [&](int64_t k) {
    return sums.peak[k] >= threshold;
  });
  each(count, kSecondPassGrain / kTile, fork, [&, &stats = stats](int64_t begin, int64_t end) {
    kernels.project(row, stats, begin, end, sums, moments);
  });

  // The mean first and then the spread about it, from those of the tiles: no difference of large
  // sums is formed, so the variance of a near-certain row keeps its digits.
  double mean = 0, squares = 0, spread = 0;
  for (int64_t i = 0; i < count; ++i) {
    mean += double(moments.sum_p[i]) * moments.mean[i];
    squares += moments.squares[i];
    spread += moments.spread[i];
    sums.sum_exp[sums.active[i]] = 0.0f;  // leaves the sums of the other tiles, where x is 0
  }
  for (int64_t i = 0; i < count; ++i) {
    const double away = moments.mean[i] - mean;
    spread += moments.sum_p[i] * away * away;
  }
  spread += double(kernels.sum_exp_of(sums, tiles, stats.peak)) / stats.sum_exp * mean * mean;
  const TokenValues token = kernels.token_at(row, stats, target);
  const bool in_support = token.adapted >= stats.threshold;
  const double delta = in_support ? token.delta : 0.0;
  return {float(delta - mean), float(squares), float(spread), in_support};
}

}  // namespace
