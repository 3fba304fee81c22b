// The interface between step.cpp and the instruction-set variants of step_rows.h: the arithmetic of
// a decode step between its linear layers. The order of a sum over elements or slots depends only
// on its length and the variant.
#pragma once

#include "kernels.h"

struct Norm {
  const char* weight;  // [n]
  int64_t n;
  float eps;
  float offset;          // added to the weight
  bool rounded_between;  // x / rms is rounded to the dtype before it is multiplied by the weight
  Dtype dtype;
};

struct Softmax {
  float scale;
  float softcap;     // 0 if there is none
  const char* mask;  // [slots], added after the softcap; null if there is none
  Dtype mask_dtype;
};

struct Values {  // [slots, dim]
  const char* data;
  int64_t row_bytes;
  int64_t slots, dim;
  Dtype dtype;
};

struct Weights {  // [queries, slots], of the queries that share the values; not normalised
  const float* data;
  int64_t stride;
  const float* sum;  // [queries], over slots
  int64_t queries;
};

enum class Activation : int { kSilu, kGeluTanh };

struct StepKernel {
  void (*rms_norm)(const Norm&, const char* x, char* out);
  // out = x cos + [-x2, x1] sin for one row x = [x1, x2] of `dim` elements, an even number.
  void (*rotate)(Dtype, int64_t dim, const char* x, const char* cos, const char* sin, char* out);
  // Replaces `scores` by exp(score - max score), of scaled, softcapped and masked scores, and
  // returns their sum. There is room for a multiple of 16 scores.
  float (*exponentials)(const Softmax&, float* scores, int64_t slots);
  // out = the weighted mean of the values for each query, [queries, dim] in the dtype of the
  // values.
  void (*mix)(const Values&, const Weights&, char* out);
  // On n elements, each result rounded to the dtype: x += scale * y, where the product is rounded
  // too; x *= factor; x = activation(x) * up, where the activation is rounded too.
  void (*add)(Dtype, int64_t n, char* x, float scale, const char* y);
  void (*multiply)(Dtype, int64_t n, char* x, Dtype factor_dtype, const char* factor);
  void (*activate)(Dtype, int64_t n, char* x, Activation, const char* up);
};

const StepKernel& step_in_use();

#ifdef SVD_X86_VARIANTS
namespace avx512 { extern const StepKernel step; }
namespace avx2 { extern const StepKernel step; }
#endif
namespace portable { extern const StepKernel step; }
