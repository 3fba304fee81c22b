// The arithmetic of step.h, written once with vector extensions and compiled once per instruction
// set, like rows.h.
#include "elements.h"
#include "step.h"

namespace SVD_VARIANT {
namespace {

// Calls f(Float32{}) or f(BFloat16{}).
template <class F>
SVD_HD void for_dtype(Dtype dtype, const F& f) {
  if (dtype == Dtype::kFloat32)
    f(Float32{});
  else
    f(BFloat16{});
}

template <class E>
SVD_HD void norm_row(const Norm& norm, const char* x, char* out) {
  Vec squares = {};
  for (int64_t k = 0; k < norm.n; k += kLanes) {
    const Vec v = get<E>(x, k, norm.n);
    squares += v * v;
  }
  const float scale = 1.0f / __builtin_sqrtf(sum_of(squares) / float(norm.n) + norm.eps);
  for (int64_t k = 0; k < norm.n; k += kLanes) {
    const Vec normal = get<E>(x, k, norm.n) * scale;
    const Vec weight = get<E>(norm.weight, k, norm.n) + norm.offset;
    put<E>(out, k, norm.n, weight * (norm.rounded_between ? E::rounded(normal) : normal));
  }
}

void rms_norm(const Norm& norm, const char* x, char* out) {
  for_dtype(norm.dtype, [&](auto e) SVD_INLINE { norm_row<decltype(e)>(norm, x, out); });
}

template <class E>
SVD_HD void rotate_row(int64_t dim, const char* x, const char* cos, const char* sin, char* out) {
  const int64_t half = dim / 2, there = half * E::kSize;
  const auto turn = [&](int64_t k, Vec straight, Vec across, int64_t at) SVD_INLINE {
    const Vec a = E::rounded(straight * get<E>(cos + at, k, half));
    const Vec b = E::rounded(across * get<E>(sin + at, k, half));
    put<E>(out + at, k, half, a + b);
  };
  for (int64_t k = 0; k < half; k += kLanes) {
    const Vec low = get<E>(x, k, half), high = get<E>(x + there, k, half);
    turn(k, low, -high, 0);
    turn(k, high, low, there);
  }
}

void rotate(Dtype dtype, int64_t dim, const char* x, const char* cos, const char* sin, char* out) {
  for_dtype(dtype, [&](auto e) SVD_INLINE { rotate_row<decltype(e)>(dim, x, cos, sin, out); });
}

SVD_HD Vec tanh(Vec x) {
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_tanhf(x[i]);
  return x;
}

float exponentials(const Softmax& softmax, float* scores, int64_t slots) {
  for (int64_t k = slots; k % 16; ++k) scores[k] = -INFINITY;
  Vec peak = Vec{} - INFINITY;
  for (int64_t k = 0; k < slots; k += kLanes) {
    Vec score = load<Vec>(scores + k) * softmax.scale;
    if (softmax.softcap != 0) score = softmax.softcap * tanh(score / softmax.softcap);
    if (softmax.mask)
      for_dtype(softmax.mask_dtype, [&](auto e) SVD_INLINE {
        score += get<decltype(e)>(softmax.mask, k, slots);
      });
    if (k + kLanes > slots)
      for (int64_t i = slots - k; i < kLanes; ++i) score[i] = -INFINITY;
    store(scores + k, score);
    peak = max(score, peak);
  }
  const float highest = max_of(peak);
  Vec sum = {};
  for (int64_t k = 0; k < slots; k += kLanes) {
    const Vec weight = exp(load<Vec>(scores + k) - highest);
    store(scores + k, weight);
    sum += weight;
  }
  return sum_of(sum);
}

// Mixes two vectors of columns from `column` on, for R queries from `query` on.
template <class E, int R>
SVD_HD void mix_tile(const Values& values, const Weights& weights, int64_t query, int64_t column,
                     char* out) {
  Vec sum[R][2] = {};
  const char* at = values.data + column * E::kSize;
  const float* weight = weights.data + query * weights.stride;
  const int64_t left = values.dim - column;
  const auto add = [&](auto read) SVD_INLINE {
    for (int64_t slot = 0; slot < values.slots; ++slot, at += values.row_bytes) {
      const Vec a = read(0), b = read(kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        const float w = weight[i * weights.stride + slot];
        sum[i][0] += w * a;
        sum[i][1] += w * b;
      }
    }
  };
  if (left >= 2 * kLanes)
    add([&](int64_t k) SVD_INLINE { return E::whole(at + k * E::kSize); });
  else
    add([&](int64_t k) SVD_INLINE { return k < left ? get<E>(at, k, left) : Vec{}; });
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int part = 0; part < 2; ++part)
      if (const int64_t k = column + part * kLanes; k < values.dim)
        put<E>(out + (query + i) * values.dim * E::kSize, k, values.dim,
               sum[i][part] / weights.sum[query + i]);
}

template <class E, int R = 4>
SVD_HD void mix_queries(int64_t queries, const Values& values, const Weights& weights,
                        int64_t query, char* out) {
  if constexpr (R > 1)
    if (queries < R) return mix_queries<E, R - 1>(queries, values, weights, query, out);
  for (int64_t column = 0; column < values.dim; column += 2 * kLanes)
    mix_tile<E, R>(values, weights, query, column, out);
}

void mix(const Values& values, const Weights& weights, char* out) {
  for_dtype(values.dtype, [&](auto e) SVD_INLINE {
    for (int64_t query = 0; query < weights.queries; query += 4)
      mix_queries<decltype(e)>(weights.queries - query, values, weights, query, out);
  });
}

void add(Dtype dtype, int64_t n, char* x, float scale, const char* y) {
  for_dtype(dtype, [&](auto e) SVD_INLINE {
    typedef decltype(e) E;
    for (int64_t k = 0; k < n; k += kLanes)
      put<E>(x, k, n, get<E>(x, k, n) + E::rounded(get<E>(y, k, n) * scale));
  });
}

void multiply(Dtype dtype, int64_t n, char* x, Dtype factor_dtype, const char* factor) {
  for_dtype(dtype, [&](auto e) SVD_INLINE {
    for_dtype(factor_dtype, [&](auto f) SVD_INLINE {
      typedef decltype(e) E;
      for (int64_t k = 0; k < n; k += kLanes)
        put<E>(x, k, n, get<E>(x, k, n) * get<decltype(f)>(factor, k, n));
    });
  });
}

SVD_HD Vec magnitude(Vec x) { return x < 0 ? -x : x; }

SVD_HD Vec silu(Vec x) {
  const Vec e = exp(-magnitude(x));
  return x * ((x < 0 ? e : Vec{} + 1) / (1 + e));
}

SVD_HD Vec gelu_tanh(Vec x) {
  const Vec inner = 0.7978845608f * (x + 0.044715f * x * x * x);
  const Vec e = exp(-2 * magnitude(inner));
  // 1 + tanh(inner) = 2 / (1 + e), or 2 e / (1 + e) where inner is negative
  return x * ((inner < 0 ? e : Vec{} + 1) / (1 + e));
}

void activate(Dtype dtype, int64_t n, char* x, Activation activation, const char* up) {
  for_dtype(dtype, [&](auto e) SVD_INLINE {
    typedef decltype(e) E;
    for (int64_t k = 0; k < n; k += kLanes) {
      const Vec v = get<E>(x, k, n);
      const Vec active = activation == Activation::kSilu ? silu(v) : gelu_tanh(v);
      put<E>(x, k, n, E::rounded(active) * get<E>(up, k, n));
    }
  });
}

}  // namespace

const StepKernel step = {rms_norm, rotate, exponentials, mix, add, multiply, activate};

}  // namespace SVD_VARIANT
