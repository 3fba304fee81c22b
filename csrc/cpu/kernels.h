// What ops.cpp and the instruction-set variants of rows.h agree on. A row is cut into blocks of
// `kBlock` tokens whatever the number of rows and threads, and sums are formed per block and then
// over blocks: a row's result is the same bits alone, in any batch, and on any number of threads.
#pragma once

#include <cstdint>

#include "../row.h"

constexpr int kBlock = 256;

enum class Dtype : int { kFloat32, kBFloat16, kFloat16 };

struct Logits {
  char* data;
  Dtype dtype;
};

struct Row {
  Logits adapted;
  Logits base;
  Logits out;   // steer and steering_vector only
  bool stream;  // one of too many rows to stay in the cache: read ahead, and write past it
  int64_t vocab;
  Steering by;
};

struct Noise {
  float temperature;  // 0: none, the greatest steered logit wins
  uint64_t seed;
  uint64_t position;
  bool after_cuts;  // choose prepares the cuts: without noise, and with the tempered mass
};

// Per block, from the scan of both rows. Arrays have room up to a multiple of 16 blocks.
struct Blocks {
  float* top;        // max adapted
  float* mass;       // sum of exp(adapted - top); NaN where the block spoils the row
  float* opinion;    // the part of mass with a base logit above -inf
  float* gap;        // sum of exp(adapted - top) * d
  float* base_top;   // max base
  float* base_mass;  // sum of exp(base - base_top)
  int32_t* pending;  // 1 until the block is known to lie wholly off the support; then a list
};

// Per pending block, from the second look at it.
struct Choices {
  float* top;       // max steered
  float* mass;      // sum of exp(steered - top)
  float* tempered;  // sum of exp((steered - top) / temperature)
  float* merit;     // of the block's best token
  float* logit;     // its steered logit
  int64_t* token;
};

// Of x = delta on the support and 0 off it, per pending block.
struct Moments {
  float* mass;    // sum of p
  float* mean;    // of x under p
  float* spread;  // sum of p (x - mean)^2
  float* square;  // sum of x^2
};

// A sum of exponentials: sum of exp((x - top) / temperature), and its logarithm.
struct LogSum {
  float top;
  float sum;
  float log;
};

struct Candidate {
  float logit;  // steered
  int32_t token;
};

struct TokenView {
  float adapted;
  float delta;
  float logit;  // steered
};

struct Kernels {
  // Reads blocks [first, last). With `out`, blocks wholly off the support are filled with -inf.
  void (*scan)(const Row&, int64_t first, int64_t last, const Blocks&);
  // The same for divergence: base_top and base_mass in place of opinion, and the d of `gap` are
  // (adapted - top) - (base - base_top).
  void (*scan_both)(const Row&, int64_t first, int64_t last, const Blocks&);
  RowStats (*merge)(const Blocks&, int64_t blocks, float log_alpha);
  float (*divergence)(const Blocks&, int64_t blocks);
  // These two, and project, work on pending[first, last).
  void (*write)(const Row&, const RowStats&, int64_t first, int64_t last, const Blocks&);
  void (*choose)(const Row&, const RowStats&, const Noise&, int64_t first, int64_t last,
                 const Blocks&, const Choices&);
  void (*project)(const Row&, const RowStats&, int64_t first, int64_t last, const Blocks&,
                  const Moments&);
  // The steering vector of blocks [first, last).
  void (*write_vector)(const Row&, const RowStats&, int64_t first, int64_t last);
  TokenView (*view)(const Row&, const RowStats&, int64_t token);
  // Puts the tokens of a block with a steered logit of `floor` or more, -inf excepted, in `to`,
  // which has room for kBlock, and counts them.
  int (*gather)(const Row&, const RowStats&, int64_t block, float floor, Candidate* to);
  // Which candidate has the greatest (logit - top) / temperature + noise; -1: none has any.
  int64_t (*draw)(const Candidate*, int64_t count, float top, const Noise&);
  // Both over blocks: sum of exp((top[k] - max top) / temperature) * mass[k], and of
  // exp(blocks.top[k] - top) * blocks.mass[k].
  LogSum (*log_sum)(float* top, float* mass, int64_t count, float temperature);
  float (*mass_of)(const Blocks&, int64_t count, float top);
  void (*fill)(const Logits&, int64_t begin, int64_t end, float value, bool stream);
};

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SVD_X86_VARIANTS 1
namespace avx512 { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
#endif
namespace portable { extern const Kernels kernels; }
