// The interface between ops.cpp and the instruction-set variants of rows.h. Names are those of the
// glossary in kernels/reference.py. A row is cut into tiles of `kTile` tokens regardless of the
// number of rows and threads, and sums are formed per tile and then over tiles: a row's result has
// the same bits alone, in any batch and on any number of threads.
#pragma once

#include <cstdint>

#include "../row.h"

constexpr int kTile = 256;

enum class Dtype : int { kFloat32, kBFloat16, kFloat16 };

struct Logits {
  char* data;
  Dtype dtype;
};

struct Row {
  Logits adapted;
  Logits base;
  Logits out;   // of steer and steering_vector only
  bool stream;  // the rows together exceed the cache: prefetch reads, and write around the cache
  int64_t vocab;
  Steering steering;
};

struct Noise {
  float temperature;  // 0: no noise, the greatest steered logit is chosen
  uint64_t seed;
  uint64_t position;
  bool after_cuts;  // noise is added after the cuts: `choose` adds none and forms tempered_sum_exp
};

// Sums of each tile, from the first pass over both rows; e = exp(adapted - peak). The arrays have
// room for a multiple of 16 tiles.
struct TileSums {
  float* peak;             // max adapted
  float* sum_exp;          // sum of e; NaN if a token makes the row invalid
  float* sum_exp_in_base;  // the part of sum_exp on tokens in base
  float* sum_exp_d;        // sum of e * d
  // Of measure_pair_tiles alone:
  float* base_peak;        // max base
  float* base_sum_exp;     // sum of exp(base - base_peak)
  // Sum of e * ((adapted - peak) - (base - base_peak)), +inf if a token is possible in adapted and
  // not in base. A shift common to all logits is not rounded away in it.
  float* sum_exp_gap;
  // After measure_tiles a flag per tile: 0 if `out` of the tile is already filled, 1 if a token may
  // be left. list_active then overwrites it with a list of tile numbers.
  int32_t* active;
};

// Of the steered logits of each active tile, from the second pass.
struct Choices {
  float* peak;              // max steered logit
  float* sum_exp;           // sum of exp(logit - peak)
  float* tempered_sum_exp;  // sum of exp((logit - peak) / temperature)
  float* merit;             // of the tile's best token
  float* logit;             // its steered logit
  int64_t* token;
};

// Of x = I delta, which is delta on the support and 0 off it, in each active tile.
struct Moments {
  float* sum_p;    // sum of p
  float* mean;     // mean of x under p / sum_p
  float* spread;   // sum of p * (x - mean)^2
  float* squares;  // sum of x^2
};

// The log-sum-exp of some steered logits is peak + log(sum_exp), with sums relative to their peak.
struct LogSumExp {
  float peak;
  float sum_exp;  // sum of exp((logit - peak) / temperature)
  float log;      // log(sum_exp)
};

struct Candidate {
  float logit;  // steered
  int32_t token;
};

struct Entry {
  int32_t token;
  float p;
  float delta;
};

struct TokenValues {
  float adapted;
  float base;
  float delta;
  float logit;  // steered
};

struct Kernels {
  // First pass over tiles [begin, end). With `out`, a tile known to be off the support is filled
  // with -inf.
  void (*measure_tiles)(const Row&, int64_t begin, int64_t end, const TileSums&);
  // The first pass of divergence and support, which sums the base too.
  void (*measure_pair_tiles)(const Row&, int64_t begin, int64_t end, const TileSums&);
  RowStats (*combine)(const TileSums&, int64_t tiles, float log_alpha);
  float (*divergence)(const TileSums&, int64_t tiles);
  // Second passes over the tiles active[begin, end): write `out`; make Choices; make Moments.
  void (*write)(const Row&, const RowStats&, int64_t begin, int64_t end, const TileSums&);
  void (*choose)(const Row&, const RowStats&, const Noise&, int64_t begin, int64_t end,
                 const TileSums&, const Choices&);
  void (*project)(const Row&, const RowStats&, int64_t begin, int64_t end, const TileSums&,
                  const Moments&);
  // Writes the steering vector of tiles [begin, end).
  void (*write_vector)(const Row&, const RowStats&, int64_t begin, int64_t end);
  TokenValues (*token_at)(const Row&, const RowStats&, int64_t token);
  // Writes the tokens of a tile whose steered logit is `floor` or more, -inf excluded, to `to`,
  // which has room for kTile, and returns their number.
  int (*gather)(const Row&, const RowStats&, int64_t tile, float floor, Candidate* to);
  // Writes the tokens of a tile that are in the support to `to`, which has room for kTile, lowest
  // first, and returns their number.
  int (*list)(const Row&, const RowStats&, int64_t tile, Entry* to);
  // The index of the candidate with the greatest (logit - peak) / temperature + noise, or -1 if
  // none has a logit above -inf.
  int64_t (*draw)(const Candidate*, int64_t count, float peak, const Noise&);
  // Sums over tiles, relative to the greatest peak: of exp((peak[k] - greatest) / temperature) *
  // sum_exp[k].
  LogSumExp (*log_sum_exp)(float* peak, float* sum_exp, int64_t count, float temperature);
  // Sum over tiles of exp(tiles.peak[k] - peak) * tiles.sum_exp[k].
  float (*sum_exp_of)(const TileSums&, int64_t count, float peak);
  void (*fill)(const Logits&, int64_t begin, int64_t end, float value, bool stream);
};

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SVD_X86_VARIANTS 1
namespace avx512 { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
#endif
namespace portable { extern const Kernels kernels; }
