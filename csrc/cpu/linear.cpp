// torch.ops.svd_engine_cpu.linear: a linear layer of a few rows that reads the weight once.
#include "linear.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <initializer_list>
#include <optional>

#include "capability.h"
#include "crew.h"
#include "tensors.h"

namespace {

const LinearKernel* const kVariants[] = {
    &portable::linear,
#ifdef SVD_X86_VARIANTS
    &avx2::linear,
    &avx512::linear,
    &avx512_bf16::linear,
#endif
};

}  // namespace

const LinearKernel& linear_in_use() { return *kVariants[capability_in_use()]; }

namespace {

Weight weight_of(const Tensor& tensor, const char* name) {
  const Dtype dtype = dtype_of(tensor, name);
  STD_TORCH_CHECK(tensor.dim() == 2, name, " must be [out, in], got ", tensor.dim(),
                  " dimensions");
  const int64_t out = tensor.size(0), in = tensor.size(1);
  STD_TORCH_CHECK(tensor.stride(1) == 1 || in <= 1, name, " must have stride 1 along in, got ",
                  tensor.stride(1));
  return {static_cast<const char*>(tensor.data_ptr()), tensor.stride(0) * size_of(dtype), out, in,
          dtype};
}

Bias bias_of(const std::optional<Tensor>& tensor, int64_t out, const char* name) {
  if (!tensor) return {};
  const Dtype dtype = dtype_of(*tensor, name);
  STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == out, name, " must be [out] with out = ",
                  out);
  return {static_cast<const char*>(tensor->data_ptr()), tensor->stride(0) * size_of(dtype), dtype};
}

// Widening bfloat16 for every two rows anew takes longer than copying it once as float32.
bool takes_panels(const LinearKernel& kernel, Dtype weight, int64_t rows) {
  return kernel.panels && rows > (weight == Dtype::kBFloat16 ? 2 : kFewRows);
}

// x [..., in] as rows.
struct Rows {
  const Tensor& tensor;
  Dtype dtype;
  int64_t count, in;

  explicit Rows(const Tensor& x) : tensor(x), dtype(dtype_of(x, "x")), count(1) {
    STD_TORCH_CHECK(x.dim() >= 1, "x must be [..., in], got 0 dimensions");
    const auto sizes = x.sizes();
    in = sizes[sizes.size() - 1];
    for (size_t d = 0; d + 1 < sizes.size(); ++d) count *= sizes[d];
  }

  // Packs rows [begin, count) at `to`, to be multiplied by weights of dtype `as`.
  Packed pack(const LinearKernel& kernel, int64_t begin, Dtype as, char* to) const {
    const int64_t row_bytes = packed_row_bytes(in);
    const int64_t grain = std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, row_bytes));
    torch::stable::parallel_for(begin, count, grain, [&](int64_t first, int64_t end) {
      for (int64_t row = first; row < end; ++row)
        pack_row(kernel, row, as, to + (row - begin) * row_bytes);
    });
    return {to, row_bytes, kernel.packs_bfloat16(dtype, as)};
  }

  // The rows as `panels` takes them, where they are or at `to`.
  Packed wide(const LinearKernel& kernel, char* to) const {
    if (dtype == Dtype::kFloat32 && tensor.is_contiguous())
      return {static_cast<const char*>(tensor.data_ptr()), in * 4, false};
    return pack(kernel, 0, Dtype::kFloat32, to);
  }

 private:
  void pack_row(const LinearKernel& kernel, int64_t row, Dtype as, char* to) const {
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    const int64_t size = size_of(dtype);
    const int last = int(sizes.size()) - 1;
    int64_t offset = 0, rest = row;
    for (int d = last - 1; d >= 0; rest /= sizes[d--]) offset += rest % sizes[d] * strides[d];
    const char* from = static_cast<const char*>(tensor.data_ptr()) + offset * size;
    if (strides[last] == 1 || in <= 1) return kernel.pack(dtype, in, from, as, to);
    thread_local Scratch scratch;
    char* whole = scratch.of(in * size);
    for (int64_t k = 0; k < in; ++k)
      std::memcpy(whole + k * size, from + k * strides[last] * size, size);
    kernel.pack(dtype, in, whole, as, to);
  }
};

// Computes products one after the other; each may take the results of those before it.
void multiply(const LinearKernel& kernel, std::initializer_list<const Product*> products,
              bool panels) {
  const int64_t unit = panels ? kPanel : 1;
  const auto run = panels ? kernel.panels : kernel.outputs;
  const auto bytes_of = [](const Product& p) { return p.weight.in * size_of(p.weight.dtype); };
  int64_t bytes = 0;
  for (const Product* p : products) bytes += p->weight.out * bytes_of(*p);
  const int64_t threads =
      std::clamp<int64_t>(bytes / kGrainBytes, 1, torch::stable::get_num_threads());
  Phase phases[2];
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    Crew crew(phases, threads);
    for (const Product* p : products) {
      const int64_t out = p->weight.out, least = kGrainBytes / (unit * bytes_of(*p) + 1);
      crew.share((out + unit - 1) / unit, std::max<int64_t>(1, least),
                 [&](int64_t begin, int64_t end) {
                   run(*p, begin * unit, std::min(end * unit, out));
                 });
    }
  });
}

void linear(const Tensor x, const Tensor weight, const std::optional<Tensor> bias,
            const std::optional<Tensor> down, const std::optional<Tensor> up,
            const std::optional<Tensor> up_bias, int64_t first_adapted, Tensor out) {
  thread_local Scratch scratch;
  const LinearKernel& kernel = linear_in_use();
  const Rows rows(x);
  const Weight w = weight_of(weight, "weight");
  STD_TORCH_CHECK(w.in == rows.in, "weight is [", w.out, ", ", w.in, "], x has ", rows.in,
                  " columns");
  STD_TORCH_CHECK(w.dtype == rows.dtype && dtype_of(out, "out") == rows.dtype,
                  "x, weight and out must have one dtype");
  STD_TORCH_CHECK(out.is_contiguous() && out.numel() == rows.count * w.out,
                  "out must be contiguous, of ", rows.count, " rows of ", w.out);
  STD_TORCH_CHECK(first_adapted >= 0 && down.has_value() == up.has_value(),
                  "low rank needs down, up and first_adapted >= 0");

  const int64_t adapted = down ? std::max<int64_t>(0, rows.count - first_adapted) : 0;
  Product product = {};
  product.weight = w;
  product.bias = bias_of(bias, w.out, "bias");
  product.rows = rows.count;
  product.first_adapted = rows.count - adapted;
  product.out = static_cast<char*>(out.data_ptr());
  product.out_row_bytes = w.out * size_of(rows.dtype);
  product.out_dtype = rows.dtype;
  const int64_t x_row_bytes = packed_row_bytes(w.in);
  const bool panels = takes_panels(kernel, w.dtype, rows.count);
  const auto packed = [&](char* to) {
    return panels ? rows.wide(kernel, to) : rows.pack(kernel, 0, w.dtype, to);
  };
  if (!adapted) {
    product.x = packed(scratch.of(rows.count * x_row_bytes));
    return multiply(kernel, {&product}, panels);
  }

  const Weight down_weight = weight_of(*down, "down"), up_weight = weight_of(*up, "up");
  STD_TORCH_CHECK(down_weight.in == w.in && up_weight.out == w.out &&
                      down_weight.out == up_weight.in,
                  "down is [", down_weight.out, ", ", down_weight.in, "] and up is [",
                  up_weight.out, ", ", up_weight.in, "], weight is [", w.out, ", ", w.in, "]");
  const bool repacked = !panels && down_weight.dtype != w.dtype;  // `down` takes x in another form
  const int64_t down_x_stride = (down_weight.out + 31) / 32 * 32;
  const int64_t x_rows = rows.count + (repacked ? adapted : 0);
  char* room = scratch.of(x_rows * x_row_bytes + adapted * down_x_stride * 4);
  product.x = packed(room);
  char* down_x = room + x_rows * x_row_bytes;
  std::memset(down_x, 0, adapted * down_x_stride * 4);
  product.down_x = reinterpret_cast<const float*>(down_x);
  product.down_x_stride = down_x_stride;
  product.up = up_weight;
  product.up_bias = bias_of(up_bias, w.out, "up_bias");

  Product down_product = {};
  down_product.x = repacked ? rows.pack(kernel, product.first_adapted, down_weight.dtype,
                                        room + rows.count * x_row_bytes)
                            : product.x.from(product.first_adapted);
  down_product.weight = down_weight;
  down_product.rows = down_product.first_adapted = adapted;
  down_product.out = down_x;
  down_product.out_row_bytes = down_x_stride * 4;
  down_product.out_dtype = Dtype::kFloat32;
  multiply(kernel, {&down_product, &product}, panels);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(svd_engine_cpu, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, Tensor? down, Tensor? up, "
        "Tensor? up_bias, int first_adapted, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(svd_engine_cpu, CPU, m) { m.impl("linear", TORCH_BOX(&linear)); }
