// A few rows of x times a few rows of a weight, written once with vector extensions and compiled
// once per instruction set, like rows.h.
#include "elements.h"
#include "linear.h"

namespace SVD_VARIANT {
namespace {

constexpr int kStreams = 4;  // rows of the weight that are read together
constexpr int kLine = 64;      // bytes of a weight row that are multiplied at once
constexpr int kAhead = 1024;  // bytes by which a stream is prefetched
constexpr int64_t kNear = 24 << 10;  // bytes of weights that further rows of x meet in the L1

// How a line of a weight is multiplied: in parts of one vector, each by `kFactors` vectors of x.
// One reading of the line serves at most kRows rows of x, whose sums fill the registers.
struct Float32Line {
  static constexpr Format kFormat = Format::kPlain;
  typedef Vec Part;
  static constexpr int kRows = kLanes == 16 ? 6 : 2;
  static constexpr int kSize = 4, kFactors = 1, kRowSize = 4;
  SVD_HD void factors(Part w, Vec (&factor)[1]) { factor[0] = w; }
  SVD_HD Vec add(Vec sum, Vec x, Vec w) { return sum + x * w; }
};

// A vector of bfloat16 pairs is two vectors of floats, the even and the odd elements, without a
// shuffle; x is packed to match.
struct BFloat16Line {
  static constexpr Format kFormat = Format::kPlain;
  typedef Bits Part;
  static constexpr int kRows = kLanes == 16 ? 6 : 2;
  static constexpr int kSize = 2, kFactors = 2, kRowSize = 4;
  SVD_HD void factors(Part w, Vec (&factor)[2]) {
    factor[0] = (Vec)(w << 16);
    factor[1] = (Vec)(w & 0xFFFF0000);
  }
  SVD_HD Vec add(Vec sum, Vec x, Vec w) { return sum + x * w; }
};

#ifdef SVD_BFLOAT16_PAIRS
struct BFloat16PairsLine {
  static constexpr Format kFormat = Format::kPlain;
  typedef Vec Part;
  static constexpr int kRows = 6;
  static constexpr int kSize = 2, kFactors = 1, kRowSize = 2;
  SVD_HD void factors(Part w, Vec (&factor)[1]) { factor[0] = w; }
  SVD_HD Vec add(Vec sum, Vec x, Vec w) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
  }
};
#endif

void pack(Dtype dtype, int64_t in, const char* x, Dtype weight, char* to) {
#ifdef SVD_BFLOAT16_PAIRS
  if (dtype == Dtype::kBFloat16 && weight == Dtype::kBFloat16) {
    std::memcpy(to, x, in * 2);
    std::memset(to + in * 2, 0, (in + 63) / 64 * 128 - in * 2);
    return;
  }
#endif
  constexpr int kPair = 2 * kLanes;
  const int64_t padded = (in + 63) / 64 * 64;
  for (int64_t k = 0; k < padded; k += kPair) {
    float wide[kPair];
    for (int half = 0; half < kPair; half += kLanes) {
      Vec v = {};
      if (const int64_t at = k + half; at < in)
        v = dtype == Dtype::kFloat32 ? get<Float32>(x, at, in) : get<BFloat16>(x, at, in);
      store(wide + half, v);
    }
    float* out = reinterpret_cast<float*>(to) + k;
    if (weight == Dtype::kFloat32)
      std::memcpy(out, wide, sizeof wide);
    else
      for (int i = 0; i < kLanes; ++i) out[i] = wide[2 * i], out[kLanes + i] = wide[2 * i + 1];
  }
}

// Keeps the compiler from reading `v` from memory again at each use.
template <class V>
SVD_HD V in_register(V v) {
#if SVD_LANES == 16
  __asm__("" : "+v"(v));
#elif SVD_LANES == 8
  __asm__("" : "+x"(v));
#endif
  return v;
}

// sum[i][o] += x[i] . line[o] for R rows of x, from which the lines are multiplied on.
template <class W, int R>
SVD_HD void add_line(Vec (&sum)[R][kStreams], const char* x, int64_t row_bytes,
                     const char* const (&line)[kStreams]) {
  constexpr int kParts = kLine / sizeof(Vec);
#pragma GCC unroll 4
  for (int part = 0; part < kParts; ++part) {
    Vec row[R][W::kFactors];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
      for (int f = 0; f < W::kFactors; ++f)
        row[i][f] = load<Vec>(x + i * row_bytes + (part * W::kFactors + f) * sizeof(Vec));
#pragma GCC unroll 4
    for (int o = 0; o < kStreams; ++o) {
      Vec factor[W::kFactors];
      W::factors(in_register(load<typename W::Part>(line[o] + part * sizeof(Vec))), factor);
#pragma GCC unroll 2
      for (int f = 0; f < W::kFactors; ++f)
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) sum[i][o] = W::add(sum[i][o], row[i][f], factor[f]);
    }
  }
}

template <class W, int R, bool kPrefetches>
SVD_HD void add_products(Vec (&sum)[R][kStreams], const Packed& x,
                         const char* const (&w)[kStreams], int64_t in) {
  constexpr int kStep = kLine / W::kSize;
  const char* row = x.data;
  int64_t k = 0, at = 0;
  for (; k + kStep <= in; k += kStep, at += kLine, row += kStep * W::kRowSize) {
    const char* line[kStreams];
#pragma GCC unroll 4
    for (int o = 0; o < kStreams; ++o) {
      line[o] = w[o] + at;
      if constexpr (kPrefetches) __builtin_prefetch(line[o] + kAhead);
    }
    add_line<W>(sum, row, x.row_bytes, line);
  }
  if (k == in) return;
  char rest[kStreams][kLine] = {};
  const char* line[kStreams];
  for (int o = 0; o < kStreams; ++o)
    line[o] = static_cast<char*>(std::memcpy(rest[o], w[o] + at, (in - k) * W::kSize));
  add_line<W>(sum, row, x.row_bytes, line);
}

#include "codes_tile.h"

// The outputs [begin, end) as streams of `length` each: output i of stream o is begin + o * length
// + i. The last streams may be shorter or empty.
struct Streams {
  int64_t begin, end, length;

  Streams(int64_t begin, int64_t end)
      : begin(begin), end(end), length((end - begin + kStreams - 1) / kStreams) {}
  int64_t output(int o, int64_t i) const { return begin + o * length + i; }
  bool has(int o, int64_t i) const { return output(o, i) < end; }
};

typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourInts __attribute__((vector_size(16)));
typedef uint32_t FourBits __attribute__((vector_size(16)));

static_assert(kStreams == 4, "a Four holds an output of each stream");

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
SVD_HD Four sums_of(const Vec (&v)[kStreams]) {
  const Four a = four_of(v[0]), b = four_of(v[1]), c = four_of(v[2]), d = four_of(v[3]);
  const FourInts even = {0, 4, 1, 5}, odd = {2, 6, 3, 7}, low = {0, 1, 4, 5}, high = {2, 3, 6, 7};
  const Four ab = __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
  const Four cd = __builtin_shuffle(c, d, even) + __builtin_shuffle(c, d, odd);
  return __builtin_shuffle(ab, cd, low) + __builtin_shuffle(ab, cd, high);
}

SVD_HD float value(const Bias& bias, int64_t output) {
  float v = 0;
  const char* at = bias.data + output * bias.stride_bytes;
  if (bias.dtype == Dtype::kFloat32)
    std::memcpy(&v, at, 4);
  else
    std::memcpy(reinterpret_cast<char*>(&v) + 2, at, 2);
  return v;
}

__attribute__((noinline)) void add_bias(Four& result, const Bias& bias, const Streams& streams,
                                        int64_t i) {
  for (int o = 0; o < kStreams; ++o)
    if (streams.has(o, i)) result[o] += value(bias, streams.output(o, i));
}

template <class E>
SVD_HD void add_low_rank(Vec (&sum)[kStreams], const float* down_x,
                         const char* const (&up)[kStreams], int64_t rank) {
  for (int64_t k = 0; k < rank; k += kLanes) {
    const Vec x = load<Vec>(down_x + k);
#pragma GCC unroll 4
    for (int o = 0; o < kStreams; ++o) {
      __builtin_prefetch(up[o] + k * E::kSize + kAhead / 4);
      sum[o] += x * get<E>(up[o], k, rank);
    }
  }
}

// Rows of `weight` that the streams read; an ended stream reads the last row.
SVD_HD void rows_of(const Weight& weight, const Streams& streams, int64_t i,
                    const char* (&w)[kStreams]) {
  for (int o = 0; o < kStreams; ++o) {
    const int64_t output = streams.output(o, i);
    w[o] = weight.data + (output < streams.end ? output : streams.end - 1) * weight.row_bytes;
  }
}

SVD_HD void write(const Product& p, int64_t row, Four result, const Streams& streams, int64_t i) {
  char* to = p.out + row * p.out_row_bytes;
  const bool whole = streams.has(kStreams - 1, i);
  if (p.out_dtype == Dtype::kFloat32) {
#pragma GCC unroll 4
    for (int o = 0; o < kStreams; ++o)
      if (whole || streams.has(o, i)) std::memcpy(to + streams.output(o, i) * 4, &result[o], 4);
    return;
  }
  const FourBits bits = (FourBits)result, rounded = bits + 0x7FFF + (bits >> 16 & 1);
  const FourBits half = (result == result ? rounded : FourBits{} + 0x7FC00000) >> 16;
#pragma GCC unroll 4
  for (int o = 0; o < kStreams; ++o)
    if (whole || streams.has(o, i)) std::memcpy(to + streams.output(o, i) * 2, &half[o], 2);
}

// Computes output i of each stream for R rows of x.
template <class W, int R, bool kPrefetches>
void tile(const Product& p, int64_t row, const Streams& streams, int64_t i) {
  const char* w[kStreams];
  rows_of(p.weight, streams, i, w);
  Vec sum[R][kStreams] = {};
  if constexpr (W::kFormat == Format::kPlain)
    add_products<W, R, kPrefetches>(sum, p.x.from(row), w, p.weight.in);
  else
    multiply_codes<W::kFormat, R, kPrefetches>(sum, p.x.from(row), w, p.weight.in);
  const char* up[kStreams];
  if (row + R > p.first_adapted) rows_of(p.up, streams, i, up);
#pragma GCC unroll 8
  for (int j = 0; j < R; ++j) {
    const bool adapted = row + j >= p.first_adapted;
    if (adapted) {
      const float* down_x = p.down_x + (row + j - p.first_adapted) * p.down_x_stride;
      if (p.up.dtype == Dtype::kFloat32)
        add_low_rank<Float32>(sum[j], down_x, up, p.up.in);
      else
        add_low_rank<BFloat16>(sum[j], down_x, up, p.up.in);
    }
    Four result = sums_of(sum[j]);
    if (p.bias.data) add_bias(result, p.bias, streams, i);
    if (adapted && p.up_bias.data) add_bias(result, p.up_bias, streams, i);
    write(p, row + j, result, streams, i);
  }
}

template <class W, int R = W::kRows>
SVD_HD void tile_of(int64_t rows, const Product& p, int64_t row, const Streams& streams,
                    int64_t i) {
  if constexpr (R > 1)
    if (rows < R) return tile_of<W, R - 1>(rows, p, row, streams, i);
  if (row == 0)
    tile<W, R, true>(p, row, streams, i);
  else
    tile<W, R, false>(p, row, streams, i);
}

template <class W>
void outputs_of(const Product& p, const Streams& streams) {
  const int64_t bytes = kStreams * p.weight.row_bytes;
  const int64_t near = p.rows <= W::kRows || bytes >= kNear ? 1 : kNear / (bytes + 1);
  for (int64_t begin = 0; begin < streams.length; begin += near)
    for (int64_t row = 0; row < p.rows; row += W::kRows)
      for (int64_t i = begin; i < begin + near && i < streams.length; ++i)
        tile_of<W>(p.rows - row, p, row, streams, i);
}

void outputs(const Product& p, int64_t begin, int64_t end) {
  const Streams streams(begin, end);
  if (p.weight.format == Format::kInt8) return outputs_of<CodesLine<Format::kInt8>>(p, streams);
  if (p.weight.format == Format::kInt4) return outputs_of<CodesLine<Format::kInt4>>(p, streams);
  if (p.weight.dtype == Dtype::kFloat32) return outputs_of<Float32Line>(p, streams);
#ifdef SVD_BFLOAT16_PAIRS
  if (p.x.bfloat16) return outputs_of<BFloat16PairsLine>(p, streams);
#endif
  outputs_of<BFloat16Line>(p, streams);
}

#ifdef SVD_BFLOAT16_PAIRS
constexpr bool kMultipliesBFloat16 = true;
#else
constexpr bool kMultipliesBFloat16 = false;
#endif

#if SVD_LANES == 8
#include "panels.h"
static_assert(kPanel == kVectors * kLanes, "a panel is as wide as a tile's sums");
#else
constexpr void (*panels)(const Product&, int64_t, int64_t) = nullptr;
#endif

}  // namespace

const LinearKernel linear = {kMultipliesBFloat16, pack, outputs, panels};

}  // namespace SVD_VARIANT
