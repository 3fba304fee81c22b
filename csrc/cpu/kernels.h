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
  Logits out;   // steer only
  bool stream;  // `out` is one of too many rows to stay in the cache: write past it
  int64_t vocab;
  Steering by;
};

struct Noise {
  float temperature;  // 0: none, the greatest steered logit wins
  uint64_t seed;
  uint64_t position;
};

// Per block, from the scan of both rows. Arrays have room up to a multiple of 16 blocks.
struct Blocks {
  float* top;      // max adapted
  float* mass;     // sum of exp(adapted - top); NaN where the block spoils the row
  float* opinion;  // the part of mass with a base logit above -inf
  float* gap;      // sum of exp(adapted - top) * d
  int32_t* pending;  // 1 until the block is known to lie wholly off the support; then a list
};

// Per pending block, from the second look at it.
struct Choices {
  float* top;    // max steered
  float* mass;   // sum of exp(steered - top)
  float* merit;  // of the block's best token
  float* logit;  // its steered logit
  int64_t* token;
};

struct Kernels {
  // Reads blocks [first, last). With `out`, blocks wholly off the support are filled with -inf.
  void (*scan)(const Row&, int64_t first, int64_t last, const Blocks&);
  RowStats (*merge)(const Blocks&, int64_t blocks, float log_alpha);
  // Both work on pending[first, last).
  void (*write)(const Row&, const RowStats&, int64_t first, int64_t last, const Blocks&);
  void (*choose)(const Row&, const RowStats&, const Noise&, int64_t first, int64_t last,
                 const Blocks&, const Choices&);
  float (*log_mass)(const Choices&, int64_t count);
  void (*fill)(const Logits&, int64_t begin, int64_t end, float value, bool stream);
};

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SVD_X86_VARIANTS 1
namespace avx512 { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
#endif
namespace portable { extern const Kernels kernels; }
