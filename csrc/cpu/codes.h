// The formats of quantised weights, as svd_engine/model/layers/quantised.py writes them. A row of a
// weight is a sequence of bytes:
// int8: a float scale, then a byte per element.
// int4: blocks of 64 elements, each two bfloat16 scales and then 8 words. Bits 4 f .. 4 f + 3 of
// word l are element 8 f + l, so that the same bits of all words are neighbours, as x has them. The
// first scale is that of words 0 to 3, the second of words 4 to 7.
// An element is its code, in two's complement, times its scale. Rows are padded with zeros to 32
// elements of int8 and to 64 of int4.
#pragma once

#include <cstdint>
#include <cstring>

#include "../row.h"

enum class Format : int { kPlain, kInt8, kInt4 };  // kPlain: elements of a dtype

typedef float Floats8 __attribute__((vector_size(32), aligned(1), may_alias));
typedef int32_t Words8 __attribute__((vector_size(32), aligned(1), may_alias));

template <Format F>
struct Codes;

template <>
struct Codes<Format::kInt8> {
  static constexpr int kHeader = 4, kBlock = 32, kBytes = 32;  // bytes before and in a block
  static constexpr int kCodes = 0;                             // where the codes of a block begin
};

template <>
struct Codes<Format::kInt4> {
  static constexpr int kHeader = 0, kBlock = 64, kBytes = 36;
  static constexpr int kCodes = 4;
};

// The scales of a block's words.
SVD_HD Floats8 int4_scales(const char* block) {
  uint32_t both;
  std::memcpy(&both, block, 4);
  const int32_t low = int32_t(both << 16), high = int32_t(both & 0xFFFF0000u);
  const Words8 bits = {low, low, low, low, high, high, high, high};
  return (Floats8)bits;
}
