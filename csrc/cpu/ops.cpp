// torch.ops.svd_engine_cpu: the operators on the CPU, through the stable ABI of LibTorch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>

#include "capability.h"
#include "row_ops.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// From this size on, a tensor of rows does not stay in the cache from one call to the next.
constexpr int64_t kStreamBytes = 8 << 20;

// In ascending order of capability; the best one that runs here is chosen when the library loads.
const Kernels* const kVariants[] = {
    &portable::kernels,
#ifdef SVD_X86_VARIANTS
    &avx2::kernels,
    &avx512::kernels,
    &avx512::kernels,  // for AVX512_BF16 too, which adds nothing for a row of logits
#endif
};

int64_t best_capability() {
#ifdef SVD_X86_VARIANTS
  const auto avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const auto avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const auto bfloat16 = avx512 && __builtin_cpu_supports("avx512bf16");
  return avx2 ? 1 + bool(avx512) + bfloat16 : 0;
#else
  return 0;
#endif
}

int64_t chosen = best_capability();

// Returns the variant in use. A `limit` of 0 or more first sets it to the best one up to `limit`.
int64_t capability(int64_t limit) {
  if (limit >= 0) chosen = std::min(limit, best_capability());
  return chosen;
}

}  // namespace

int64_t capability_in_use() { return chosen; }

namespace {

// The rows of a [N, V] tensor.
struct Matrix {
  char* data;
  int64_t rows, vocab, row_bytes;
  Dtype dtype;

  Logits operator[](int64_t i) const { return {data + i * row_bytes, dtype}; }
  bool stream() const { return rows * row_bytes >= kStreamBytes; }
};

Matrix matrix(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(tensor.dim() == 2, name, " must be [N, V], got ", tensor.dim(), " dimensions");
  STD_TORCH_CHECK(tensor.stride(1) == 1 || tensor.size(1) <= 1, name,
                  " must have stride 1 along V, got ", tensor.stride(1));
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 ||
                      type == ScalarType::Half,
                  name, " must be float32, bfloat16 or float16");
  const Dtype dtype = type == ScalarType::Float      ? Dtype::kFloat32
                      : type == ScalarType::BFloat16 ? Dtype::kBFloat16
                                                     : Dtype::kFloat16;
  return {static_cast<char*>(tensor.data_ptr()), tensor.size(0), tensor.size(1),
          tensor.stride(0) * static_cast<int64_t>(tensor.element_size()), dtype};
}

// A per-row argument: element i of a tensor [N], or one scalar for all rows.
template <class T>
struct PerRow {
  const T* data;
  int64_t stride;
  T scalar;

  T operator[](int64_t i) const { return data ? data[i * stride] : scalar; }
};

template <class T>
PerRow<T> per_row(const std::optional<Tensor>& tensor, T scalar, int64_t rows, ScalarType type,
                  const char* name) {
  if (!tensor) return {nullptr, 0, scalar};
  STD_TORCH_CHECK(tensor->is_cpu() && tensor->dim() == 1 && tensor->size(0) == rows, name,
                  " must be a CPU tensor [N] with N = ", rows);
  STD_TORCH_CHECK(tensor->scalar_type() == type, name, " must be ",
                  type == ScalarType::Float ? "float32" : "int64");
  return {static_cast<const T*>(tensor->data_ptr()), tensor->stride(0), scalar};
}

template <class T>
Column<T> column(const Tensor& tensor, int64_t rows, ScalarType type, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 1 && tensor.size(0) == rows, name,
                  " must be a CPU tensor [N] with N = ", rows);
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " has the wrong dtype");
  return {static_cast<T*>(tensor.data_ptr()), tensor.stride(0)};
}

// Checks that each target token id is in [0, V).
PerRow<int64_t> targets(const Tensor& target, int64_t rows, int64_t vocab) {
  const auto ids = per_row(std::optional(target), int64_t{0}, rows, ScalarType::Long, "target");
  for (int64_t i = 0; i < rows; ++i)
    STD_TORCH_CHECK(ids[i] >= 0 && ids[i] < vocab, "target ", ids[i], " is not below V = ", vocab);
  return ids;
}

void check_alike(const Matrix& adapted, const Matrix& other, const char* name) {
  STD_TORCH_CHECK(other.rows == adapted.rows && other.vocab == adapted.vocab, name, " is [",
                  other.rows, ", ", other.vocab, "], adapted is [", adapted.rows, ", ",
                  adapted.vocab, "]");
}

// Calls f(row, fork) for each row. Threads take whole rows each; if there are too few rows to
// divide evenly, one row follows the other and the threads divide the tiles of each (fork).
template <class F>
void each_row(const Matrix& adapted, const F& f) {
  const int64_t threads = torch::stable::get_num_threads(), rows = adapted.rows;
  const bool split = rows < 4 * threads && rows % threads != 0 && adapted.vocab > kFirstPassGrain;
  const int64_t grain = std::max<int64_t>(1, kFirstPassGrain / std::max<int64_t>(1, adapted.vocab));
  each(rows, grain, threads > 1 && !split, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i, threads > 1 && split);
  });
}

void steer(const Tensor adapted, const Tensor base, double strength,
           const std::optional<Tensor> strengths, double log_alpha, double penalty, bool difference, Tensor out) {
  const Matrix z = matrix(adapted, "adapted"), b = matrix(base, "base"), o = matrix(out, "out");
  check_alike(z, b, "base");
  check_alike(z, o, "out");
  const auto strength_of =
      per_row(strengths, float(strength), z.rows, ScalarType::Float, "strengths");
  const Kernels& kernels = *kVariants[chosen];
  each_row(z, [&](int64_t i, bool fork) {
    const Steering steering = {strength_of[i], float(log_alpha), float(penalty), !difference};
    steer_row(kernels, {z[i], b[i], o[i], z.stream(), z.vocab, steering}, fork);
  });
}

// alpha 0: every token in the support.
constexpr Steering whole_vector(bool difference) { return {0.0f, -INFINITY, 0.0f, !difference}; }

void steering_vector(const Tensor adapted, const Tensor base, bool difference, Tensor out) {
  const Matrix z = matrix(adapted, "adapted"), b = matrix(base, "base"), o = matrix(out, "out");
  check_alike(z, b, "base");
  check_alike(z, o, "out");
  const Kernels& kernels = *kVariants[chosen];
  each_row(z, [&](int64_t i, bool fork) {
    const Steering steering = whole_vector(difference);
    vector_row(kernels, {z[i], b[i], o[i], z.stream(), z.vocab, steering}, fork);
  });
}

void sample_cut(const Tensor adapted, const Tensor base, double strength,
                const std::optional<Tensor> strengths, double log_alpha, double penalty, bool difference,
                double temperature, int64_t top_k, double top_p, double min_p, int64_t seed,
                const std::optional<Tensor> seeds, int64_t position,
                const std::optional<Tensor> positions, Tensor token, Tensor logprob) {
  const Matrix z = matrix(adapted, "adapted"), b = matrix(base, "base");
  check_alike(z, b, "base");
  const auto strength_of =
      per_row(strengths, float(strength), z.rows, ScalarType::Float, "strengths");
  const auto seed_of = per_row(seeds, seed, z.rows, ScalarType::Long, "seeds");
  const auto position_of = per_row(positions, position, z.rows, ScalarType::Long, "positions");
  const auto tokens = column<int64_t>(token, z.rows, ScalarType::Long, "token");
  const auto logprobs = column<float>(logprob, z.rows, ScalarType::Float, "logprob");
  const bool cuts = temperature > 0 && (top_k > 0 || top_p < 1 || min_p > 0);
  const Cut cut = {top_k, top_p, min_p > 0 ? std::log(min_p) : -INFINITY};
  const Kernels& kernels = *kVariants[chosen];
  each_row(z, [&](int64_t i, bool fork) {
    const Steering steering = {strength_of[i], float(log_alpha), float(penalty), !difference};
    const Row row = {z[i], b[i], {}, z.stream(), z.vocab, steering};
    const Noise noise = {float(temperature), uint64_t(seed_of[i]), uint64_t(position_of[i]), cuts};
    if (cuts)
      sample_cut_row(kernels, row, noise, cut, fork, tokens[i], logprobs[i]);
    else
      sample_row(kernels, row, noise, fork, tokens[i], logprobs[i]);
  });
}

void sample(const Tensor adapted, const Tensor base, double strength,
            const std::optional<Tensor> strengths, double log_alpha, double penalty, bool difference,
            double temperature, int64_t seed, const std::optional<Tensor> seeds, int64_t position,
            const std::optional<Tensor> positions, Tensor token, Tensor logprob) {
  sample_cut(adapted, base, strength, strengths, log_alpha, penalty, difference, temperature, 0, 1.0, 0.0, seed,
             seeds, position, positions, token, logprob);
}

void topk(const Tensor adapted, const Tensor base, double strength,
          const std::optional<Tensor> strengths, int64_t k, double log_alpha, double penalty, bool difference,
          Tensor logprob, Tensor token) {
  const Matrix z = matrix(adapted, "adapted"), b = matrix(base, "base");
  check_alike(z, b, "base");
  const auto strength_of =
      per_row(strengths, float(strength), z.rows, ScalarType::Float, "strengths");
  STD_TORCH_CHECK(k >= 1 && k <= z.vocab, "k is ", k, ", V is ", z.vocab);
  for (const Tensor& out : {logprob, token})
    STD_TORCH_CHECK(out.is_cpu() && out.dim() == 2 && out.size(0) == z.rows && out.size(1) == k,
                    "logprob and token must be CPU tensors [N, k] with N = ", z.rows,
                    " and k = ", k);
  STD_TORCH_CHECK(logprob.scalar_type() == ScalarType::Float, "logprob must be float32");
  STD_TORCH_CHECK(token.scalar_type() == ScalarType::Long, "token must be int64");
  const Column<float> logprobs = {static_cast<float*>(logprob.data_ptr()), logprob.stride(0)};
  const Column<int64_t> tokens = {static_cast<int64_t*>(token.data_ptr()), token.stride(0)};
  const Kernels& kernels = *kVariants[chosen];
  each_row(z, [&](int64_t i, bool fork) {
    const Steering steering = {strength_of[i], float(log_alpha), float(penalty), !difference};
    topk_row(kernels, {z[i], b[i], {}, z.stream(), z.vocab, steering}, k, fork,
             Column<float>{&logprobs[i], logprob.stride(1)},
             Column<int64_t>{&tokens[i], token.stride(1)});
  });
}

void score(const Tensor adapted, const Tensor base, const Tensor target, double strength,
           const std::optional<Tensor> strengths, double log_alpha, double penalty, bool difference,
           Tensor logprob) {
  const Matrix z = matrix(adapted, "adapted"), b = matrix(base, "base");
  check_alike(z, b, "base");
  const auto strength_of =
      per_row(strengths, float(strength), z.rows, ScalarType::Float, "strengths");
  const auto target_of = targets(target, z.rows, z.vocab);
  const auto logprobs = column<float>(logprob, z.rows, ScalarType::Float, "logprob");
  const Kernels& kernels = *kVariants[chosen];
  each_row(z, [&](int64_t i, bool fork) {
    const Steering steering = {strength_of[i], float(log_alpha), float(penalty), !difference};
    logprobs[i] =
        score_row(kernels, {z[i], b[i], {}, z.stream(), z.vocab, steering}, target_of[i], fork);
  });
}

void project_strength(const Tensor adapted, const Tensor base, const Tensor target,
                      double log_alpha, bool difference, Tensor numerator, Tensor gauss_newton,
                      Tensor newton, Tensor in_support) {
  const Matrix z = matrix(adapted, "adapted"), b = matrix(base, "base");
  check_alike(z, b, "base");
  const auto target_of = targets(target, z.rows, z.vocab);
  const auto numerators = column<float>(numerator, z.rows, ScalarType::Float, "numerator");
  const auto squares = column<float>(gauss_newton, z.rows, ScalarType::Float, "gauss_newton");
  const auto variances = column<float>(newton, z.rows, ScalarType::Float, "newton");
  const auto inside = column<bool>(in_support, z.rows, ScalarType::Bool, "in_support");
  const Kernels& kernels = *kVariants[chosen];
  each_row(z, [&](int64_t i, bool fork) {
    const Steering steering = {0.0f, float(log_alpha), -INFINITY, !difference};
    const Row row = {z[i], b[i], {}, z.stream(), z.vocab, steering};
    const Projection projection = project_row(kernels, row, target_of[i], fork);
    numerators[i] = projection.numerator;
    squares[i] = projection.gauss_newton;
    variances[i] = projection.newton;
    inside[i] = projection.in_support;
  });
}

// A [N, slots] output of `support`.
template <class T>
T* slots(const Tensor& tensor, int64_t rows, int64_t count, ScalarType type, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 2 && tensor.size(0) == rows &&
                      tensor.size(1) == count && tensor.scalar_type() == type,
                  name, " must be a CPU tensor [N, slots] with N = ", rows, ", slots = ", count);
  return static_cast<T*>(tensor.data_ptr());
}

void support(const Tensor adapted, const Tensor base, const Tensor target, double log_alpha,
             bool difference, Tensor token, Tensor p, Tensor delta, Tensor logp, Tensor logq,
             Tensor mean_d, Tensor divergence, Tensor size) {
  const Matrix z = matrix(adapted, "adapted"), b = matrix(base, "base");
  check_alike(z, b, "base");
  const auto target_of = targets(target, z.rows, z.vocab);
  STD_TORCH_CHECK(token.dim() == 2, "token must be [N, slots]");
  const int64_t capacity = token.size(1);
  auto* tokens = slots<int64_t>(token, z.rows, capacity, ScalarType::Long, "token");
  auto* ps = slots<float>(p, z.rows, capacity, ScalarType::Float, "p");
  auto* deltas = slots<float>(delta, z.rows, capacity, ScalarType::Float, "delta");
  const auto logps = column<float>(logp, z.rows, ScalarType::Float, "logp");
  const auto logqs = column<float>(logq, z.rows, ScalarType::Float, "logq");
  const auto means = column<float>(mean_d, z.rows, ScalarType::Float, "mean_d");
  const auto nats = column<float>(divergence, z.rows, ScalarType::Float, "divergence");
  const auto sizes = column<int64_t>(size, z.rows, ScalarType::Long, "size");
  const Kernels& kernels = *kVariants[chosen];
  each_row(z, [&](int64_t i, bool fork) {
    const Steering steering = {0.0f, float(log_alpha), -INFINITY, !difference};
    const Row row = {z[i], b[i], {}, z.stream(), z.vocab, steering};
    const Listing to = {{tokens + i * token.stride(0), token.stride(1)},
                        {ps + i * p.stride(0), p.stride(1)},
                        {deltas + i * delta.stride(0), delta.stride(1)},
                        capacity};
    const Listed listed = support_row(kernels, row, target_of[i], fork, to);
    logps[i] = listed.logp;
    logqs[i] = listed.logq;
    means[i] = listed.mean_d;
    nats[i] = listed.divergence;
    sizes[i] = listed.size;
  });
}

void divergence(const Tensor adapted, const Tensor base, Tensor out) {
  const Matrix z = matrix(adapted, "adapted"), b = matrix(base, "base");
  check_alike(z, b, "base");
  const auto nats = column<float>(out, z.rows, ScalarType::Float, "out");
  const Kernels& kernels = *kVariants[chosen];
  each_row(z, [&](int64_t i, bool fork) {
    const Steering steering = whole_vector(false);
    nats[i] = divergence_row(kernels, {z[i], b[i], {}, z.stream(), z.vocab, steering}, fork);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY(svd_engine_cpu, m) {
#define ROWS "(Tensor adapted, Tensor base, "
#define STRENGTH "float strength, Tensor? strengths, "
#define MASK "float log_alpha, float penalty, bool difference, "
#define SEEDS "int seed, Tensor? seeds, int position, Tensor? positions, "
#define PICKED "Tensor(a!) token, Tensor(b!) logprob) -> ()"
  m.def("steer" ROWS STRENGTH MASK "Tensor(a!) out) -> ()");
  m.def("steering_vector" ROWS "bool difference, Tensor(a!) out) -> ()");
  m.def("sample" ROWS STRENGTH MASK "float temperature, " SEEDS PICKED);
  m.def("sample_cut" ROWS STRENGTH MASK
        "float temperature, int top_k, float top_p, float min_p, " SEEDS PICKED);
  m.def("topk" ROWS STRENGTH "int k, " MASK "Tensor(a!) logprob, Tensor(b!) token) -> ()");
  m.def("score" ROWS "Tensor target, " STRENGTH MASK "Tensor(a!) logprob) -> ()");
  m.def("project_strength" ROWS
        "Tensor target, float log_alpha, bool difference, Tensor(a!) numerator, Tensor(b!) gauss_newton, "
        "Tensor(c!) newton, Tensor(d!) in_support) -> ()");
  m.def("support" ROWS
        "Tensor target, float log_alpha, bool difference, Tensor(a!) token, Tensor(b!) p, "
        "Tensor(c!) delta, Tensor(d!) logp, Tensor(e!) logq, Tensor(f!) mean_d, "
        "Tensor(g!) divergence, Tensor(h!) size) -> ()");
  m.def("divergence" ROWS "Tensor(a!) out) -> ()");
  m.def("capability(int limit) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(svd_engine_cpu, CPU, m) {
  m.impl("steer", TORCH_BOX(&steer));
  m.impl("steering_vector", TORCH_BOX(&steering_vector));
  m.impl("sample", TORCH_BOX(&sample));
  m.impl("sample_cut", TORCH_BOX(&sample_cut));
  m.impl("topk", TORCH_BOX(&topk));
  m.impl("score", TORCH_BOX(&score));
  m.impl("project_strength", TORCH_BOX(&project_strength));
  m.impl("support", TORCH_BOX(&support));
  m.impl("divergence", TORCH_BOX(&divergence));
}

STABLE_TORCH_LIBRARY_IMPL(svd_engine_cpu, CompositeExplicitAutograd, m) {
  m.impl("capability", TORCH_BOX(&capability));
}
