// A few rows of x times a few rows of a weight, written once with vector extensions and compiled
// once per instruction set, like rows.h.
#include "elements.h"
#include "linear.h"

namespace SVD_VARIANT {
namespace {

// The most rows of x that one reading of the weights serves: their sums fill the registers.
constexpr int kRows = kLanes == 16 ? 6 : 2;

// How the elements of a weight are read and multiplied, `kStep` at a time. `row` reads x.
struct Float32Products : Float32 {
  typedef Vec Elements;
  static constexpr int kStep = kLanes, kRowSize = 4;
  SVD_HD Vec add(Vec sum, Elements x, Elements w) { return sum + x * w; }
  SVD_HD Elements row(const char* from) { return load<Vec>(from); }
};

struct BFloat16Products : BFloat16 {
  typedef Vec Elements;
  static constexpr int kStep = kLanes, kRowSize = 4;
  SVD_HD Vec add(Vec sum, Elements x, Elements w) { return sum + x * w; }
  SVD_HD Elements row(const char* from) { return load<Vec>(from); }
};

#ifdef SVD_BFLOAT16_PAIRS
struct BFloat16Pairs {
  typedef __m512i Elements;
  static constexpr int kStep = 32, kSize = 2, kRowSize = 2;
  SVD_HD Elements whole(const char* from) { return load<__m512i>(from); }
  SVD_HD Elements part(const char* from, int64_t count) {
    return _mm512_maskz_loadu_epi16((1u << count) - 1, from);
  }
  SVD_HD Vec add(Vec sum, Elements x, Elements w) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
  }
  SVD_HD Elements row(const char* from) { return load<__m512i>(from); }
};
#else
typedef BFloat16Products BFloat16Pairs;
#endif

// sum[i][o] += x[i] . w[o] for R rows of x. Prefetches the weights `ahead` bytes further on.
template <class W, int R>
SVD_HD void add_products(Vec (&sum)[R][kOutputs], const Packed& x, const char* const* w, int64_t in,
                         int64_t ahead) {
  const auto step = [&](int64_t k, auto read) SVD_INLINE {
    typename W::Elements row[R];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) row[i] = W::row(x.data + i * x.row_bytes + k * W::kRowSize);
#pragma GCC unroll 8
    for (int o = 0; o < kOutputs; ++o) {
      const char* at = w[o] + k * W::kSize;
      __builtin_prefetch(at + ahead);
      const typename W::Elements elements = read(at);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) sum[i][o] = W::add(sum[i][o], row[i], elements);
    }
  };
  int64_t k = 0;
  for (; k + W::kStep <= in; k += W::kStep)
    step(k, [](const char* at) SVD_INLINE { return W::whole(at); });
  if (k < in) step(k, [&](const char* at) SVD_INLINE { return W::part(at, in - k); });
}

// Pointers to rows [output, output + kOutputs) of a weight; past the last row, to the last one.
struct Block {
  const char* w[kOutputs];

  Block(const Weight& weight, int64_t output) {
    for (int o = 0; o < kOutputs; ++o) {
      const int64_t row = output + o < weight.out ? output + o : weight.out - 1;
      w[o] = weight.data + row * weight.row_bytes;
    }
  }
};

typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourInts __attribute__((vector_size(16)));
typedef uint32_t FourBits __attribute__((vector_size(16)));
typedef uint16_t FourHalves __attribute__((vector_size(8)));

static_assert(kOutputs == 4, "a Four holds the outputs of a block");

SVD_HD Four four_of(Vec v) {
#if SVD_LANES == 16
  const __m256 eight = _mm512_castps512_ps256((__m512)v) + _mm512_extractf32x8_ps((__m512)v, 1);
  return _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
#elif SVD_LANES == 8
  return _mm256_castps256_ps128((__m256)v) + _mm256_extractf128_ps((__m256)v, 1);
#else
  return v;
#endif
}

// Sums the lanes of four vectors at once, each in the order of sum_of.
SVD_HD Four sums_of(const Vec (&v)[kOutputs]) {
  const Four a = four_of(v[0]), b = four_of(v[1]), c = four_of(v[2]), d = four_of(v[3]);
  const FourInts even = {0, 4, 1, 5}, odd = {2, 6, 3, 7}, low = {0, 1, 4, 5}, high = {2, 3, 6, 7};
  const Four ab = __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
  const Four cd = __builtin_shuffle(c, d, even) + __builtin_shuffle(c, d, odd);
  return __builtin_shuffle(ab, cd, low) + __builtin_shuffle(ab, cd, high);
}

// Loads the bias of `count` outputs from `output` on; 0 where there is none.
SVD_HD Four values(const Bias& bias, int64_t output, int count) {
  float value[kOutputs] = {};
  if (bias.data)
    for (int o = 0; o < count; ++o) {
      const char* at = bias.data + (output + o) * bias.stride_bytes;
      if (bias.dtype == Dtype::kFloat32)
        std::memcpy(value + o, at, 4);
      else
        std::memcpy(reinterpret_cast<char*>(value + o) + 2, at, 2);
    }
  return load<Four>(value);
}

SVD_HD FourHalves narrow(Four v) {
  const FourBits bits = (FourBits)v, rounded = bits + 0x7FFF + (bits >> 16 & 1);
  return __builtin_convertvector((v == v ? rounded : FourBits{} + 0x7FC00000) >> 16, FourHalves);
}

template <class V>
SVD_HD void put(char* to, V v, int count) {
  if (count == kOutputs) return store(to, v);
  for (int o = 0; o < count; ++o) std::memcpy(to + o * sizeof v[0], &v[o], sizeof v[0]);
}

// Adds the low-rank term and the biases to the sums of rows [row, end), and writes the outputs.
__attribute__((noinline)) void finish(Vec (*sum)[kOutputs], const Product& p, int64_t row,
                                      int64_t end, int64_t output) {
  const int64_t left = p.weight.out - output;
  const int count = left < kOutputs ? left : kOutputs;
  const Four bias = values(p.bias, output, count);
  for (; row < end; ++row, ++sum) {
    Four result;
    if (row < p.first_adapted) {
      result = sums_of(*sum) + bias;
    } else {
      const Block up(p.up, output);
      const Packed down_x = p.down_x.from(row - p.first_adapted);
      auto& one = reinterpret_cast<Vec(&)[1][kOutputs]>(*sum);
      if (p.up.dtype == Dtype::kFloat32)
        add_products<Float32Products>(one, down_x, up.w, p.up.in, 0);
      else
        add_products<BFloat16Products>(one, down_x, up.w, p.up.in, 0);
      result = sums_of(*sum) + bias + values(p.up_bias, output, count);
    }
    char* to = p.out + row * p.out_row_bytes;
    if (p.out_dtype == Dtype::kFloat32)
      put(to + output * 4, result, count);
    else
      put(to + output * 2, narrow(result), count);
  }
}

template <class W, int R>
void tile(const Product& p, int64_t row, int64_t output, int64_t ahead) {
  Vec sum[R][kOutputs] = {};
  add_products<W>(sum, p.x.from(row), Block(p.weight, output).w, p.weight.in, ahead);
  Vec sums[R][kOutputs];  // a copy in memory for `finish`, so that `sum` stays in registers
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int o = 0; o < kOutputs; ++o) sums[i][o] = sum[i][o];
  finish(sums, p, row, row + R, output);
}

template <class W, int R = kRows>
SVD_HD void tile_of(int64_t rows, const Product& p, int64_t row, int64_t output, int64_t ahead) {
  if constexpr (R > 1)
    if (rows < R) return tile_of<W, R - 1>(rows, p, row, output, ahead);
  tile<W, R>(p, row, output, ahead);
}

template <class W>
void blocks_of(const Product& p, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    int64_t ahead = kOutputs * p.weight.row_bytes;
    for (int64_t row = 0; row < p.rows; row += kRows, ahead = 0)
      tile_of<W>(p.rows - row, p, row, block * kOutputs, ahead);
  }
}

void blocks(const Product& p, int64_t begin, int64_t end) {
  if (p.weight.dtype == Dtype::kFloat32)
    blocks_of<Float32Products>(p, begin, end);
  else if (p.x.dtype == Dtype::kFloat32)
    blocks_of<BFloat16Products>(p, begin, end);
  else
    blocks_of<BFloat16Pairs>(p, begin, end);
}

}  // namespace

const LinearKernel linear = {BFloat16Pairs::kRowSize == 2, blocks};

}  // namespace SVD_VARIANT
