// torch.ops.svd_engine_cpu.rms_norm, rotate and attend: a decode step between its linear layers.
#include "step.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "attend.h"
#include "capability.h"

namespace {

const StepKernel* const kVariants[] = {
    &portable::step,
#ifdef SVD_X86_VARIANTS
    &avx2::step,
    &avx512::step,
    &avx512::step,  // for AVX512_BF16 too: only `linear` multiplies bfloat16
#endif
};

}  // namespace

const StepKernel& step_in_use() { return *kVariants[capability_in_use()]; }

namespace {

// A [a, b, c, n] tensor as rows of n elements.
struct Grid {
  char* data;
  int64_t size[4], stride_bytes[4];
  Dtype dtype;

  char* at(int64_t i, int64_t j) const {
    return data + i * stride_bytes[0] + j * stride_bytes[1];
  }
};

Grid grid(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 4, name, " must have 4 dimensions, got ", tensor.dim());
  STD_TORCH_CHECK(tensor.stride(3) == 1 || tensor.size(3) <= 1, name,
                  " must have stride 1 along its last dimension, got ", tensor.stride(3));
  Grid result = {static_cast<char*>(tensor.data_ptr()), {}, {}, dtype_of(tensor, name)};
  for (int d = 0; d < 4; ++d) {
    result.size[d] = tensor.size(d);
    result.stride_bytes[d] = tensor.stride(d) * size_of(result.dtype);
  }
  return result;
}

void check_size(const Grid& grid, const char* name, int64_t a, int64_t b, int64_t c, int64_t n) {
  STD_TORCH_CHECK(grid.size[0] == a && grid.size[1] == b && grid.size[2] == c && grid.size[3] == n,
                  name, " must be [", a, ", ", b, ", ", c, ", ", n, "], got [", grid.size[0], ", ",
                  grid.size[1], ", ", grid.size[2], ", ", grid.size[3], "]");
}

void rms_norm(const Tensor x, const Tensor weight, double eps, double offset, bool rounded_between,
              Tensor out) {
  const Dtype dtype = dtype_of(x, "x");
  STD_TORCH_CHECK(weight.dim() == 1 && weight.is_contiguous(), "weight must be [n], contiguous");
  STD_TORCH_CHECK(x.is_contiguous() && out.is_contiguous(), "x and out must be contiguous");
  STD_TORCH_CHECK(dtype_of(weight, "weight") == dtype && dtype_of(out, "out") == dtype,
                  "x, weight and out must have one dtype");
  const int64_t n = weight.size(0), count = x.numel();
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == n && out.numel() == count,
                  "x and out must be [..., n] with n = ", n);
  const StepKernel& kernel = step_in_use();
  const Norm norm = {static_cast<const char*>(weight.data_ptr()), n, float(eps), float(offset),
                     rounded_between, dtype};
  const char* from = static_cast<const char*>(x.data_ptr());
  char* to = static_cast<char*>(out.data_ptr());
  const int64_t bytes = count * size_of(dtype);
  for (int64_t at = 0; at < bytes; at += n * size_of(dtype))
    kernel.rms_norm(norm, from + at, to + at);
}

void rotate(const Tensor x, const Tensor cos, const Tensor sin, Tensor out) {
  const Grid from = grid(x, "x"), to = grid(out, "out");
  const int64_t rows = from.size[0], heads = from.size[1], dim = from.size[3];
  STD_TORCH_CHECK(from.size[2] == 1 && dim % 2 == 0, "x must be [rows, heads, 1, even]");
  check_size(to, "out", rows, heads, 1, dim);
  const Grid c = grid(cos, "cos"), s = grid(sin, "sin");
  check_size(c, "cos", rows, 1, 1, dim);
  check_size(s, "sin", rows, 1, 1, dim);
  STD_TORCH_CHECK(to.dtype == from.dtype && c.dtype == from.dtype && s.dtype == from.dtype,
                  "x, cos, sin and out must have one dtype");
  const StepKernel& kernel = step_in_use();
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t head = 0; head < heads; ++head)
      kernel.rotate(from.dtype, dim, from.at(row, head), c.at(row, 0), s.at(row, 0),
                    to.at(row, head));
}

void attend(const Tensor query, const Tensor key, const Tensor value,
            const std::optional<Tensor> mask, double scale, double softcap, Tensor out) {
  const Grid q = grid(query, "query"), k = grid(key, "key"), v = grid(value, "value");
  const Grid o = grid(out, "out");
  const int64_t rows = q.size[0], heads = q.size[1], dim = q.size[3];
  const int64_t kv_heads = k.size[1], slots = k.size[2], out_dim = v.size[3];
  STD_TORCH_CHECK(q.size[2] == 1, "query must be [rows, heads, 1, dim]");
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, heads, " heads of query, ", kv_heads,
                  " of key");
  check_size(k, "key", rows, kv_heads, slots, dim);
  check_size(v, "value", rows, kv_heads, slots, out_dim);
  check_size(o, "out", rows, 1, heads, out_dim);
  STD_TORCH_CHECK(out.is_contiguous(), "out must be contiguous");
  STD_TORCH_CHECK(k.dtype == q.dtype && v.dtype == q.dtype && o.dtype == q.dtype,
                  "query, key, value and out must have one dtype");
  Grid hidden = {};
  if (mask) {
    hidden = grid(*mask, "mask");
    check_size(hidden, "mask", rows, 1, 1, slots);
  }

  const LinearKernel& linear = linear_in_use();
  const StepKernel& kernel = step_in_use();
  const int64_t group = heads / kv_heads;
  const int64_t bytes = slots * (dim + out_dim) * size_of(q.dtype);
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, bytes));
  torch::stable::parallel_for(0, rows * kv_heads, grain, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t row = unit / kv_heads, head = unit % kv_heads;
      const KeysAndValues kv = {k.at(row, head),   v.at(row, head), k.stride_bytes[2],
                                v.stride_bytes[2], slots,           dim,
                                out_dim,           q.dtype};
      const Softmax softmax = {float(scale), float(softcap), mask ? hidden.at(row, 0) : nullptr,
                               hidden.dtype};
      attend_group(linear, kernel, kv, softmax, q.at(row, head * group), q.stride_bytes[1], group,
                   scratch, o.at(row, 0) + head * group * o.stride_bytes[2]);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(svd_engine_cpu, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, float offset, bool rounded_between, "
        "Tensor(a!) out) -> ()");
  m.def("rotate(Tensor x, Tensor cos, Tensor sin, Tensor(a!) out) -> ()");
  m.def("attend(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, "
        "float softcap, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(svd_engine_cpu, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rotate", TORCH_BOX(&rotate));
  m.impl("attend", TORCH_BOX(&attend));
}
