// torch.ops.svd_engine_native: `steer` and `sample` on the CPU, on the LibTorch stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <memory>
#include <optional>

#include "kernels.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Tokens that are worth a thread: below, waking it costs more than it saves.
constexpr int64_t kScanGrain = 32768;
constexpr int64_t kFinishGrain = 16384;

// From here on steer writes past the cache, which saves reading the lines that it overwrites.
constexpr int64_t kStreamBytes = 8 << 20;

// From the least to the most able; the best that runs here is taken at load.
const Kernels* const kVariants[] = {
    &portable::kernels,
#ifdef SVD_X86_VARIANTS
    &avx2::kernels,
    &avx512::kernels,
#endif
};

int64_t best_capability() {
#ifdef SVD_X86_VARIANTS
  const auto avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const auto avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx2 ? 1 + bool(avx512) : 0;
#else
  return 0;
#endif
}

int64_t chosen = best_capability();

// The variant in use; a `limit` of 0 or more first sets it to the best one not above.
int64_t capability(int64_t limit) {
  if (limit >= 0) chosen = std::min(limit, best_capability());
  return chosen;
}

// One row's working memory, kept from call to call.
struct Scratch {
  Blocks blocks;
  Choices choices;

  static Scratch& of_thread(int64_t count) {
    thread_local Scratch scratch;
    if (count > scratch.capacity_) scratch.reserve((count + 15) / 16 * 16);
    return scratch;
  }

 private:
  int64_t capacity_ = -1;
  std::unique_ptr<float[]> floats_;
  std::unique_ptr<int32_t[]> pending_;
  std::unique_ptr<int64_t[]> tokens_;

  void reserve(int64_t count) {
    floats_ = std::make_unique<float[]>(8 * count);
    pending_ = std::make_unique<int32_t[]>(count);
    tokens_ = std::make_unique<int64_t[]>(count);
    float* at = floats_.get();
    for (float** array : {&blocks.top, &blocks.mass, &blocks.opinion, &blocks.gap, &choices.top,
                          &choices.mass, &choices.merit, &choices.logit}) {
      *array = at;
      at += count;
    }
    blocks.pending = pending_.get();
    choices.token = tokens_.get();
    capacity_ = count;
  }
};

template <class F>
void each(int64_t count, int64_t grain, bool fork, const F& f) {
  if (fork && count > grain)
    torch::stable::parallel_for(0, count, grain, f);
  else
    f(0, count);
}

struct Scanned {
  RowStats stats;
  int64_t blocks;
};

Scanned scan(const Kernels& kernels, const Row& row, const Scratch& scratch, bool fork) {
  const int64_t count = (row.vocab + kBlock - 1) / kBlock;
  each(count, kScanGrain / kBlock, fork, [&](int64_t first, int64_t last) {
    kernels.scan(row, first, last, scratch.blocks);
  });
  return {kernels.merge(scratch.blocks, count, row.by.log_alpha), count};
}

// Turns pending from flags into the list of the blocks for which `keep` holds.
template <class F>
int64_t list_pending(int64_t blocks, int32_t* pending, const F& keep) {
  int64_t count = 0;
  for (int64_t k = 0; k < blocks; ++k) {
    const bool kept = keep(k);
    pending[count] = static_cast<int32_t>(k);
    count += kept;
  }
  return count;
}

void steer_row(const Kernels& kernels, const Row& row, bool fork) {
  Scratch& scratch = Scratch::of_thread((row.vocab + kBlock - 1) / kBlock);
  const auto [stats, blocks] = scan(kernels, row, scratch, fork);
  if (!is_valid(stats)) return kernels.fill(row.out, 0, row.vocab, NAN, false);
  int32_t* pending = scratch.blocks.pending;
  const int64_t count = list_pending(blocks, pending, [&](int64_t k) { return pending[k] != 0; });
  each(count, kFinishGrain / kBlock, fork, [&, &stats = stats](int64_t first, int64_t last) {
    kernels.write(row, stats, first, last, scratch.blocks);
  });
}

void sample_row(const Kernels& kernels, const Row& row, const Noise& noise, bool fork,
                int64_t& token, float& logprob) {
  Scratch& scratch = Scratch::of_thread((row.vocab + kBlock - 1) / kBlock);
  const auto [stats, blocks] = scan(kernels, row, scratch, fork);
  token = -1;
  logprob = NAN;
  if (!is_valid(stats)) return;
  const bool keeps_all = row.by.penalty > -INFINITY;
  const float* top = scratch.blocks.top;
  const float threshold = stats.threshold;
  const int64_t count = list_pending(blocks, scratch.blocks.pending, [&](int64_t k) {
    return keeps_all || top[k] >= threshold;
  });
  const Choices& choices = scratch.choices;
  each(count, kFinishGrain / kBlock, fork, [&, &stats = stats](int64_t first, int64_t last) {
    kernels.choose(row, stats, noise, first, last, scratch.blocks, choices);
  });
  const int64_t best = std::max_element(choices.merit, choices.merit + count) - choices.merit;
  token = choices.token[best];
  logprob = choices.logit[best] - kernels.log_mass(choices, count);
}

// The rows of a [N, V] tensor.
struct Matrix {
  char* data;
  int64_t rows, vocab, row_bytes;
  Dtype dtype;

  Logits operator[](int64_t i) const { return {data + i * row_bytes, dtype}; }
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

// A per-row argument: element i of a [N] tensor, or the scalar.
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

void check_alike(const Matrix& adapted, const Matrix& other, const char* name) {
  STD_TORCH_CHECK(other.rows == adapted.rows && other.vocab == adapted.vocab, name, " is [",
                  other.rows, ", ", other.vocab, "], adapted is [", adapted.rows, ", ",
                  adapted.vocab, "]");
}

// Threads share out whole rows, or each row in turn when there are too few to go round evenly.
template <class F>
void each_row(const Matrix& adapted, const F& f) {
  const int64_t threads = torch::stable::get_num_threads(), rows = adapted.rows;
  const bool split = rows < 4 * threads && rows % threads != 0 && adapted.vocab > kScanGrain;
  const int64_t grain = std::max<int64_t>(1, kScanGrain / std::max<int64_t>(1, adapted.vocab));
  each(rows, grain, threads > 1 && !split, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) f(i, threads > 1 && split);
  });
}

void steer(const Tensor adapted, const Tensor base, double strength,
           const std::optional<Tensor> strengths, double log_alpha, double penalty, Tensor out) {
  const Matrix z = matrix(adapted, "adapted"), b = matrix(base, "base"), o = matrix(out, "out");
  check_alike(z, b, "base");
  check_alike(z, o, "out");
  const auto mu = per_row(strengths, float(strength), z.rows, ScalarType::Float, "strengths");
  const bool stream = o.rows * o.row_bytes >= kStreamBytes;
  const Kernels& kernels = *kVariants[chosen];
  each_row(z, [&](int64_t i, bool fork) {
    const Steering by = {mu[i], float(log_alpha), float(penalty)};
    steer_row(kernels, {z[i], b[i], o[i], stream, z.vocab, by}, fork);
  });
}

void sample(const Tensor adapted, const Tensor base, double strength,
            const std::optional<Tensor> strengths, double log_alpha, double penalty,
            double temperature, int64_t seed, const std::optional<Tensor> seeds, int64_t position,
            const std::optional<Tensor> positions, Tensor token, Tensor logprob) {
  const Matrix z = matrix(adapted, "adapted"), b = matrix(base, "base");
  check_alike(z, b, "base");
  const auto mu = per_row(strengths, float(strength), z.rows, ScalarType::Float, "strengths");
  const auto seed_of = per_row(seeds, seed, z.rows, ScalarType::Long, "seeds");
  const auto position_of = per_row(positions, position, z.rows, ScalarType::Long, "positions");
  const auto tokens = per_row(std::optional(token), int64_t{0}, z.rows, ScalarType::Long, "token");
  const auto logprobs = per_row(std::optional(logprob), 0.0f, z.rows, ScalarType::Float, "logprob");
  const Kernels& kernels = *kVariants[chosen];
  each_row(z, [&](int64_t i, bool fork) {
    const Steering by = {mu[i], float(log_alpha), float(penalty)};
    const Row row = {z[i], b[i], {}, false, z.vocab, by};
    const Noise noise = {float(temperature), uint64_t(seed_of[i]), uint64_t(position_of[i])};
    sample_row(kernels, row, noise, fork, const_cast<int64_t*>(tokens.data)[i * tokens.stride],
               const_cast<float*>(logprobs.data)[i * logprobs.stride]);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY(svd_engine_native, m) {
  m.def(
      "steer(Tensor adapted, Tensor base, float strength, Tensor? strengths, float log_alpha, "
      "float penalty, Tensor(a!) out) -> ()");
  m.def(
      "sample(Tensor adapted, Tensor base, float strength, Tensor? strengths, float log_alpha, "
      "float penalty, float temperature, int seed, Tensor? seeds, int position, "
      "Tensor? positions, Tensor(a!) token, Tensor(b!) logprob) -> ()");
  m.def("capability(int limit) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(svd_engine_native, CPU, m) {
  m.impl("steer", TORCH_BOX(&steer));
  m.impl("sample", TORCH_BOX(&sample));
}

STABLE_TORCH_LIBRARY_IMPL(svd_engine_native, CompositeExplicitAutograd, m) {
  m.impl("capability", TORCH_BOX(&capability));
}
