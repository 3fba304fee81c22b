// torch.ops.svd_engine_cpu.unpack: quantised weights as numbers.
#include "codes.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "tensors.h"

namespace {

template <class T>
T narrowed(float value) {
  if constexpr (sizeof(T) == 4) {
    return value;
  } else {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return T((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  }
}

// Writes elements of one row.
template <Format F, class T>
void unpack_row(const char* codes, int64_t in, T* out) {
  typedef Codes<F> C;
  float whole = 1;
  if constexpr (F == Format::kInt8) std::memcpy(&whole, codes, 4);
  codes += C::kHeader;
  for (int64_t k = 0; k < in; k += C::kBlock, codes += C::kBytes) {
    Floats8 scales = {};
    if constexpr (F == Format::kInt8)
      scales += whole;
    else
      scales = int4_scales(codes);
    uint32_t words[8];
    std::memcpy(words, codes + C::kCodes, 32);
    float values[C::kBlock];
    for (int f = 0; f < C::kBlock / 8; ++f)
      for (int l = 0; l < 8; ++l) {
        int32_t code;
        if constexpr (F == Format::kInt8)
          code = static_cast<signed char>(codes[8 * f + l]);
        else
          code = int32_t(words[l] << (28 - 4 * f)) >> 28;
        values[8 * f + l] = float(code) * scales[l];
      }
    const int64_t count = std::min<int64_t>(C::kBlock, in - k);
    for (int64_t i = 0; i < count; ++i) out[k + i] = narrowed<T>(values[i]);
  }
}

template <Format F, class T>
void unpack_rows(const Tensor& codes, Tensor& out) {
  const int64_t in = out.size(1), row_bytes = codes.stride(0);
  const char* from = static_cast<const char*>(codes.data_ptr());
  T* to = static_cast<T*>(out.data_ptr());
  torch::stable::parallel_for(0, out.size(0), 1 + kGrainBytes / row_bytes,
                              [&](int64_t begin, int64_t end) {
                                for (int64_t row = begin; row < end; ++row)
                                  unpack_row<F>(from + row * row_bytes, in, to + row * in);
                              });
}

void unpack(const Tensor codes, int64_t bits, Tensor out) {
  STD_TORCH_CHECK(codes.is_cpu() && codes.scalar_type() == ScalarType::Byte && codes.dim() == 2 &&
                      codes.stride(1) == 1,
                  "codes must be uint8 [out, bytes] on the CPU");
  STD_TORCH_CHECK(bits == 8 || bits == 4, "bits must be 8 or 4, got ", bits);
  STD_TORCH_CHECK(out.dim() == 2 && out.is_contiguous() && out.size(0) == codes.size(0),
                  "out must be [out, in], contiguous");
  const int64_t in = out.size(1);
  const int64_t bytes = bits == 8 ? 4 + (in + 31) / 32 * 32 : (in + 63) / 64 * 36;
  STD_TORCH_CHECK(codes.size(1) == bytes, "rows of ", in, " elements take ", bytes, " bytes, got ",
                  codes.size(1));
  const bool wide = size_of(dtype_of(out, "out")) == 4;
  if (bits == 8)
    wide ? unpack_rows<Format::kInt8, float>(codes, out)
         : unpack_rows<Format::kInt8, uint16_t>(codes, out);
  else
    wide ? unpack_rows<Format::kInt4, float>(codes, out)
         : unpack_rows<Format::kInt4, uint16_t>(codes, out);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(svd_engine_cpu, m) {
  m.def("unpack(Tensor codes, int bits, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(svd_engine_cpu, CPU, m) { m.impl("unpack", TORCH_BOX(&unpack)); }
