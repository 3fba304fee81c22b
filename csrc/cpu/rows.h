// The row kernels, written once with vector extensions and compiled once per instruction set: the
// including source sets SVD_LANES and SVD_VARIANT. No standard template may be instantiated here
// (see row.h on linkage).
#include <cstring>

#include "kernels.h"

#define SVD_INLINE __attribute__((always_inline))

namespace SVD_VARIANT {
namespace {

constexpr int kLanes = SVD_LANES;
static_assert(kBlock % (4 * kLanes) == 0, "scan_block goes by four vectors");

typedef float Vec __attribute__((vector_size(4 * SVD_LANES)));
typedef int32_t Int __attribute__((vector_size(4 * SVD_LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * SVD_LANES)));
typedef uint16_t Half __attribute__((vector_size(2 * SVD_LANES)));
typedef uint64_t Words __attribute__((vector_size(4 * SVD_LANES)));  // kLanes / 2 of them

template <class V, class T>
SVD_HD V load(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class V, class T>
SVD_HD void store(T* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

SVD_HD Vec max(Vec a, Vec b) { return a > b ? a : b; }  // b where either is NaN

// One value of all lanes, in the same order every time.
template <class Join>
SVD_HD float fold(Vec v, const Join& join) {
  typedef float Four __attribute__((vector_size(16)));
  Four part[4];
  std::memcpy(part, &v, sizeof v);
  if constexpr (kLanes == 16) part[0] = join(part[0], part[2]), part[1] = join(part[1], part[3]);
  if constexpr (kLanes >= 8) part[0] = join(part[0], part[1]);
  return join(join(part[0][0], part[0][2]), join(part[0][1], part[0][3]));
}

SVD_HD float max_of(Vec v) {
  return fold(v, [](auto a, auto b) SVD_INLINE { return a > b ? a : b; });
}

SVD_HD float sum_of(Vec v) {
  return fold(v, [](auto a, auto b) SVD_INLINE { return a + b; });
}

SVD_HD bool any(Int mask) {
  int32_t lane[kLanes], seen = 0;
  store(lane, mask);
  for (int i = 0; i < kLanes; ++i) seen |= lane[i];
  return seen != 0;
}

// e^x for x <= 0 to 1.4 ulp, 5 below e^-20; 0 where it would be subnormal; NaN for NaN.
SVD_HD Vec exp(Vec x) {
  // Adding 1.5 * 2^23 rounds to an integer in the low bits; the 127 is the bias of the exponent, so
  // that a shift makes 2^n of them.
  const Vec shifted = x * 1.44269504f + (12582912.0f + 127.0f);
  const Vec n = shifted - (12582912.0f + 127.0f);
  // Without a fused multiply-add the product must be exact, so log 2 comes in two parts.
  const Vec r = kLanes == 4 ? (x - n * 0.693359375f) - n * -2.12194440e-4f : x - n * 0.69314718f;
  Vec y = Vec{} + 1.38149318e-3f;
  y = y * r + 8.36870819e-3f;
  y = y * r + 4.16683853e-2f;
  y = y * r + 1.66665211e-1f;
  y = y * r + 0.49999994f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  return x < -87.3f ? Vec{} : y * (Vec)((Int)shifted << 23);
}

SVD_HD Bits widen(Half h) {
#if SVD_LANES == 16
  return (Bits)_mm512_cvtepu16_epi32((__m256i)h);  // GCC 12 makes two halves of a conversion
#else
  return __builtin_convertvector(h, Bits);
#endif
}

SVD_HD Vec widen_bfloat16(Half h) { return (Vec)(widen(h) << 16); }

SVD_HD Vec widen_float16(Half h) {
  const Bits bits = widen(h), magnitude = (bits & 0x7FFF) << 13;
  // Half's bias is 112 less. The product also normalises subnormals; inf and NaN regain theirs.
  const Bits scaled = (Bits)((Vec)magnitude * 0x1p112f);
  const Bits special = (Bits)(magnitude >= 0x0F800000) & 0x7F800000;
  return (Vec)(scaled | special | (bits & 0x8000) << 16);
}

SVD_HD Half narrow_bfloat16(Vec v) {
  const Bits bits = (Bits)v, rounded = bits + 0x7FFF + (bits >> 16 & 1);
  return __builtin_convertvector((v == v ? rounded : Bits{} + 0x7FC00000) >> 16, Half);
}

SVD_HD Half narrow_float16(Vec v) {
  const Bits sign = (Bits)v >> 16 & 0x8000, bits = (Bits)v & 0x7FFFFFFF;
  const Bits normal = (bits - 0x38000000 + 0xFFF + (bits >> 13 & 1)) >> 13;
  const Bits subnormal = (Bits)((Vec)bits + 0.5f) - 0x3F000000;  // the sum rounds at 2^-24
  const Bits special = bits > 0x7F800000 ? Bits{} + 0x7E00 : Bits{} + 0x7C00;
  const Bits finite = bits < 0x38800000 ? subnormal : normal;
  return __builtin_convertvector((bits < 0x47800000 ? finite : special) | sign, Half);
}

int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// Block `block` of a row as floats: the row itself, or `buffer` when it is narrower than float32
// or ends inside the block, where `pad` follows.
SVD_HD const float* widen(const Logits& row, int64_t vocab, int64_t block, float pad,
                          float* buffer) {
  const int64_t begin = block * kBlock, left = vocab - begin;
  const char* from = row.data + begin * size_of(row.dtype);
  uint16_t tail[kBlock];
  if (row.dtype == Dtype::kFloat32) {
    if (left >= kBlock) return reinterpret_cast<const float*>(from);
    for (int i = 0; i < kBlock; ++i) buffer[i] = pad;
    std::memcpy(buffer, from, left * 4);
    return buffer;
  }
  if (left < kBlock) {
    std::memset(tail, 0, sizeof tail);
    std::memcpy(tail, from, left * 2);
    from = reinterpret_cast<const char*>(tail);
  }
  if (row.dtype == Dtype::kBFloat16)
    for (int i = 0; i < kBlock; i += kLanes)
      store(buffer + i, widen_bfloat16(load<Half>(from + 2 * i)));
  else
    for (int i = 0; i < kBlock; i += kLanes)
      store(buffer + i, widen_float16(load<Half>(from + 2 * i)));
  for (int64_t i = left; i < kBlock; ++i) buffer[i] = pad;
  return buffer;
}

SVD_HD void narrow(const Logits& row, int64_t vocab, int64_t block, const float* from) {
  const int64_t begin = block * kBlock, left = vocab - begin < kBlock ? vocab - begin : kBlock;
  char* to = row.data + begin * size_of(row.dtype);
  if (row.dtype == Dtype::kFloat32) {
    std::memcpy(to, from, left * 4);
    return;
  }
  uint16_t half[kBlock];
  if (row.dtype == Dtype::kBFloat16)
    for (int i = 0; i < kBlock; i += kLanes) store(half + i, narrow_bfloat16(load<Vec>(from + i)));
  else
    for (int i = 0; i < kBlock; i += kLanes) store(half + i, narrow_float16(load<Vec>(from + i)));
  std::memcpy(to, half, left * 2);
}

void fill(const Logits& row, int64_t begin, int64_t end, float value, bool stream) {
  char *to = row.data + begin * size_of(row.dtype), *stop = row.data + end * size_of(row.dtype);
  const Vec wide = Vec{} + value;
  Bits pattern = (Bits)wide;
  if (row.dtype == Dtype::kBFloat16) pattern = widen(narrow_bfloat16(wide)) * 0x10001;
  if (row.dtype == Dtype::kFloat16) pattern = widen(narrow_float16(wide)) * 0x10001;
#if SVD_LANES == 16
  if (stream && reinterpret_cast<uintptr_t>(to) % sizeof pattern == 0)
    for (; stop - to >= int64_t{sizeof pattern}; to += sizeof pattern)
      _mm512_stream_si512((__m512i*)to, (__m512i)pattern);
#endif
  for (; stop - to >= int64_t{sizeof pattern}; to += sizeof pattern) store(to, pattern);
  std::memcpy(to, &pattern, stop - to);
}

// The sums of one block. Without kCareful, right only if `gap` comes out finite: -inf and whatever
// spoils a row do not survive e * (adapted - base).
template <bool kCareful>
SVD_HD void sum_block(const float* adapted, const float* base, float origin, float& mass,
                      float& opinion, float& gap) {
  Vec e_sum = {}, opinion_sum = {}, gap_sum = {};
  for (int i = 0; i < kBlock; i += kLanes) {
    const Vec z = load<Vec>(adapted + i), b = load<Vec>(base + i);
    Vec e = exp(z - origin);
    if constexpr (kCareful) {
      e = b < INFINITY ? e : Vec{} + NAN;
      opinion_sum += b > -INFINITY ? e : Vec{};
      gap_sum += e * difference(z, b);
    } else {
      gap_sum += e * (z - b);
    }
    e_sum += e;
  }
  mass = sum_of(e_sum);
  opinion = kCareful ? sum_of(opinion_sum) : mass;
  gap = sum_of(gap_sum);
}

SVD_HD float top_of_block(const float* logits) {
  Vec high[4];
  for (int j = 0; j < 4; ++j) high[j] = load<Vec>(logits + j * kLanes);
  for (int i = 4 * kLanes; i < kBlock; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) high[j] = max(high[j], load<Vec>(logits + i + j * kLanes));
  return max_of(max(max(high[0], high[1]), max(high[2], high[3])));
}

void scan(const Row& row, int64_t first, int64_t last, const Blocks& blocks) {
  alignas(64) float z_buffer[kBlock], b_buffer[kBlock];
  const bool removes = row.out.data && row.by.penalty == -INFINITY;
  float running = -INFINITY;
  for (int64_t k = first; k < last; ++k) {
    const float* z = widen(row.adapted, row.vocab, k, -INFINITY, z_buffer);
    const float* b = widen(row.base, row.vocab, k, 0.0f, b_buffer);
    const float top = top_of_block(z), origin = top > -INFINITY ? top : 0.0f;
    float &mass = blocks.mass[k], &opinion = blocks.opinion[k], &gap = blocks.gap[k];
    if (top > -INFINITY) sum_block<false>(z, b, origin, mass, opinion, gap);
    if (!(top > -INFINITY && gap - gap == 0.0f))
      sum_block<true>(z, b, origin, mass, opinion, gap);
    blocks.top[k] = top;
    running = running > top ? running : top;
    // The maximum only grows, so what is off the support now stays off, and its logits are not
    // needed again: `out` may be `adapted` or `base`.
    const bool off = removes && top < running + row.by.log_alpha;
    blocks.pending[k] = !off;
    if (off) {
      const int64_t end = (k + 1) * kBlock;
      fill(row.out, k * kBlock, end < row.vocab ? end : row.vocab, -INFINITY, row.stream);
    }
  }
#if SVD_LANES == 16
  if (row.stream) _mm_sfence();
#endif
}

RowStats merge(const Blocks& blocks, int64_t count, float log_alpha) {
  const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
  for (int64_t k = count; k < padded; ++k) {
    blocks.top[k] = -INFINITY;
    blocks.mass[k] = blocks.opinion[k] = blocks.gap[k] = 0.0f;
  }
  Vec high = Vec{} - INFINITY;
  for (int64_t k = 0; k < padded; k += kLanes) high = max(load<Vec>(blocks.top + k), high);
  const float top = max_of(high);
  Vec mass = {}, opinion = {}, gap = {};
  for (int64_t k = 0; k < padded; k += kLanes) {
    const Vec weight = exp(load<Vec>(blocks.top + k) - top);
    mass += weight * load<Vec>(blocks.mass + k);
    opinion += weight * load<Vec>(blocks.opinion + k);
    gap += weight * load<Vec>(blocks.gap + k);
  }
  return row_stats(top, sum_of(mass), sum_of(opinion), sum_of(gap), log_alpha);
}

// The steered logits of one block in `buffer`.
SVD_HD void steer_block(const Row& row, const RowStats& stats, int64_t block, float* buffer) {
  alignas(64) float z_buffer[kBlock], b_buffer[kBlock];
  const float* z = widen(row.adapted, row.vocab, block, -INFINITY, z_buffer);
  const float* b = widen(row.base, row.vocab, block, 0.0f, b_buffer);
  for (int i = 0; i < kBlock; i += kLanes) {
    const Vec adapted = load<Vec>(z + i);
    store(buffer + i, steered(adapted, load<Vec>(b + i), exp(adapted - stats.top), stats, row.by));
  }
}

void write(const Row& row, const RowStats& stats, int64_t first, int64_t last,
           const Blocks& blocks) {
  alignas(64) float buffer[kBlock];
  for (int64_t i = first; i < last; ++i) {
    steer_block(row, stats, blocks.pending[i], buffer);
    narrow(row.out, row.vocab, blocks.pending[i], buffer);
  }
}

// Raises `best` to the greatest of (logits - top) / temperature + noise, and says where.
SVD_HD int noisy_best(const float* logits, int64_t begin, float top, const Noise& noise,
                      float& best) {
  uint32_t bits[kBlock];
  Words token;
  for (int i = 0; i < kLanes / 2; ++i) token[i] = begin + i;
  for (int i = 0; i < kBlock; i += kLanes / 2, token += kLanes / 2) {
    const Words word = philox(noise.seed, token, noise.position);
    for (int j = 0; j < kLanes / 2; ++j) bits[i + j] = static_cast<uint32_t>(word[j]);
  }
  int at = -1;
  for (int i = 0; i < kBlock; i += kLanes) {
    const Vec scaled = (load<Vec>(logits + i) - top) / noise.temperature;
    // noise = -log(E) with E = -log(1 - u) >= u: only a token with u <= exp(scaled - best) can win,
    // and few need the two logarithms.
    const Vec u = (__builtin_convertvector(load<Bits>(bits + i), Vec) + 0.5f) * 0x1p-32f;
    const Vec ahead = scaled - best;
    const Vec chance = exp(ahead < 0.0f ? ahead : Vec{}) * 1.0001f;
    const Int hopeful = (u <= chance) & (scaled > -INFINITY);
    if (!any(hopeful)) continue;
    for (int j = 0; j < kLanes; ++j) {
      if (!hopeful[j]) continue;
      const float merit = scaled[j] + gumbel(bits[i + j]);
      if (merit > best) best = merit, at = i + j;
    }
  }
  return at;
}

void choose(const Row& row, const RowStats& stats, const Noise& noise, int64_t first, int64_t last,
            const Blocks& blocks, const Choices& choices) {
  alignas(64) float buffer[kBlock];
  float best = -INFINITY;
  for (int64_t i = first; i < last; ++i) {
    const int64_t begin = int64_t{blocks.pending[i]} * kBlock;
    steer_block(row, stats, blocks.pending[i], buffer);
    Vec high = Vec{} - INFINITY, mass = {};
    for (int j = 0; j < kBlock; j += kLanes) high = max(load<Vec>(buffer + j), high);
    const float top = max_of(high), origin = top > -INFINITY ? top : 0.0f;
    for (int j = 0; j < kBlock; j += kLanes) mass += exp(load<Vec>(buffer + j) - origin);
    choices.top[i] = top;
    choices.mass[i] = sum_of(mass);

    int at = -1;
    if (noise.temperature > 0) {
      at = noisy_best(buffer, begin, stats.top, noise, best);
    } else if (top > best) {
      best = top;
      for (at = 0; buffer[at] != top;) ++at;
    }
    choices.merit[i] = at < 0 ? -INFINITY : best;
    choices.logit[i] = at < 0 ? -INFINITY : buffer[at];
    choices.token[i] = begin + at;
  }
}

// log of the sum of exp(steered).
float log_mass(const Choices& choices, int64_t count) {
  const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
  for (int64_t k = count; k < padded; ++k) {
    choices.top[k] = -INFINITY;
    choices.mass[k] = 0.0f;
  }
  Vec high = Vec{} - INFINITY, mass = {};
  for (int64_t k = 0; k < padded; k += kLanes) high = max(load<Vec>(choices.top + k), high);
  const float top = max_of(high);
  for (int64_t k = 0; k < padded; k += kLanes)
    mass += exp(load<Vec>(choices.top + k) - top) * load<Vec>(choices.mass + k);
  return top + std::log(sum_of(mass));
}

}  // namespace

extern const Kernels kernels = {scan, merge, write, choose, log_mass, fill};

}  // namespace SVD_VARIANT
