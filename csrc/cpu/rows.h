// The row kernels, written once with vector extensions and compiled once per instruction set: the
// including source sets SVD_LANES and SVD_VARIANT. No standard template may be instantiated here
// (see row.h on linkage).
#include <cstring>

#include "kernels.h"
#include "simd.h"

namespace SVD_VARIANT {
namespace {

static_assert(kBlock % (4 * kLanes) == 0, "top_of_block goes by four vectors");

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

// With `stream` the bytes go past the cache, where they are aligned for it.
SVD_HD void copy(char* to, const char* from, int64_t bytes, bool stream) {
#if SVD_LANES == 16
  if (stream && reinterpret_cast<uintptr_t>(to) % sizeof(Vec) == 0)
    for (; bytes >= int64_t{sizeof(Vec)}; bytes -= 64, to += 64, from += 64)
      _mm512_stream_ps((float*)to, load<__m512>(from));
#else
  (void)stream;
#endif
  std::memcpy(to, from, bytes);
}

SVD_HD void narrow(const Logits& row, int64_t vocab, int64_t block, const float* from,
                   bool stream) {
  const int64_t begin = block * kBlock, left = vocab - begin < kBlock ? vocab - begin : kBlock;
  char* to = row.data + begin * size_of(row.dtype);
  if (row.dtype == Dtype::kFloat32)
    return copy(to, reinterpret_cast<const char*>(from), left * 4, stream);
  uint16_t half[kBlock];
  if (row.dtype == Dtype::kBFloat16)
    for (int i = 0; i < kBlock; i += kLanes) store(half + i, narrow_bfloat16(load<Vec>(from + i)));
  else
    for (int i = 0; i < kBlock; i += kLanes) store(half + i, narrow_float16(load<Vec>(from + i)));
  copy(to, reinterpret_cast<const char*>(half), left * 2, stream);
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
// spoils a row do not survive e * (adapted - base). With kBase, `gap` is of differences relative to
// both origins, and `base_mass` is formed in place of `opinion`.
template <bool kCareful, bool kBase>
SVD_HD void sum_block(const float* adapted, const float* base, const Blocks& blocks, int64_t k) {
  const float origin = blocks.top[k] > -INFINITY ? blocks.top[k] : 0.0f;
  const float base_origin = kBase && blocks.base_top[k] > -INFINITY ? blocks.base_top[k] : 0.0f;
  Vec e_sum = {}, opinion_sum = {}, gap_sum = {}, base_sum = {};
  for (int i = 0; i < kBlock; i += kLanes) {
    const Vec z = load<Vec>(adapted + i), b = load<Vec>(base + i);
    Vec e = exp(z - origin);
    if constexpr (kCareful) e = b < INFINITY ? e : Vec{} + NAN;
    if constexpr (kBase) {
      const Vec base_away = b - base_origin, term = e * (z - origin - base_away);
      base_sum += exp(base_away);
      if constexpr (kCareful) {
        const Vec possible = e > 0.0f ? term : Vec{};
        gap_sum += ((z > -INFINITY) & (b == -INFINITY)) ? Vec{} + INFINITY : possible;
      } else {
        gap_sum += term;
      }
    } else if constexpr (kCareful) {
      opinion_sum += b > -INFINITY ? e : Vec{};
      gap_sum += e * difference(z, b);
    } else {
      gap_sum += e * (z - b);
    }
    e_sum += e;
  }
  blocks.mass[k] = sum_of(e_sum);
  blocks.gap[k] = sum_of(gap_sum);
  if constexpr (kBase)
    blocks.base_mass[k] = sum_of(base_sum);
  else
    blocks.opinion[k] = kCareful ? sum_of(opinion_sum) : blocks.mass[k];
}

SVD_HD float top_of_block(const float* logits) {
  Vec high[4];
  for (int j = 0; j < 4; ++j) high[j] = load<Vec>(logits + j * kLanes);
  for (int i = 4 * kLanes; i < kBlock; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) high[j] = max(high[j], load<Vec>(logits + i + j * kLanes));
  return max_of(max(max(high[0], high[1]), max(high[2], high[3])));
}

// Asks for what the scan will read next but a few. The processor does so by itself only up to the
// end of a page of 4 KB.
SVD_HD void fetch_ahead(const Logits& row, int64_t block) {
  const int64_t bytes = kBlock * size_of(row.dtype);
  const char* from = row.data + block * bytes + 4096;
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
}

template <bool kBase>
void scan(const Row& row, int64_t first, int64_t last, const Blocks& blocks) {
  alignas(64) float z_buffer[kBlock], b_buffer[kBlock];
  const bool removes = row.out.data && row.by.penalty == -INFINITY;
  float running = -INFINITY;
  for (int64_t k = first; k < last; ++k) {
    if (row.stream) fetch_ahead(row.adapted, k), fetch_ahead(row.base, k);
    const float* z = widen(row.adapted, row.vocab, k, -INFINITY, z_buffer);
    const float* b = widen(row.base, row.vocab, k, kBase ? -INFINITY : 0.0f, b_buffer);
    const float top = blocks.top[k] = top_of_block(z);
    if constexpr (kBase) blocks.base_top[k] = top_of_block(b);
    if (top > -INFINITY) sum_block<false, kBase>(z, b, blocks, k);
    if (!(top > -INFINITY && blocks.gap[k] - blocks.gap[k] == 0.0f))
      sum_block<true, kBase>(z, b, blocks, k);
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

// `count` in whole vectors, after blocks in which there is nothing.
template <class... Sums>
SVD_HD int64_t pad(int64_t count, float* top, Sums*... sums) {
  const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
  for (int64_t k = count; k < padded; ++k) {
    top[k] = -INFINITY;
    ((sums[k] = 0.0f), ...);
  }
  return padded;
}

SVD_HD float highest(const float* top, int64_t padded) {
  Vec high = Vec{} - INFINITY;
  for (int64_t k = 0; k < padded; k += kLanes) high = max(load<Vec>(top + k), high);
  return max_of(high);
}

RowStats merge(const Blocks& blocks, int64_t count, float log_alpha) {
  const int64_t padded = pad(count, blocks.top, blocks.mass, blocks.opinion, blocks.gap);
  const float top = highest(blocks.top, padded);
  Vec mass = {}, opinion = {}, gap = {};
  for (int64_t k = 0; k < padded; k += kLanes) {
    const Vec weight = exp(load<Vec>(blocks.top + k) - top);
    mass += weight * load<Vec>(blocks.mass + k);
    opinion += weight * load<Vec>(blocks.opinion + k);
    gap += weight * load<Vec>(blocks.gap + k);
  }
  return row_stats(top, sum_of(mass), sum_of(opinion), sum_of(gap), log_alpha);
}

// Sum of p (log p - log q), every logit relative to its row's maximum.
float divergence(const Blocks& blocks, int64_t count) {
  const int64_t padded = pad(count, blocks.top, blocks.mass, blocks.gap);
  pad(count, blocks.base_top, blocks.base_mass);
  const float top = highest(blocks.top, padded), base_top = highest(blocks.base_top, padded);
  Vec mass_sum = {}, gap_sum = {}, base_sum = {};
  for (int64_t k = 0; k < padded; k += kLanes) {
    const Vec away = load<Vec>(blocks.top + k) - top;
    const Vec base_away = load<Vec>(blocks.base_top + k) - base_top;
    const Vec mass = load<Vec>(blocks.mass + k), gap = load<Vec>(blocks.gap + k);
    const Vec weight = exp(away), moved = weight * (gap + mass * (away - base_away));
    mass_sum += weight * mass;
    base_sum += exp(base_away) * load<Vec>(blocks.base_mass + k);
    gap_sum += gap < INFINITY ? (weight > 0.0f ? moved : Vec{}) : gap;
  }
  const RowStats stats = {top, sum_of(mass_sum), 0.0f, 0.0f};
  const float gap = sum_of(gap_sum);
  if (!is_valid(stats) || gap == INFINITY) return is_valid(stats) ? INFINITY : NAN;
  const double nats = double(gap) / stats.mass + std::log(double(sum_of(base_sum)) / stats.mass);
  return nats < 0 ? 0.0f : static_cast<float>(nats);  // rounding alone makes it negative
}

// f(i, adapted, base, exp(adapted - top)) on each vector of a block, from its i-th token on.
template <class F>
SVD_HD void each_vector(const Row& row, const RowStats& stats, int64_t block, const F& f) {
  alignas(64) float z_buffer[kBlock], b_buffer[kBlock];
  const float* z = widen(row.adapted, row.vocab, block, -INFINITY, z_buffer);
  const float* b = widen(row.base, row.vocab, block, 0.0f, b_buffer);
  for (int i = 0; i < kBlock; i += kLanes) {
    const Vec adapted = load<Vec>(z + i);
    f(i, adapted, load<Vec>(b + i), exp(adapted - stats.top));
  }
}

// The steered logits of one block in `buffer`.
SVD_HD void steer_block(const Row& row, const RowStats& stats, int64_t block, float* buffer) {
  each_vector(row, stats, block, [&](int i, Vec z, Vec b, Vec e) SVD_INLINE {
    store(buffer + i, steered(z, b, e, stats, row.by));
  });
}

void write(const Row& row, const RowStats& stats, int64_t first, int64_t last,
           const Blocks& blocks) {
  alignas(64) float buffer[kBlock];
  for (int64_t i = first; i < last; ++i) {
    steer_block(row, stats, blocks.pending[i], buffer);
    narrow(row.out, row.vocab, blocks.pending[i], buffer, false);
  }
}

void write_vector(const Row& row, const RowStats& stats, int64_t first, int64_t last) {
  alignas(64) float buffer[kBlock];
  for (int64_t k = first; k < last; ++k) {
    each_vector(row, stats, k, [&](int i, Vec z, Vec b, Vec e) SVD_INLINE {
      store(buffer + i, steering(z, b, e, stats));
    });
    narrow(row.out, row.vocab, k, buffer, row.stream);
  }
#if SVD_LANES == 16
  if (row.stream) _mm_sfence();
#endif
}

// Raises `best` to the greatest of (logits - top) / temperature + noise among `count` logits, which
// are whole vectors, with the lowest `token` where there are more, and says where. words(i) are the
// ids of the tokens from the i-th on.
template <class F>
SVD_HD int noisy_best(const float* logits, const F& words, int count, float top,
                      const Noise& noise, float& best, uint64_t& token) {
  uint32_t bits[kBlock];
  for (int i = 0; i < count; i += kLanes / 2) {
    const Words word = philox(noise.seed, words(i), noise.position);
    for (int j = 0; j < kLanes / 2; ++j) bits[i + j] = static_cast<uint32_t>(word[j]);
  }
  int at = -1;
  for (int i = 0; i < count; i += kLanes) {
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
      if (merit < best) continue;
      const uint64_t id = words(i + j)[0];
      if (merit > best || id < token) best = merit, token = id, at = i + j;
    }
  }
  return at;
}

void choose(const Row& row, const RowStats& stats, const Noise& noise, int64_t first, int64_t last,
            const Blocks& blocks, const Choices& choices) {
  alignas(64) float buffer[kBlock];
  const bool noisy = noise.temperature > 0 && !noise.after_cuts;
  float best = -INFINITY;
  uint64_t token = 0;
  for (int64_t i = first; i < last; ++i) {
    const int64_t begin = int64_t{blocks.pending[i]} * kBlock;
    steer_block(row, stats, blocks.pending[i], buffer);
    Vec high = Vec{} - INFINITY, mass = {};
    for (int j = 0; j < kBlock; j += kLanes) high = max(load<Vec>(buffer + j), high);
    const float top = max_of(high), origin = top > -INFINITY ? top : 0.0f;
    for (int j = 0; j < kBlock; j += kLanes) mass += exp(load<Vec>(buffer + j) - origin);
    choices.top[i] = top;
    choices.mass[i] = sum_of(mass);
    if (noise.after_cuts) {
      Vec tempered = {};
      for (int j = 0; j < kBlock; j += kLanes)
        tempered += exp((load<Vec>(buffer + j) - origin) / noise.temperature);
      choices.tempered[i] = sum_of(tempered);
    }

    int at = -1;
    if (noisy) {
      Words iota;
      for (int j = 0; j < kLanes / 2; ++j) iota[j] = begin + j;
      const auto words = [&](int j) SVD_INLINE { return iota + static_cast<uint64_t>(j); };
      at = noisy_best(buffer, words, kBlock, stats.top, noise, best, token);
    } else if (top > best) {
      best = top;
      for (at = 0; buffer[at] != top;) ++at;
    }
    choices.merit[i] = at < 0 ? -INFINITY : best;
    choices.logit[i] = at < 0 ? -INFINITY : buffer[at];
    choices.token[i] = begin + at;
  }
}

LogSum log_sum(float* top, float* mass, int64_t count, float temperature) {
  const int64_t padded = pad(count, top, mass);
  const float high = highest(top, padded);
  Vec vec = {};
  for (int64_t k = 0; k < padded; k += kLanes)
    vec += exp((load<Vec>(top + k) - high) / temperature) * load<Vec>(mass + k);
  const float sum = sum_of(vec);
  return {high, sum, std::log(sum)};
}

int gather(const Row& row, const RowStats& stats, int64_t block, float floor, Candidate* to) {
  alignas(64) float buffer[kBlock];
  steer_block(row, stats, block, buffer);
  const int32_t begin = static_cast<int32_t>(block * kBlock);
  int count = 0;
  for (int i = 0; i < kBlock; i += kLanes) {
    const Vec logit = load<Vec>(buffer + i);
    const Int kept = (logit >= floor) & (logit > -INFINITY);
    if (!any(kept)) continue;
    int32_t flag[kLanes];
    store(flag, kept);
    for (int j = 0; j < kLanes; ++j) {
      to[count] = {buffer[i + j], begin + i + j};
      count -= flag[j];  // which is -1 or 0: no branch to foretell
    }
  }
  return count;
}

int64_t draw(const Candidate* from, int64_t count, float top, const Noise& noise) {
  alignas(64) float logits[kBlock];
  uint64_t tokens[kBlock + kLanes] = {};
  const auto words = [&](int i) SVD_INLINE { return load<Words>(tokens + i); };
  float best = -INFINITY;
  uint64_t token = 0;
  int64_t winner = -1;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int here = static_cast<int>(count - begin < kBlock ? count - begin : kBlock);
    for (int i = 0; i < here; ++i) {
      logits[i] = from[begin + i].logit;
      tokens[i] = from[begin + i].token;
    }
    int padded = here;
    for (; padded % kLanes; ++padded) logits[padded] = -INFINITY;
    const int at = noisy_best(logits, words, padded, top, noise, best, token);
    if (at >= 0) winner = begin + at;
  }
  return winner;
}

void project(const Row& row, const RowStats& stats, int64_t first, int64_t last,
             const Blocks& blocks, const Moments& moments) {
  alignas(64) float ps[kBlock], deltas[kBlock];
  for (int64_t i = first; i < last; ++i) {
    Vec mass = {}, sum = {}, square = {}, spread = {};
    each_vector(row, stats, blocks.pending[i], [&](int j, Vec z, Vec b, Vec e) SVD_INLINE {
      const Vec p = e / stats.mass;
      const Vec delta = z >= stats.threshold ? steering(z, b, e, stats) : Vec{};
      mass += p;
      sum += p * delta;
      square += delta * delta;
      store(ps + j, p);
      store(deltas + j, delta);
    });
    moments.mass[i] = sum_of(mass);
    moments.square[i] = sum_of(square);
    const float mean = moments.mass[i] > 0 ? sum_of(sum) / moments.mass[i] : 0.0f;
    for (int j = 0; j < kBlock; j += kLanes) {
      const Vec away = load<Vec>(deltas + j) - mean;
      spread += load<Vec>(ps + j) * away * away;
    }
    moments.mean[i] = mean;
    moments.spread[i] = sum_of(spread);
  }
}

float mass_of(const Blocks& blocks, int64_t count, float top) {
  const int64_t padded = pad(count, blocks.top, blocks.mass);
  Vec mass = {};
  for (int64_t k = 0; k < padded; k += kLanes)
    mass += exp(load<Vec>(blocks.top + k) - top) * load<Vec>(blocks.mass + k);
  return sum_of(mass);
}

TokenView view(const Row& row, const RowStats& stats, int64_t token) {
  alignas(64) float adapted[kBlock], delta[kBlock], logit[kBlock];
  each_vector(row, stats, token / kBlock, [&](int i, Vec z, Vec b, Vec e) SVD_INLINE {
    store(adapted + i, z);
    store(delta + i, steering(z, b, e, stats));
    store(logit + i, steered(z, b, e, stats, row.by));
  });
  const int at = token % kBlock;
  return {adapted[at], delta[at], logit[at]};
}

}  // namespace

extern const Kernels kernels = {
    scan<false>, scan<true>, merge, divergence, write, choose,  project,
    write_vector, view,      gather, draw,      log_sum, mass_of, fill,
};

}  // namespace SVD_VARIANT
