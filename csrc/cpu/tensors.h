// Shared by the operators on float32 and bfloat16 tensors: checks, working memory, packed rows.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>

#include "kernels.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrainBytes = 64 << 10;  // of weights per thread: fewer are not worth waking one

// Working memory that is kept from call to call and aligned to a cache line.
class Scratch {
 public:
  char* of(int64_t bytes) {
    if (bytes > size_) {
      data_.reset(static_cast<char*>(std::aligned_alloc(64, bytes)));
      STD_TORCH_CHECK(data_ != nullptr, "out of memory");
      size_ = bytes;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(char* data) const { std::free(data); }
  };
  std::unique_ptr<char, Free> data_;
  int64_t size_ = 0;
};

Dtype dtype_of(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU");
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, name,
                  " must be float32 or bfloat16");
  return type == ScalarType::Float ? Dtype::kFloat32 : Dtype::kBFloat16;
}

int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

float as_float(uint16_t bfloat16) {
  const uint32_t bits = uint32_t(bfloat16) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

template <class From, class To>
void copy(const char* from, int64_t stride, int64_t count, char* to) {
  for (int64_t k = 0; k < count; ++k) {
    From x;
    std::memcpy(&x, from + k * stride * int64_t{sizeof x}, sizeof x);
    To y;
    if constexpr (std::is_same_v<From, To>)
      y = x;
    else
      y = as_float(x);
    std::memcpy(to + k * int64_t{sizeof y}, &y, sizeof y);
  }
}

int64_t packed_row_bytes(int64_t in, Dtype as) { return (in + 31) / 32 * 32 * size_of(as); }

// Copies a row to `to` in the form of a row of Packed (linear.h).
void pack_row(const char* from, Dtype dtype, int64_t stride, int64_t in, Dtype as, char* to) {
  if (dtype == Dtype::kFloat32)
    copy<float, float>(from, stride, in, to);
  else if (as == Dtype::kFloat32)
    copy<uint16_t, float>(from, stride, in, to);
  else
    copy<uint16_t, uint16_t>(from, stride, in, to);
  const int64_t filled = in * size_of(as);
  std::memset(to + filled, 0, packed_row_bytes(in, as) - filled);
}

}  // namespace
