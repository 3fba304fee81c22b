// A few rows of x times a few rows of a quantised weight, in vectors of 8 on any machine. Part of
// linear_tile.h.

// Returns 8 neighbouring elements of a block, number f of its eights, without their scale.
template <Format F>
SVD_HD Floats8 eight(const char* block, Words8 words, int f) {
  if constexpr (F == Format::kInt8) {
#if SVD_LANES >= 8  // GCC 12 widens bytes one by one
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(block + 8 * f));
    return __builtin_convertvector((Words8)_mm256_cvtepi8_epi32(bytes), Floats8);
#else
    typedef int8_t Bytes8 __attribute__((vector_size(8)));
    return __builtin_convertvector(load<Bytes8>(block + 8 * f), Floats8);
#endif
  } else {
    typedef uint32_t Bits8 __attribute__((vector_size(32)));
    const Words8 high = (Words8)((Bits8)words << (28 - 4 * f));
    return __builtin_convertvector(high >> 28, Floats8);
  }
}

// sum[i][o] += x[i] . block[o], without its scales.
template <Format F, int R>
SVD_HD void add_codes(Floats8 (&sum)[R][kStreams], const char* x, int64_t row_bytes,
                      const char* const (&block)[kStreams]) {
  Words8 words[kStreams] = {};
#pragma GCC unroll 4
  for (int o = 0; o < kStreams; ++o)
    if constexpr (F == Format::kInt4) words[o] = load<Words8>(block[o] + Codes<F>::kCodes);
#pragma GCC unroll 8
  for (int f = 0; f < Codes<F>::kBlock / 8; ++f) {
    Floats8 row[R];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) row[i] = load<Floats8>(x + i * row_bytes + f * 32);
#pragma GCC unroll 4
    for (int o = 0; o < kStreams; ++o) {
      const Floats8 factor = eight<F>(block[o], words[o], f);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) sum[i][o] += row[i] * factor;
    }
  }
}

SVD_HD Vec as_vec(Floats8 v) {
#if SVD_LANES == 16
  return (Vec)_mm512_zextps256_ps512((__m256)v);
#elif SVD_LANES == 8
  return (Vec)v;
#else
  Vec half[2];
  store(half, v);
  return half[0] + half[1];
#endif
}

// sum[i][o] = x[i] . row o of the weight.
template <Format F, int R, bool kPrefetches>
SVD_HD void multiply_codes(Vec (&result)[R][kStreams], const Packed& x,
                           const char* const (&w)[kStreams], int64_t in) {
  typedef Codes<F> C;
  Floats8 sum[R][kStreams] = {};
  const char* block[kStreams];
  for (int o = 0; o < kStreams; ++o) block[o] = w[o] + C::kHeader;
  const char* row = x.data;
  for (int64_t k = 0; k < in; k += C::kBlock, row += C::kBlock * 4) {
    if constexpr (F == Format::kInt8) {
      add_codes<F>(sum, row, x.row_bytes, block);
    } else {
      Floats8 part[R][kStreams] = {};
      add_codes<F>(part, row, x.row_bytes, block);
#pragma GCC unroll 4
      for (int o = 0; o < kStreams; ++o) {
        const Floats8 scales = int4_scales(block[o]);
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) sum[i][o] += part[i][o] * scales;
      }
    }
#pragma GCC unroll 4
    for (int o = 0; o < kStreams; ++o) {
      if constexpr (kPrefetches) __builtin_prefetch(block[o] + kAhead);
      block[o] += C::kBytes;
    }
  }
#pragma GCC unroll 4
  for (int o = 0; o < kStreams; ++o) {
    float scale = 1;
    if constexpr (F == Format::kInt8) std::memcpy(&scale, w[o], 4);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) result[i][o] = as_vec(sum[i][o] * scale);
  }
}

template <Format F>
struct CodesLine {
  static constexpr Format kFormat = F;
  static constexpr int kRows = 2;
};
