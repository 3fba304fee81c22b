// The interface of the library: plain C functions of device pointers and a stream. It does not
// depend on PyTorch, loads without a driver, allocates nothing and never waits for the device. The
// functions of an operator return a cudaError_t. `dtype` is 0, 1, 2 for float32, bfloat16, float16.
#include "choose.h"
#include "score.h"

#define SVD_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// Calls f with a value of the type that `dtype` stands for.
template <class F>
cudaError_t with_type(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat32: return f(float{});
    case Dtype::kBFloat16: return f(__nv_bfloat16{});
    case Dtype::kFloat16: return f(__half{});
  }
  return cudaErrorInvalidValue;
}

// Calls f with a value of each row's type and with std::true_type if 16-byte accesses fit.
template <class F>
cudaError_t with_types(const Rows& rows, bool aligned, const F& f) {
  return with_type(rows.adapted.dtype, [&](auto a) {
    return with_type(rows.base.dtype, [&](auto b) {
      return aligned ? f(a, b, std::true_type{}) : f(a, b, std::false_type{});
    });
  });
}

// Whether 16-byte accesses fit every row. The number of rows plays no part, so that a row's result
// cannot depend on it.
bool is_aligned(const Logits& logits, int vocab) {
  const int64_t size = logits.dtype == Dtype::kFloat32 ? 4 : 2;
  return reinterpret_cast<uintptr_t>(logits.data) % 16 == 0 && logits.stride * size % 16 == 0 &&
         vocab % kRun == 0;
}

template <class Argument>
cudaError_t launch(void (*kernel)(Argument), int64_t blocks, int threads, bool overlap,
                   cudaStream_t stream, const Argument& argument) {
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, argument);
}

// Makes `device` current for the calling thread, and the previous one again when destroyed.
class Current {
 public:
  explicit Current(int device) {
    error = cudaGetDevice(&before_);
    if (error == cudaSuccess && before_ != device) {
      error = cudaSetDevice(device);
      moved_ = error == cudaSuccess;
    }
    int major = 0;
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    overlaps = major >= 9;
  }
  ~Current() {
    if (moved_) cudaSetDevice(before_);
    if (error != cudaSuccess) cudaGetLastError();  // it is returned: clear it for later calls
  }
  cudaError_t error;
  bool overlaps;  // the second pass may start before the first ends

 private:
  int before_ = 0;
  bool moved_ = false;
};

Rows make_rows(const Logits& adapted, const Logits& base, int vocab, void* workspace) {
  return {adapted, base, vocab, (vocab + kTile - 1) / kTile,
          is_aligned(adapted, vocab) && is_aligned(base, vocab), workspace};
}

// Launches the first pass, into sums of type S, and then `second_pass(overlap)`.
template <class S, class F>
cudaError_t run(const Rows& rows, int64_t count, int device, cudaStream_t stream,
                const F& second_pass) {
  Current current(device);
  if (current.error != cudaSuccess) return current.error;
  current.error = with_types(rows, rows.aligned, [&](auto a, auto b, auto vectors) {
    return launch(measure_tiles<decltype(a), decltype(b), decltype(vectors)::value, S>,
                  count * rows.tiles, kStreamThreads, false, stream, rows);
  });
  if (current.error == cudaSuccess) current.error = second_pass(current.overlaps);
  return current.error;
}

cudaError_t run_steer(Steer to, int64_t count, int device, cudaStream_t stream) {
  const Rows& rows = to.of.rows;
  // `combine` costs a thread block as much as a tile or two; with many rows, blocks of several
  // tiles spread that cost.
  const int64_t tiles = count * rows.tiles;
  to.span = tiles < 2048 ? 1 : tiles < 8192 ? 2 : 4;
  const int64_t blocks = count * ((rows.tiles + to.span - 1) / to.span);
  const bool aligned = rows.aligned && is_aligned(to.out, rows.vocab);
  return run<Sums>(rows, count, device, stream, [&](bool overlap) {
    return with_types(rows, aligned, [&](auto a, auto b, auto vectors) {
      return launch(steer_tiles<decltype(a), decltype(b), decltype(vectors)::value>, blocks,
                    kStreamThreads, overlap, stream, to);
    });
  });
}

// Runs an operator whose second pass has a thread block per row.
template <class S = Sums, class To>
cudaError_t run_rows(const To& to, int64_t count, int device, cudaStream_t stream) {
  return run<S>(to.of.rows, count, device, stream, [&](bool overlap) {
    return launch(answer_rows<To>, count, kWalkThreads, overlap, stream, to);
  });
}

}  // namespace

SVD_EXPORT int svd_cuda_tile() { return kTile; }

// Bytes of workspace per tile. The workspace is aligned to 16 bytes and need not be initialised.
SVD_EXPORT int svd_cuda_tile_bytes() { return sizeof(PairSums); }

SVD_EXPORT const char* svd_cuda_error(int code) {
  return cudaGetErrorName(static_cast<cudaError_t>(code));
}

// Whether the current device can run the kernels of this library.
SVD_EXPORT int svd_cuda_probe() {
  cudaFuncAttributes attributes;
  const cudaError_t error =
      cudaFuncGetAttributes(&attributes, measure_tiles<float, float, true, Sums>);
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

// `strengths`, `seeds` and `positions` hold one number per row, or are null: then the scalar beside
// them is that of every row.
#define SVD_INPUTS                                                                          \
  void *adapted, int64_t adapted_stride, int adapted_dtype, void *base, int64_t base_stride, \
      int base_dtype, int64_t rows, int vocab
#define SVD_STEERING \
  const float *strengths, float strength, float log_alpha, float penalty, int difference
#define SVD_OUT void *out, int64_t out_stride, int out_dtype
#define SVD_WHERE void *workspace, int device, cudaStream_t stream

#define SVD_ROWS                                              \
  make_rows({adapted, adapted_stride, Dtype(adapted_dtype)},  \
            {base, base_stride, Dtype(base_dtype)}, vocab, workspace)
#define SVD_STEERED {SVD_ROWS, {strengths, strength}, log_alpha, penalty, !difference}
#define SVD_UNSTEERED(log_alpha, penalty) \
  {SVD_ROWS, {nullptr, 0.0f}, log_alpha, penalty, !difference}

SVD_EXPORT int svd_cuda_steer(SVD_INPUTS, SVD_STEERING, SVD_OUT, SVD_WHERE) {
  const Steer to = {SVD_STEERED, {out, out_stride, Dtype(out_dtype)}, 1, false};
  return run_steer(to, rows, device, stream);
}

SVD_EXPORT int svd_cuda_steering_vector(SVD_INPUTS, int difference, SVD_OUT, SVD_WHERE) {
  const Steered whole = SVD_UNSTEERED(-INFINITY, 0.0f);
  const Steer to = {whole, {out, out_stride, Dtype(out_dtype)}, 1, true};
  return run_steer(to, rows, device, stream);
}

SVD_EXPORT int svd_cuda_sample(SVD_INPUTS, SVD_STEERING, float temperature, int top_k, float top_p,
                               float log_min_p, const int64_t* seeds, int64_t seed,
                               const int64_t* positions, int64_t position, int64_t* token,
                               float* logprob, SVD_WHERE) {
  const Sample to = {SVD_STEERED, temperature, top_k, top_p, log_min_p, {seeds, seed},
                     {positions, position}, token, logprob};
  const bool cut = temperature > 0.0f &&
                   (top_k < INT_MAX || top_p < INFINITY || log_min_p > -INFINITY);
  return cut ? run_rows(CutSample{to}, rows, device, stream) : run_rows(to, rows, device, stream);
}

SVD_EXPORT int svd_cuda_topk(SVD_INPUTS, SVD_STEERING, int k, float* logprob, int64_t* token,
                             SVD_WHERE) {
  return run_rows(TopK{SVD_STEERED, k, logprob, token}, rows, device, stream);
}

SVD_EXPORT int svd_cuda_score(SVD_INPUTS, SVD_STEERING, const int64_t* target, float* logprob,
                              SVD_WHERE) {
  return run_rows(Score{SVD_STEERED, target, logprob}, rows, device, stream);
}

SVD_EXPORT int svd_cuda_project_strength(SVD_INPUTS, float log_alpha, int difference,
                                         const int64_t* target, float* numerator,
                                         float* gauss_newton, float* newton, bool* in_support,
                                         SVD_WHERE) {
  const Project to = {SVD_UNSTEERED(log_alpha, -INFINITY), target, numerator, gauss_newton, newton,
                      in_support};
  return run_rows(to, rows, device, stream);
}

SVD_EXPORT int svd_cuda_support(SVD_INPUTS, float log_alpha, int difference, const int64_t* target,
                                int capacity, int64_t* token, float* p, float* delta, float* logp,
                                float* logq, float* mean_d, float* divergence, int64_t* size,
                                SVD_WHERE) {
  const Support to = {SVD_UNSTEERED(log_alpha, -INFINITY), target, capacity, token, p, delta, logp,
                      logq, mean_d, divergence, size};
  return run_rows<PairSums>(to, rows, device, stream);
}

SVD_EXPORT int svd_cuda_divergence(SVD_INPUTS, float* out, SVD_WHERE) {
  const Diverge to = {SVD_ROWS, out};
  return run<PairSums>(to.rows, rows, device, stream, [&](bool overlap) {
    return launch(answer_rows<Diverge>, rows, kWarp, overlap, stream, to);
  });
}
