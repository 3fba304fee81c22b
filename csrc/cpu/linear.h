// The interface between linear.cpp and the instruction-set variants of linear_tile.h. The order in
// which an output is summed depends only on its weights, on the variant, and on whether the rows are
// few (`outputs`) or many (`panels`): it has the same bits for any number of outputs and threads,
// and for any number of few rows, or of many.
#pragma once

#include "codes.h"
#include "kernels.h"

// Rows of x as a variant reads them beside weights of one dtype, padded with zeros to a multiple of
// 64 elements.
struct Packed {
  const char* data;
  int64_t row_bytes;
  bool bfloat16;  // where the variant multiplies bfloat16 by bfloat16; otherwise float32

  Packed from(int64_t row) const { return {data + row * row_bytes, row_bytes, bfloat16}; }
};

// So many rows and fewer have the same bits as each alone, and are hardly slower by `outputs`.
constexpr int64_t kFewRows = 16;
constexpr int64_t kPanel = 24;  // outputs that `panels` computes at once

constexpr int64_t packed_row_bytes(int64_t in) { return (in + 63) / 64 * 64 * 4; }

struct Weight {  // [out, in]
  const char* data;
  int64_t row_bytes;
  int64_t out, in;
  Dtype dtype;
  Format format = Format::kPlain;  // codes are multiplied by rows packed as float32
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
  const float* down_x;
  int64_t down_x_stride;
  Weight up;
  Bias up_bias;
  int64_t rows, first_adapted;
  char* out;
  int64_t out_row_bytes;
  Dtype out_dtype;
};

struct LinearKernel {
  bool multiplies_bfloat16;
  // Packs a row of `in` elements to be multiplied by weights of dtype `weight`.
  void (*pack)(Dtype, int64_t in, const char* x, Dtype weight, char* to);
  // Computes the outputs [begin, end). Several weight rows far apart are read together, so let
  // end - begin be large where the weights come from memory.
  void (*outputs)(const Product&, int64_t begin, int64_t end);
  // The same for many rows, packed as float32 whatever the weights are; null where the variant has no
  // such form. It takes kPanel outputs at a time, so let ranges begin at multiples of that.
  void (*panels)(const Product&, int64_t begin, int64_t end);

  // Whether rows of dtype `x` beside such weights are packed as bfloat16.
  bool packs_bfloat16(Dtype x, Dtype weight) const {
    return multiplies_bfloat16 && x == Dtype::kBFloat16 && weight == Dtype::kBFloat16;
  }
};

const LinearKernel& linear_in_use();

#ifdef SVD_X86_VARIANTS
namespace avx512_bf16 { extern const LinearKernel linear; }
namespace avx512 { extern const LinearKernel linear; }
namespace avx2 { extern const LinearKernel linear; }
#endif
namespace portable { extern const LinearKernel linear; }
