// Many rows of x times a weight. A panel of kPanel outputs is copied to the L1 cache, kDepth inputs
// at a time, transposed and as float32; every row of x then meets it there, kTall rows at a time.
// An output is summed from the first input to the last, whatever the number of rows.

constexpr int kVectors = 3, kTall = 4;  // kVectors * kTall sums fill the registers
constexpr int kDepth = 96;  // the panel, the next one and rows of x fit in the L1 together
constexpr int kRowsAtOnce = 256;  // for each of these the weight is copied again

// Element (i, j) becomes element (j, i).
SVD_HD void transpose(__m256 (&v)[8]) {
  __m256 two[8], four[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    two[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
    two[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    four[i] = _mm256_shuffle_ps(two[i], two[i + 2], 0x44);
    four[i + 1] = _mm256_shuffle_ps(two[i], two[i + 2], 0xEE);
    four[i + 2] = _mm256_shuffle_ps(two[i + 1], two[i + 3], 0x44);
    four[i + 3] = _mm256_shuffle_ps(two[i + 1], two[i + 3], 0xEE);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_permute2f128_ps(four[i], four[i + 4], 0x20);
    v[i + 4] = _mm256_permute2f128_ps(four[i], four[i + 4], 0x31);
  }
}

// Where the inputs [k, k + depth) of the outputs from `output` on lie; past `end` the last repeats.
struct Block {
  Weight weight;
  int64_t output, end, k, depth;

  const char* row(int64_t i) const {
    return weight.data + (output + i < end ? output + i : end - 1) * weight.row_bytes;
  }
  bool is_last() const { return k + depth >= weight.in; }
  Block next() const {
    const int64_t from = is_last() ? 0 : k + depth, rest = weight.in - from;
    return {weight, is_last() ? output + kPanel : output, end, from, rest < kDepth ? rest : kDepth};
  }
};

template <class E>
SVD_HD void copy(const Block& block, float* panel) {
  for (int64_t first = 0; first < kPanel; first += kLanes) {
    const char* row[kLanes];
    for (int i = 0; i < kLanes; ++i) row[i] = block.row(first + i);
    for (int64_t k = 0; k < block.depth; k += kLanes) {
      __m256 v[kLanes];
#pragma GCC unroll 8
      for (int i = 0; i < kLanes; ++i)
        v[i] = (__m256)get<E>(row[i], block.k + k, block.weight.in);
      transpose(v);
#pragma GCC unroll 8
      for (int i = 0; i < kLanes; ++i) store(panel + (k + i) * kPanel + first, v[i]);
    }
  }
}

// Brings a block to the cache while the one before it is multiplied, a part of it at a time.
class Ahead {
 public:
  explicit Ahead(const Block& block)
      : block_(block), lines_((block.depth * size() + 63) / 64), left_(lines_ * kPanel) {
    if (block.output >= block.end) left_ = 0;
  }
  void fetch(int64_t tiles) {  // as many tiles are left
    for (int64_t count = (left_ + tiles - 1) / tiles; count > 0; --count, --left_) {
      __builtin_prefetch(block_.row(row_) + block_.k * size() + line_ * 64);
      if (++line_ == lines_) line_ = 0, ++row_;
    }
  }

 private:
  int64_t size() const { return block_.weight.dtype == Dtype::kFloat32 ? 4 : 2; }
  const Block block_;
  const int64_t lines_;
  int64_t left_, row_ = 0, line_ = 0;
};

// sums[i] += x[i] . panel for R rows.
template <int R>
SVD_HD void add_tile(const float* x, int64_t stride, const float* panel, int64_t depth,
                     float* sums) {
  Vec sum[R][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k, panel += kPanel) {
    Vec w[kVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) w[v] = load<Vec>(panel + v * kLanes);
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      const Vec factor = (Vec)_mm256_broadcast_ss(x + i * stride + k);
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) sum[i][v] += factor * w[v];
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) {
      float* to = sums + i * kPanel + v * kLanes;
      store(to, load<Vec>(to) + sum[i][v]);
    }
}

template <int R = kTall>
SVD_HD void add_rows(int64_t rows, const float* x, int64_t stride, const float* panel,
                     int64_t depth, float* sums) {
  if constexpr (R > 1)
    if (rows < R) return add_rows<R - 1>(rows, x, stride, panel, depth, sums);
  add_tile<R>(x, stride, panel, depth, sums);
}

// sums[i] += x[i] . weight for some rows and the kPanel outputs from `output` on.
template <class E>
void add_panel(const Weight& weight, int64_t output, int64_t end, const float* x, int64_t stride,
               int64_t rows, float* sums) {
  alignas(64) float panel[kDepth * kPanel];
  Block block = {weight, output, end, 0, weight.in < kDepth ? weight.in : kDepth};
  for (bool is_last = false; !is_last; block = block.next()) {
    is_last = block.is_last();
    copy<E>(block, panel);
    Ahead ahead(block.next());
    for (int64_t row = 0; row < rows; row += kTall) {
      ahead.fetch((rows - row + kTall - 1) / kTall);
      add_rows(rows - row, x + row * stride + block.k, stride, panel, block.depth,
               sums + row * kPanel);
    }
  }
}

SVD_HD void add_panel(const Weight& weight, int64_t output, int64_t end, const float* x,
                      int64_t stride, int64_t rows, float* sums) {
  if (weight.dtype == Dtype::kFloat32)
    add_panel<Float32>(weight, output, end, x, stride, rows, sums);
  else
    add_panel<BFloat16>(weight, output, end, x, stride, rows, sums);
}

template <class E>
SVD_HD void write_panel(const Product& p, int64_t row, int64_t output, int64_t end,
                        const float* sums, const float* bias) {
  char* to = p.out + row * p.out_row_bytes;
  for (int64_t i = 0; i < kPanel && output + i < end; i += kLanes)
    put<E>(to, output + i, end, load<Vec>(sums + i) + load<Vec>(bias + i));
}

// Computes the outputs [begin, end) of many rows, which are packed as float32.
void panels(const Product& p, int64_t begin, int64_t end) {
  alignas(64) float sums[kRowsAtOnce * kPanel];
  const int64_t stride = p.x.row_bytes / 4;
  for (int64_t from = 0; from < p.rows; from += kRowsAtOnce) {
    const int64_t rows = p.rows - from < kRowsAtOnce ? p.rows - from : kRowsAtOnce;
    const int64_t plain = p.first_adapted < from            ? 0
                          : p.first_adapted < from + rows ? p.first_adapted - from
                                                          : rows;
    for (int64_t output = begin; output < end; output += kPanel) {
      std::memset(sums, 0, rows * kPanel * 4);
      const float* x = reinterpret_cast<const float*>(p.x.data) + from * stride;
      add_panel(p.weight, output, end, x, stride, rows, sums);
      if (plain < rows)
        add_panel(p.up, output, end, p.down_x + (from + plain - p.first_adapted) * p.down_x_stride,
                  p.down_x_stride, rows - plain, sums + plain * kPanel);
      float bias[2][kPanel] = {};  // of the plain and of the adapted rows
      for (int64_t i = 0; i < kPanel && output + i < end; ++i) {
        if (p.bias.data) bias[0][i] = value(p.bias, output + i);
        bias[1][i] = bias[0][i];
        if (p.up_bias.data) bias[1][i] += value(p.up_bias, output + i);
      }
      for (int64_t row = 0; row < rows; ++row) {
        const float *sum = sums + row * kPanel, *added = bias[row >= plain];
        if (p.out_dtype == Dtype::kFloat32)
          write_panel<Float32>(p, from + row, output, end, sum, added);
        else
          write_panel<BFloat16>(p, from + row, output, end, sum, added);
      }
    }
  }
}
