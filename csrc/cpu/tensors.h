// Shared by the operators on float32 and bfloat16 tensors: checks and working memory.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>
#include <cstring>
#include <memory>

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

}  // namespace
