// The interface between linear.cpp and the instruction-set variants of linear_tile.h. The order in
// which an output is summed depends only on its weights and the variant: it has the same bits for
// any number of rows and threads.
#pragma once

#include "kernels.h"

constexpr int kOutputs = 4;  // outputs in a block: so many rows of the weight are read together

// Contiguous rows, padded with zeros to a multiple of 32 elements: float32, or bfloat16 where the
// variant multiplies bfloat16.
struct Packed {
  const char* data;
  int64_t row_bytes;
  Dtype dtype;

  Packed from(int64_t row) const { return {data + row * row_bytes, row_bytes, dtype}; }
};

struct Weight {  // [out, in]
  const char* data;
  int64_t row_bytes;
  int64_t out, in;
  Dtype dtype;
};

struct Bias {  // [out]
  const char* data;  // null if there is none
  int64_t stride_bytes;
  Dtype dtype;
};

// out = x weight^T + bias, with down_x up^T + up_bias added in the rows from `first_adapted` on.
// Row 0 of `down_x`, which is x down^T, belongs to row `first_adapted` of x.
struct Product {
  Packed x;
  Weight weight;
  Bias bias;
  Packed down_x;
  Weight up;
  Bias up_bias;
  int64_t rows, first_adapted;
  char* out;
  int64_t out_row_bytes;
  Dtype out_dtype;
};

struct LinearKernel {
  bool multiplies_bfloat16;  // takes bfloat16 `x` with a bfloat16 weight; `down_x` is float32
  // Computes the blocks [begin, end) of kOutputs outputs.
  void (*blocks)(const Product&, int64_t begin, int64_t end);
};

const LinearKernel& linear_in_use();

#ifdef SVD_X86_VARIANTS
namespace avx512_bf16 { extern const LinearKernel linear; }
namespace avx512 { extern const LinearKernel linear; }
namespace avx2 { extern const LinearKernel linear; }
#endif
namespace portable { extern const LinearKernel linear; }
