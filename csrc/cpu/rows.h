// The row kernels, written once with GCC's vector extensions and compiled once per instruction set:
// the including source sets SVD_LANES and SVD_VARIANT. Do not instantiate a standard template here
// (row.h says why).
#include <cstring>

#include "kernels.h"
#include "simd.h"

namespace SVD_VARIANT {
namespace {

static_assert(kTile % (4 * kLanes) == 0, "peak_of_tile reads four vectors at a time");

int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// A tile of a row as float32: a pointer into the row itself, or `buffer` if the row has another
// dtype or ends inside the tile; then `pad` follows its end.
SVD_HD const float* widen(const Logits& row, int64_t vocab, int64_t tile, float pad,
                          float* buffer) {
  const int64_t begin = tile * kTile, left = vocab - begin;
  const char* from = row.data + begin * size_of(row.dtype);
  uint16_t tail[kTile];
  if (row.dtype == Dtype::kFloat32) {
    if (left >= kTile) return reinterpret_cast<const float*>(from);
    for (int i = 0; i < kTile; ++i) buffer[i] = pad;
    std::memcpy(buffer, from, left * 4);
    return buffer;
  }
  if (left < kTile) {
    std::memset(tail, 0, sizeof tail);
    std::memcpy(tail, from, left * 2);
    from = reinterpret_cast<const char*>(tail);
  }
  if (row.dtype == Dtype::kBFloat16)
    for (int i = 0; i < kTile; i += kLanes)
      store(buffer + i, widen_bfloat16(load<Half>(from + 2 * i)));
  else
    for (int i = 0; i < kTile; i += kLanes)
      store(buffer + i, widen_float16(load<Half>(from + 2 * i)));
  for (int64_t i = left; i < kTile; ++i) buffer[i] = pad;
  return buffer;
}

// With `stream` the bytes are written around the cache, if `to` is aligned for it.
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

SVD_HD void narrow(const Logits& row, int64_t vocab, int64_t tile, const float* from,
                   bool stream) {
  const int64_t begin = tile * kTile, left = vocab - begin < kTile ? vocab - begin : kTile;
  char* to = row.data + begin * size_of(row.dtype);
  if (row.dtype == Dtype::kFloat32)
    return copy(to, reinterpret_cast<const char*>(from), left * 4, stream);
  uint16_t half[kTile];
  if (row.dtype == Dtype::kBFloat16)
    for (int i = 0; i < kTile; i += kLanes) store(half + i, narrow_bfloat16(load<Vec>(from + i)));
  else
    for (int i = 0; i < kTile; i += kLanes) store(half + i, narrow_float16(load<Vec>(from + i)));
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

// The sums of one tile. The fast form (not kCareful) skips the tests for -inf, NaN and +inf, and is
// right if its sum_exp_d is finite: each of those values, in either row, makes e * (adapted - base)
// NaN or infinite, and the sum with it. The caller tries the fast form and repeats the tile with
// the careful one only then; a row without masked tokens never pays for the tests. With kBase it
// sums the base and the gaps too.
template <bool kCareful, bool kBase>
SVD_HD void sum_tile(const float* adapted, const float* base, const TileSums& tiles, int64_t k) {
  const float origin = tiles.peak[k] > -INFINITY ? tiles.peak[k] : 0.0f;
  const float base_origin = kBase && tiles.base_peak[k] > -INFINITY ? tiles.base_peak[k] : 0.0f;
  Vec sum_exp = {}, sum_exp_in_base = {}, sum_exp_d = {}, base_sum_exp = {}, sum_exp_gap = {};
  Int apart = {};  // a token is possible in adapted and not in base
  for (int i = 0; i < kTile; i += kLanes) {
    const Vec z = load<Vec>(adapted + i), b = load<Vec>(base + i);
    Vec e = exp(z - origin);
    if constexpr (kCareful) e = b < INFINITY ? e : Vec{} + NAN;
    if constexpr (kBase) {
      const Vec base_away = b - base_origin, term = e * (z - origin - base_away);
      base_sum_exp += exp(base_away);
      if constexpr (kCareful) {
        sum_exp_gap += ((e > 0.0f) & (b > -INFINITY)) ? term : Vec{};
        apart |= (z > -INFINITY) & (b == -INFINITY);
      } else {
        sum_exp_gap += term;
      }
    } else if constexpr (kCareful) {
      sum_exp_d += e * difference(z, b);
    } else {
      sum_exp_d += e * (z - b);
    }
    if constexpr (kCareful) sum_exp_in_base += b > -INFINITY ? e : Vec{};
    sum_exp += e;
  }
  tiles.sum_exp[k] = sum_of(sum_exp);
  tiles.sum_exp_in_base[k] = kCareful ? sum_of(sum_exp_in_base) : tiles.sum_exp[k];
  if constexpr (kBase) {
    const float gap = sum_of(sum_exp_gap);
    tiles.base_sum_exp[k] = sum_of(base_sum_exp);
    tiles.sum_exp_gap[k] = kCareful && any(apart) ? INFINITY : gap;
    tiles.sum_exp_d[k] = gap + tiles.sum_exp_in_base[k] * (origin - base_origin);
  } else {
    tiles.sum_exp_d[k] = sum_of(sum_exp_d);
  }
}

SVD_HD float peak_of_tile(const float* logits) {
  Vec high[4];
  for (int j = 0; j < 4; ++j) high[j] = load<Vec>(logits + j * kLanes);
  for (int i = 4 * kLanes; i < kTile; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) high[j] = max(high[j], load<Vec>(logits + i + j * kLanes));
  return max_of(max(max(high[0], high[1]), max(high[2], high[3])));
}

// Prefetches the part of the row one page of 4 KB ahead of this tile. The hardware prefetcher stops
// at the end of each page, so without this every page starts with a miss to memory.
SVD_HD void fetch_ahead(const Logits& row, int64_t tile) {
  const int64_t bytes = kTile * size_of(row.dtype);
  const char* from = row.data + tile * bytes + 4096;
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
}

template <bool kBase>
void measure(const Row& row, int64_t begin, int64_t end, const TileSums& tiles) {
  alignas(64) float z_buffer[kTile], b_buffer[kTile];
  const bool removes = row.out.data && row.steering.penalty == -INFINITY;
  float running_peak = -INFINITY;
  for (int64_t k = begin; k < end; ++k) {
    if (row.stream) fetch_ahead(row.adapted, k), fetch_ahead(row.base, k);
    const float* z = widen(row.adapted, row.vocab, k, -INFINITY, z_buffer);
    const float* b = widen(row.base, row.vocab, k, kBase ? -INFINITY : 0.0f, b_buffer);
    const float peak = tiles.peak[k] = peak_of_tile(z);
    if constexpr (kBase) tiles.base_peak[k] = peak_of_tile(b);
    if (peak > -INFINITY) sum_tile<false, kBase>(z, b, tiles, k);
    if (!(peak > -INFINITY && tiles.sum_exp_d[k] - tiles.sum_exp_d[k] == 0.0f))
      sum_tile<true, kBase>(z, b, tiles, k);
    running_peak = running_peak > peak ? running_peak : peak;
    // The running peak only grows, so a tile that is off the support now stays off it. Its result
    // is known before the row's statistics are: -inf is written here, while `out` costs no extra
    // pass, and the tile is not read again. So `out` may be `adapted` or `base` itself.
    const bool off = removes && peak < running_peak + row.steering.log_alpha;
    tiles.active[k] = !off;
    if (off) {
      const int64_t stop = (k + 1) * kTile;
      fill(row.out, k * kTile, stop < row.vocab ? stop : row.vocab, -INFINITY, row.stream);
    }
  }
#if SVD_LANES == 16
  if (row.stream) _mm_sfence();
#endif
}

// Rounds `count` tiles up to whole vectors, by appending empty tiles.
template <class... Sums>
SVD_HD int64_t pad(int64_t count, float* peak, Sums*... sums) {
  const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
  for (int64_t k = count; k < padded; ++k) {
    peak[k] = -INFINITY;
    ((sums[k] = 0.0f), ...);
  }
  return padded;
}

SVD_HD float highest(const float* peak, int64_t padded) {
  Vec high = Vec{} - INFINITY;
  for (int64_t k = 0; k < padded; k += kLanes) high = max(load<Vec>(peak + k), high);
  return max_of(high);
}

RowStats combine(const TileSums& tiles, int64_t count, float log_alpha) {
  const int64_t padded =
      pad(count, tiles.peak, tiles.sum_exp, tiles.sum_exp_in_base, tiles.sum_exp_d);
  const float peak = highest(tiles.peak, padded);
  Vec sum_exp = {}, sum_exp_in_base = {}, sum_exp_d = {};
  for (int64_t k = 0; k < padded; k += kLanes) {
    const Vec scale = exp(load<Vec>(tiles.peak + k) - peak);
    sum_exp += scale * load<Vec>(tiles.sum_exp + k);
    sum_exp_in_base += scale * load<Vec>(tiles.sum_exp_in_base + k);
    sum_exp_d += scale * load<Vec>(tiles.sum_exp_d + k);
  }
  return row_stats(peak, sum_of(sum_exp), sum_of(sum_exp_in_base), sum_of(sum_exp_d), log_alpha);
}

// Sum of p (log p - log q), each logit relative to the peak of its row.
float divergence(const TileSums& tiles, int64_t count) {
  const int64_t padded = pad(count, tiles.peak, tiles.sum_exp, tiles.sum_exp_gap);
  pad(count, tiles.base_peak, tiles.base_sum_exp);
  const float peak = highest(tiles.peak, padded), base_peak = highest(tiles.base_peak, padded);
  Vec row_sum_exp = {}, row_sum_exp_gap = {}, base_sum_exp = {};
  for (int64_t k = 0; k < padded; k += kLanes) {
    const Vec away = load<Vec>(tiles.peak + k) - peak;
    const Vec base_away = load<Vec>(tiles.base_peak + k) - base_peak;
    const Vec sum_exp = load<Vec>(tiles.sum_exp + k), gap = load<Vec>(tiles.sum_exp_gap + k);
    const Vec scale = exp(away), moved = scale * (gap + sum_exp * (away - base_away));
    row_sum_exp += scale * sum_exp;
    base_sum_exp += exp(base_away) * load<Vec>(tiles.base_sum_exp + k);
    row_sum_exp_gap += gap < INFINITY ? (scale > 0.0f ? moved : Vec{}) : gap;
  }
  const RowStats stats = {peak, sum_of(row_sum_exp), 0.0f, 0.0f};
  const float sum_exp_gap = sum_of(row_sum_exp_gap);
  if (!is_valid(stats) || sum_exp_gap == INFINITY) return is_valid(stats) ? INFINITY : NAN;
  const double nats = double(sum_exp_gap) / stats.sum_exp +
                      std::log(double(sum_of(base_sum_exp)) / stats.sum_exp);
  return nats < 0 ? 0.0f : static_cast<float>(nats);  // only rounding makes it negative
}

// Calls f(i, adapted, base, exp(adapted - peak)) on each vector of a tile, from its i-th token on.
template <class F>
SVD_HD void each_vector(const Row& row, const RowStats& stats, int64_t tile, const F& f) {
  alignas(64) float z_buffer[kTile], b_buffer[kTile];
  const float* z = widen(row.adapted, row.vocab, tile, -INFINITY, z_buffer);
  const float* b = widen(row.base, row.vocab, tile, 0.0f, b_buffer);
  for (int i = 0; i < kTile; i += kLanes) {
    const Vec adapted = load<Vec>(z + i);
    f(i, adapted, load<Vec>(b + i), exp(adapted - stats.peak));
  }
}

// Writes the steered logits of one tile to `buffer`.
SVD_HD void steer_tile(const Row& row, const RowStats& stats, int64_t tile, float* buffer) {
  each_vector(row, stats, tile, [&](int i, Vec z, Vec b, Vec e) SVD_INLINE {
    store(buffer + i, steered(z, b, e, stats, row.steering));
  });
}

void write(const Row& row, const RowStats& stats, int64_t begin, int64_t end,
           const TileSums& tiles) {
  alignas(64) float buffer[kTile];
  for (int64_t i = begin; i < end; ++i) {
    steer_tile(row, stats, tiles.active[i], buffer);
    narrow(row.out, row.vocab, tiles.active[i], buffer, false);
  }
}

void write_vector(const Row& row, const RowStats& stats, int64_t begin, int64_t end) {
  alignas(64) float buffer[kTile];
  for (int64_t k = begin; k < end; ++k) {
    each_vector(row, stats, k, [&](int i, Vec z, Vec b, Vec e) SVD_INLINE {
      store(buffer + i, delta_of(z, b, e, stats, row.steering.projected));
    });
    narrow(row.out, row.vocab, k, buffer, row.stream);
  }
#if SVD_LANES == 16
  if (row.stream) _mm_sfence();
#endif
}

// The random bits of a tile's tokens.
SVD_HD void draw_tile(const Noise& noise, int64_t tile_begin, uint32_t (&bits)[kTile]) {
  static_assert(kTile % (2 * kLanes) == 0, "whole vectors of fours");
  Words four;
  for (int j = 0; j < kLanes / 2; ++j) four[j] = tile_begin / 4 + j;
  for (int i = 0; i < kTile; i += 2 * kLanes, four += kLanes / 2) {
    const FourWords<Words> words = philox(noise.seed, four, noise.position);
    const Words low = words.of[0] | words.of[1] << 32, high = words.of[2] | words.of[3] << 32;
    for (int j = 0; j < kLanes / 2; ++j) {
      const uint64_t of_four[2] = {low[j], high[j]};
      std::memcpy(bits + i + 4 * j, of_four, sizeof of_four);
    }
  }
}

// The random bits of `count` tokens, which are whole vectors.
SVD_HD void draw_tokens(const Noise& noise, const uint64_t* tokens, int count, uint32_t* bits) {
  for (int i = 0; i < count; i += kLanes / 2) {
    const Words token = load<Words>(tokens + i), which = token & 3;
    const FourWords<Words> words = philox(noise.seed, token >> 2, noise.position);
    const Words even = which == 0 ? words.of[0] : words.of[2];
    const Words odd = which == 1 ? words.of[1] : words.of[3];
    const Words word = (token & 1) == 0 ? even : odd;
    for (int j = 0; j < kLanes / 2; ++j) bits[i + j] = static_cast<uint32_t>(word[j]);
  }
}

// Raises `best` to the greatest merit (merit_of in row.h) of `count` logits, which are whole vectors,
// and sets `token` to its token, of equals the one with the lowest id; returns its index, or -1 if
// none is better. `bits` are the tokens' random bits, and id(i) is the i-th token.
//
// Few tokens need the two logarithms of the noise: noise = -log(E) with E = -log(1 - u) >= u, so a
// token can exceed `best` only if u <= exp(ahead), where `ahead` is its merit without noise less
// `best`, divided by the factor of the noise. That test takes the random bits and one
// exponential per token, all in vectors; only the tokens that pass it get the exact noise.
template <class F>
SVD_HD int noisy_best(const float* logits, const uint32_t* bits, const F& id, int count, float peak,
                      const Noise& noise, float& best, uint64_t& token) {
  const float divisor = std::fmax(noise.temperature, 1.0f);
  const float factor = std::fmin(noise.temperature, 1.0f);
  int at = -1;
  for (int i = 0; i < count; i += kLanes) {
    const Vec away = load<Vec>(logits + i) - peak;
    const Vec u = (__builtin_convertvector(load<Bits>(bits + i), Vec) + 0.5f) * 0x1p-32f;
    const Vec ahead = (away / divisor - best) / factor;
    const Vec chance = exp(ahead < 0.0f ? ahead : Vec{}) * 1.0001f;  // with room for rounding
    const Int hopeful = (u <= chance) & (away > -INFINITY);
    if (!any(hopeful)) continue;
    for (int j = 0; j < kLanes; ++j) {
      if (!hopeful[j]) continue;
      const float merit = merit_of(away[j], gumbel(bits[i + j]), noise.temperature);
      if (merit < best) continue;
      if (merit > best || id(i + j) < token) best = merit, token = id(i + j), at = i + j;
    }
  }
  return at;
}

void choose(const Row& row, const RowStats& stats, const Noise& noise, int64_t begin, int64_t end,
            const TileSums& tiles, const Choices& choices) {
  alignas(64) float buffer[kTile];
  const bool noisy = noise.temperature > 0 && !noise.after_cuts;
  float best = -INFINITY;
  uint64_t token = 0;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t tile_begin = int64_t{tiles.active[i]} * kTile;
    steer_tile(row, stats, tiles.active[i], buffer);
    Vec high = Vec{} - INFINITY, sum_exp = {};
    for (int j = 0; j < kTile; j += kLanes) high = max(load<Vec>(buffer + j), high);
    const float peak = max_of(high), origin = peak > -INFINITY ? peak : 0.0f;
    for (int j = 0; j < kTile; j += kLanes) sum_exp += exp(load<Vec>(buffer + j) - origin);
    choices.peak[i] = peak;
    choices.sum_exp[i] = sum_of(sum_exp);
    if (noise.after_cuts) {
      Vec tempered = {};
      for (int j = 0; j < kTile; j += kLanes)
        tempered += exp((load<Vec>(buffer + j) - origin) / noise.temperature);
      choices.tempered_sum_exp[i] = sum_of(tempered);
    }

    int at = -1;
    if (noisy) {
      uint32_t bits[kTile];
      draw_tile(noise, tile_begin, bits);
      const auto id = [&](int j) SVD_INLINE { return static_cast<uint64_t>(tile_begin) + j; };
      at = noisy_best(buffer, bits, id, kTile, stats.peak, noise, best, token);
    } else if (peak > best) {
      best = peak;
      for (at = 0; buffer[at] != peak;) ++at;
    }
    choices.merit[i] = at < 0 ? -INFINITY : best;
    choices.logit[i] = at < 0 ? -INFINITY : buffer[at];
    choices.token[i] = tile_begin + at;
  }
}

LogSumExp log_sum_exp(float* peak, float* sum_exp, int64_t count, float temperature) {
  const int64_t padded = pad(count, peak, sum_exp);
  const float greatest = highest(peak, padded);
  Vec lanes = {};
  for (int64_t k = 0; k < padded; k += kLanes)
    lanes += exp((load<Vec>(peak + k) - greatest) / temperature) * load<Vec>(sum_exp + k);
  const float sum = sum_of(lanes);
  return {greatest, sum, std::log(sum)};
}

int gather(const Row& row, const RowStats& stats, int64_t tile, float floor, Candidate* to) {
  alignas(64) float buffer[kTile];
  steer_tile(row, stats, tile, buffer);
  const int32_t begin = static_cast<int32_t>(tile * kTile);
  int count = 0;
  for (int i = 0; i < kTile; i += kLanes) {
    const Vec logit = load<Vec>(buffer + i);
    const Int kept = (logit >= floor) & (logit > -INFINITY);
    if (!any(kept)) continue;
    int32_t flag[kLanes];
    store(flag, kept);
    for (int j = 0; j < kLanes; ++j) {
      to[count] = {buffer[i + j], begin + i + j};
      count -= flag[j];  // -1 or 0: no branch to mispredict
    }
  }
  return count;
}

int list(const Row& row, const RowStats& stats, int64_t tile, Entry* to) {
  const int32_t begin = static_cast<int32_t>(tile * kTile);
  int count = 0;
  each_vector(row, stats, tile, [&](int i, Vec z, Vec b, Vec e) SVD_INLINE {
    const Int kept = (z >= stats.threshold) & (z > -INFINITY);
    if (!any(kept)) return;
    float p[kLanes], delta[kLanes];
    int32_t flag[kLanes];
    store(p, e / stats.sum_exp);
    store(delta, delta_of(z, b, e, stats, row.steering.projected));
    store(flag, kept);
    for (int j = 0; j < kLanes; ++j) {
      to[count] = {begin + i + j, p[j], delta[j]};
      count -= flag[j];  // -1 or 0: no branch to mispredict
    }
  });
  return count;
}

int64_t draw(const Candidate* from, int64_t count, float peak, const Noise& noise) {
  alignas(64) float logits[kTile];
  uint64_t tokens[kTile + kLanes] = {};
  uint32_t bits[kTile];
  const auto id = [&](int i) SVD_INLINE { return tokens[i]; };
  float best = -INFINITY;
  uint64_t token = 0;
  int64_t winner = -1;
  for (int64_t begin = 0; begin < count; begin += kTile) {
    const int here = static_cast<int>(count - begin < kTile ? count - begin : kTile);
    for (int i = 0; i < here; ++i) {
      logits[i] = from[begin + i].logit;
      tokens[i] = from[begin + i].token;
    }
    int padded = here;
    for (; padded % kLanes; ++padded) logits[padded] = -INFINITY;
    draw_tokens(noise, tokens, padded, bits);
    const int at = noisy_best(logits, bits, id, padded, peak, noise, best, token);
    if (at >= 0) winner = begin + at;
  }
  return winner;
}

void project(const Row& row, const RowStats& stats, int64_t begin, int64_t end,
             const TileSums& tiles, const Moments& moments) {
  alignas(64) float ps[kTile], deltas[kTile];
  for (int64_t i = begin; i < end; ++i) {
    Vec sum_p = {}, sum = {}, squares = {}, spread = {};
    each_vector(row, stats, tiles.active[i], [&](int j, Vec z, Vec b, Vec e) SVD_INLINE {
      const Vec p = e / stats.sum_exp;
      const Vec delta = z >= stats.threshold ? delta_of(z, b, e, stats, row.steering.projected) : Vec{};
      sum_p += p;
      sum += p * delta;
      squares += delta * delta;
      store(ps + j, p);
      store(deltas + j, delta);
    });
    moments.sum_p[i] = sum_of(sum_p);
    moments.squares[i] = sum_of(squares);
    const float mean = moments.sum_p[i] > 0 ? sum_of(sum) / moments.sum_p[i] : 0.0f;
    for (int j = 0; j < kTile; j += kLanes) {
      const Vec away = load<Vec>(deltas + j) - mean;
      spread += load<Vec>(ps + j) * away * away;
    }
    moments.mean[i] = mean;
    moments.spread[i] = sum_of(spread);
  }
}

float sum_exp_of(const TileSums& tiles, int64_t count, float peak) {
  const int64_t padded = pad(count, tiles.peak, tiles.sum_exp);
  Vec sum_exp = {};
  for (int64_t k = 0; k < padded; k += kLanes)
    sum_exp += exp(load<Vec>(tiles.peak + k) - peak) * load<Vec>(tiles.sum_exp + k);
  return sum_of(sum_exp);
}

TokenValues token_at(const Row& row, const RowStats& stats, int64_t token) {
  alignas(64) float adapted[kTile], base[kTile], delta[kTile], logit[kTile];
  each_vector(row, stats, token / kTile, [&](int i, Vec z, Vec b, Vec e) SVD_INLINE {
    store(adapted + i, z);
    store(base + i, b);
    store(delta + i, delta_of(z, b, e, stats, row.steering.projected));
    store(logit + i, steered(z, b, e, stats, row.steering));
  });
  const int at = token % kTile;
  return {adapted[at], base[at], delta[at], logit[at]};
}

}  // namespace

extern const Kernels kernels = {
    measure<false>, measure<true>, combine, divergence, write, choose, project,
    write_vector, token_at, gather, list, draw, log_sum_exp, sum_exp_of, fill,
};

}  // namespace SVD_VARIANT
