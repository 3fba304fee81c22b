// torch.ops.svd_engine_cpu.decode: new tokens of a decoder, from their embeddings to hidden states or
// logits, in one parallel region. A token's bits depend neither on the threads, nor on the number of
// rows, nor on that of new tokens per row, but for whether either is greater than kFewRows.
#include "decoder.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <chrono>
#include <initializer_list>
#include <optional>

#include "attend.h"
#include "capability.h"
#include "crew.h"

namespace {

constexpr int kJoined = 3;            // linear layers that read the same input
constexpr int kPhasesPerLayer = 20;  // no fewer than `layer` passes
constexpr int64_t kLeastBytes = 32 << 10;  // of weights that a thread takes at once

template <class T = const char>
T* at(int64_t address) {
  return reinterpret_cast<T*>(address);
}

Dtype other_than(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? Dtype::kBFloat16 : Dtype::kFloat32;
}

// What all threads share.
struct Step {
  const DecoderPlan& plan;
  const LayerCache* caches;
  const char* inputs;
  const int64_t* positions;  // [rows], the slot of each row's first new token
  int64_t rows, length;      // new tokens per row
  int64_t first_adapted;     // token
  char* hidden;              // [tokens, hidden_size]
  char* logits;              // [tokens, vocabulary], or null
  const LinearKernel& linear;
  const StepKernel& kernel;
  Dtype dtype;
  bool panels;          // a large batch or a prompt: linear layers go panel by panel
  Dtype packed;         // the dtype beside which inputs are packed
  int64_t size;         // bytes of an element
  bool repacks;         // some adapter has another dtype than that
  char* residual;       // [tokens, hidden_size]
  char* buffers[kJoined];  // [tokens, widest], outputs of joined layers
  char* attended;          // [tokens, widest]
  char* x;                 // packed inputs
  char* other;             // those of the adapted tokens, for adapters of the other dtype
  float* down_x[kJoined];  // [adapted tokens, rank]
  int64_t widest;          // elements

  int64_t tokens() const { return rows * length; }
  int64_t adapted() const { return tokens() - first_adapted; }
};

enum Part { kLinear, kAttention, kRest, kParts };  // of a step's time

class Worker {
 public:
  // seconds: [kParts], to which the time of each part is added, or null.
  Worker(const Step& step, Phase* phases, int64_t threads, double* seconds)
      : s(step), crew(phases, threads), seconds(seconds) {
    if (seconds) last = Clock::now();
  }

  void run() {
    const int64_t bytes = s.plan.hidden_size * s.size;
    crew.each(s.tokens(), [&](int64_t token) {
      std::memcpy(s.residual + token * bytes, s.inputs + token * bytes, bytes);
    });
    for (int64_t i = 0; i < s.plan.layers; ++i) layer(s.plan.layer[i], s.caches[i]);
    crew.each(s.tokens(), [&](int64_t token) {
      norm(s.plan.norm, s.residual + token * bytes, s.hidden + token * bytes);
      if (s.logits) pack(token, s.hidden + token * bytes, s.plan.hidden_size);
    });
    lap(kRest);
    if (s.logits) joined({&s.plan.head}, s.logits, s.plan.head.out);
    lap(kLinear);
  }

 private:
  typedef std::chrono::steady_clock Clock;

  // Adds the time since the last call to a part.
  void lap(Part part) {
    if (!seconds) return;
    const auto now = Clock::now();
    seconds[part] += std::chrono::duration<double>(now - last).count();
    last = now;
  }

  void layer(const LayerPlan& l, const LayerCache& cache) {
    each_token([&](int64_t token) { pack_normal(l.attention_norm, token, l.query); });
    lap(kRest);
    joined({&l.query, &l.key, &l.value});
    lap(kLinear);
    attend(l, cache);
    lap(kAttention);
    each_token([&](int64_t token) {
      pack(token, scaled(l.output, token, row(s.attended, token)), l.output.in);
    });
    lap(kRest);
    joined({&l.output});
    lap(kLinear);
    each_token([&](int64_t token) {
      add(l, l.attended_norm, token);
      pack_normal(l.feedforward_norm, token, l.gate);
    });
    lap(kRest);
    joined({&l.gate, &l.up});
    lap(kLinear);
    each_token([&](int64_t token) {
      char* gate = row(s.buffers[0], token);
      s.kernel.activate(s.dtype, l.gate.out, gate, Activation(l.activation),
                        row(s.buffers[1], token));
      pack(token, scaled(l.down, token, gate), l.down.in);
    });
    lap(kRest);
    joined({&l.down});
    lap(kLinear);
    each_token([&](int64_t token) { add(l, l.fed_norm, token); });
  }

  template <class Work>
  void each_token(const Work& work) {
    crew.each(s.tokens(), work);
  }

  char* row(char* buffer, int64_t token) const { return buffer + token * s.widest * s.size; }

  void norm(const NormPlan& n, const char* x, char* out) const {
    s.kernel.rms_norm({at(n.weight), n.size, float(n.eps), float(n.offset), n.rounded_between != 0,
                       s.dtype},
                      x, out);
  }

  // Packs the input of linear layers, normalised where they have a norm, scaled by `first`.
  void pack_normal(const NormPlan& n, int64_t token, const LinearPlan& first) {
    const int64_t size = s.plan.hidden_size;
    char* x = row(s.attended, token);
    if (n.weight)
      norm(n, s.residual + token * size * s.size, x);
    else
      std::memcpy(x, s.residual + token * size * s.size, size * s.size);
    pack(token, scaled(first, token, x), size);
  }

  const char* scaled(const LinearPlan& linear, int64_t token, char* x) const {
    if (linear.input_scale && token >= s.first_adapted)
      s.kernel.multiply(s.dtype, linear.in, x, Dtype(linear.scale_dtype), at(linear.input_scale));
    return x;
  }

  void pack(int64_t token, const char* x, int64_t size) const {
    const int64_t row_bytes = packed_row_bytes(size);
    s.linear.pack(s.dtype, size, x, s.packed, s.x + token * row_bytes);
    if (s.repacks && token >= s.first_adapted)
      s.linear.pack(s.dtype, size, x, other_than(s.packed),
                    s.other + (token - s.first_adapted) * row_bytes);
  }

  void add(const LayerPlan& l, const NormPlan& n, int64_t token) const {
    char* x = row(s.buffers[0], token);
    if (n.weight) norm(n, x, x);
    s.kernel.add(s.dtype, s.plan.hidden_size, s.residual + token * s.plan.hidden_size * s.size,
                 float(l.residual_scale), x);
  }

  // Runs linear layers that read the same packed rows, output i into buffer i or all into `out`.
  void joined(std::initializer_list<const LinearPlan*> plans, char* out = nullptr,
              int64_t out_size = 0) {
    Product downs[kJoined] = {}, products[kJoined] = {};
    bool scales = false;
    int count = 0;
    for (const LinearPlan* p : plans) {
      Product& product = products[count];
      const int64_t x_row_bytes = packed_row_bytes(p->in);
      product.x = {s.x, x_row_bytes, s.linear.packs_bfloat16(s.dtype, s.packed)};
      product.weight = {at(p->weight), p->row_bytes, p->out, p->in, s.dtype, Format(s.plan.format)};
      product.bias = {at(p->bias), p->bias_stride, s.dtype};
      product.rows = product.first_adapted = s.tokens();
      product.out = out ? out : s.buffers[count];
      product.out_row_bytes = (out ? out_size : s.widest) * s.size;
      product.out_dtype = s.dtype;
      if (p->down && s.adapted() > 0) {
        const Dtype low = Dtype(p->low_rank_dtype);
        Product& down = downs[count];
        down.x = s.panels || low == s.packed
                     ? product.x.from(s.first_adapted)
                     : Packed{s.other, x_row_bytes, s.linear.packs_bfloat16(s.dtype, low)};
        down.weight = {at(p->down), p->down_row_bytes, p->rank, p->in, low};
        down.rows = down.first_adapted = s.adapted();
        down.out = reinterpret_cast<char*>(s.down_x[count]);
        down.out_row_bytes = packed_row_bytes(p->rank);
        down.out_dtype = Dtype::kFloat32;
        product.first_adapted = s.first_adapted;
        product.down_x = s.down_x[count];
        product.down_x_stride = down.out_row_bytes / 4;
        product.up = {at(p->up), p->up_row_bytes, p->out, p->rank, low};
        product.up_bias = {at(p->up_bias), p->up_bias_stride, low};
      }
      scales |= p->output_scale != 0;
      ++count;
    }
    run_all(downs, count);
    run_all(products, count);
    if (!scales || s.adapted() <= 0) return;
    crew.each(s.adapted(), [&](int64_t adapted) {
      for (int i = 0; i < count; ++i) {
        const LinearPlan& p = *plans.begin()[i];
        const Product& product = products[i];
        if (p.output_scale)
          s.kernel.multiply(s.dtype, p.out,
                            product.out + (s.first_adapted + adapted) * product.out_row_bytes,
                            Dtype(p.scale_dtype), at(p.output_scale));
      }
    });
  }

  void run_all(const Product (&products)[kJoined], int count) {
    const int64_t unit = s.panels ? kPanel : 1;
    const auto run = s.panels ? s.linear.panels : s.linear.outputs;
    const auto units_of = [&](const Product& p) { return (p.weight.out + unit - 1) / unit; };
    int64_t units = 0, bytes = 0;
    for (int i = 0; i < count; ++i) {
      units += units_of(products[i]);
      bytes += products[i].weight.out * products[i].weight.row_bytes;
    }
    if (units == 0) return;
    crew.share(units, std::max<int64_t>(1, units * kLeastBytes / bytes),
               [&](int64_t begin, int64_t end) {
                 for (int i = 0; i < count && end > 0; ++i) {
                   const int64_t own = units_of(products[i]);
                   if (begin < own)
                     run(products[i], std::max<int64_t>(0, begin) * unit,
                         std::min(end * unit, products[i].weight.out));
                   begin -= own;
                   end -= own;
                 }
               });
  }

  // Norms and rotates queries and keys, appends keys and values to the cache, and attends.
  void attend(const LayerPlan& l, const LayerCache& cache) {
    const int64_t group = l.heads / l.kv_heads, head_bytes = l.head_dim * s.size;
    const bool whole = l.query_norm.size > l.head_dim;  // normalised before the cut into heads
    if (whole)
      each_token([&](int64_t token) {
        norm(l.query_norm, row(s.buffers[0], token), row(s.buffers[0], token));
        norm(l.key_norm, row(s.buffers[1], token), row(s.buffers[1], token));
      });
    crew.each(s.rows * l.kv_heads, [&](int64_t unit) {
      thread_local Scratch scratch;
      const int64_t r = unit / l.kv_heads, head = unit % l.kv_heads;
      const int64_t there = unit * cache.slots * head_bytes;
      char *keys = at<char>(cache.keys) + there, *values = at<char>(cache.values) + there;
      for (int64_t i = 0; i < s.length; ++i) {
        const int64_t token = r * s.length + i, position = s.positions[r] + i;
        const auto turn = [&](const NormPlan& n, char* x) {
          if (n.weight && !whole) norm(n, x, x);
          const int64_t entry = position * l.rotary_dim * s.size;
          if (l.rotary_dim)
            s.kernel.rotate(s.dtype, l.rotary_dim, x, at(l.cos) + entry, at(l.sin) + entry, x);
        };
        char* query = row(s.buffers[0], token) + head * group * head_bytes;
        char* key = row(s.buffers[1], token) + head * head_bytes;
        for (int64_t j = 0; j < group; ++j) turn(l.query_norm, query + j * head_bytes);
        turn(l.key_norm, key);
        std::memcpy(keys + position * head_bytes, key, head_bytes);
        std::memcpy(values + position * head_bytes, row(s.buffers[2], token) + head * head_bytes,
                    head_bytes);
        const int64_t slots = position + 1;
        const int64_t hidden = l.window && slots > l.window ? slots - l.window : 0;
        const KeysAndValues kv = {keys + hidden * head_bytes, values + hidden * head_bytes,
                                  head_bytes, head_bytes, slots - hidden,
                                  l.head_dim, l.head_dim, s.dtype};
        const Softmax softmax = {float(l.scaling), float(l.softcap), nullptr, s.dtype};
        attend_group(s.linear, s.kernel, kv, softmax, query, head_bytes, group, scratch,
                     row(s.attended, token) + head * group * head_bytes);
      }
    });
  }

  const Step& s;
  Crew crew;
  double* const seconds;
  Clock::time_point last;
};

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

template <class F>
void each_linear(const DecoderPlan& plan, const F& f) {
  for (int64_t i = 0; i < plan.layers; ++i) {
    const LayerPlan& l = plan.layer[i];
    for (const LinearPlan* p : {&l.query, &l.key, &l.value, &l.output, &l.gate, &l.up, &l.down})
      f(*p);
  }
  f(plan.head);
}

void decode(const Tensor plan_words, const Tensor cache_words, const Tensor inputs,
            const Tensor positions, int64_t first_adapted, Tensor hidden,
            const std::optional<Tensor> logits, const std::optional<Tensor> seconds) {
  thread_local Scratch scratch;
  const auto& plan = *static_cast<const DecoderPlan*>(plan_words.data_ptr());
  const Dtype dtype = dtype_of(inputs, "inputs");
  STD_TORCH_CHECK(inputs.dim() == 3 && inputs.is_contiguous() && hidden.is_contiguous() &&
                      inputs.size(2) == plan.hidden_size && dtype == Dtype(plan.dtype) &&
                      dtype_of(hidden, "hidden") == dtype && hidden.numel() == inputs.numel(),
                  "inputs and hidden must be [rows, length, ", plan.hidden_size,
                  "], contiguous and of the plan's dtype");
  STD_TORCH_CHECK(positions.dim() == 1 && positions.size(0) == inputs.size(0) &&
                      positions.is_contiguous(),
                  "positions must be [rows]");
  STD_TORCH_CHECK(!seconds || (seconds->scalar_type() == ScalarType::Double &&
                               seconds->is_contiguous() && seconds->numel() == kParts),
                  "seconds must be ", int(kParts), " float64");
  double* const clock = seconds ? static_cast<double*>(seconds->data_ptr()) : nullptr;
  const auto* caches = static_cast<const LayerCache*>(cache_words.data_ptr());
  const auto* first = static_cast<const int64_t*>(positions.data_ptr());
  for (int64_t row = 0; row < inputs.size(0); ++row)
    for (int64_t layer = 0; layer < plan.layers; ++layer)
      STD_TORCH_CHECK(first[row] >= 0 && first[row] + inputs.size(1) <= caches[layer].slots, "row ",
                      row, " does not fit the cache of ", caches[layer].slots, " slots");
  Step s = {plan, caches, static_cast<const char*>(inputs.data_ptr()), first,
            inputs.size(0), inputs.size(1),
            first_adapted * inputs.size(1), static_cast<char*>(hidden.data_ptr()),
            logits ? static_cast<char*>(logits->data_ptr()) : nullptr, linear_in_use(),
            step_in_use()};
  s.dtype = dtype;
  const bool plain = Format(plan.format) == Format::kPlain;
  s.panels = plain && s.linear.panels && std::max(s.rows, s.length) > kFewRows;
  s.packed = plain && !s.panels ? dtype : Dtype::kFloat32;
  s.size = size_of(dtype);
  int64_t rank = 0;
  s.widest = plan.hidden_size;
  each_linear(plan, [&](const LinearPlan& p) {
    if (&p != &plan.head) s.widest = std::max({s.widest, p.in, p.out});
    rank = std::max(rank, p.rank);
    s.repacks |= !s.panels && p.down && Dtype(p.low_rank_dtype) != s.packed;
  });
  const int64_t tokens = s.tokens(), adapted = std::max<int64_t>(0, s.adapted());
  const int64_t phases = plan.layers * kPhasesPerLayer + kPhasesPerLayer;
  const int64_t sizes[] = {
      phases * int64_t{sizeof(Phase)},
      tokens * plan.hidden_size * s.size,
      tokens * s.widest * s.size,
      tokens * packed_row_bytes(s.widest),
      s.repacks ? adapted * packed_row_bytes(s.widest) : 0,
      adapted * packed_row_bytes(rank),
  };
  int64_t bytes = 0;
  for (int i = 0; i < 6; ++i) bytes += aligned(sizes[i]) * (i == 2 ? kJoined + 1 : i == 5 ? kJoined : 1);
  char* room = scratch.of(bytes);
  const auto take = [&](int i) {
    char* taken = room;
    room += aligned(sizes[i]);
    return taken;
  };
  Phase* phase = reinterpret_cast<Phase*>(take(0));
  for (int64_t i = 0; i < phases; ++i) new (phase + i) Phase;
  s.residual = take(1);
  for (char*& buffer : s.buffers) buffer = take(2);
  s.attended = take(2);
  s.x = take(3);
  s.other = take(4);
  std::memset(room, 0, aligned(sizes[5]) * kJoined);  // the padding of `down_x`
  for (float*& down_x : s.down_x) down_x = reinterpret_cast<float*>(take(5));
  const int64_t threads = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
    Worker(s, phase, threads, thread == 0 ? clock : nullptr).run();
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(svd_engine_cpu, m) {
  m.def("decode(Tensor plan, Tensor caches, Tensor inputs, Tensor positions, int first_adapted, "
        "Tensor(a!) hidden, Tensor(b!)? logits, Tensor(c!)? seconds=None) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(svd_engine_cpu, CPU, m) { m.impl("decode", TORCH_BOX(&decode)); }
