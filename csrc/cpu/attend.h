// Attention of the query heads that share a key head, for one token.
#pragma once

#include "linear.h"
#include "step.h"
#include "tensors.h"

struct KeysAndValues {  // of one row and head, [slots, dim] and [slots, out_dim]
  const char* keys;
  const char* values;
  int64_t key_bytes, value_bytes, slots, dim, out_dim;
  Dtype dtype;
};

// out [queries, out_dim]; query i begins at query + i * query_bytes.
inline void attend_group(const LinearKernel& linear, const StepKernel& kernel,
                         const KeysAndValues& kv, const Softmax& softmax, const char* query,
                         int64_t query_bytes, int64_t queries, Scratch& scratch, char* out) {
  const int64_t row_bytes = packed_row_bytes(kv.dim), room = (kv.slots + 15) / 16 * 16;
  char* x = scratch.of(queries * (row_bytes + (room + 1) * 4));
  float* scores = reinterpret_cast<float*>(x + queries * row_bytes);
  float* sums = scores + queries * room;
  for (int64_t i = 0; i < queries; ++i)
    linear.pack(kv.dtype, kv.dim, query + i * query_bytes, kv.dtype, x + i * row_bytes);
  Product product = {};
  product.x = {x, row_bytes, linear.packs_bfloat16(kv.dtype, kv.dtype)};
  product.weight = {kv.keys, kv.key_bytes, kv.slots, kv.dim, kv.dtype};
  product.rows = product.first_adapted = queries;
  product.out = reinterpret_cast<char*>(scores);
  product.out_row_bytes = room * 4;
  product.out_dtype = Dtype::kFloat32;
  linear.outputs(product, 0, kv.slots);
  for (int64_t i = 0; i < queries; ++i)
    sums[i] = kernel.exponentials(softmax, scores + i * room, kv.slots);
  kernel.mix({kv.values, kv.value_bytes, kv.slots, kv.out_dim, kv.dtype},
             {scores, room, sums, queries}, out);
}
