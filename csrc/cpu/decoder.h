// A decoder as decoder.cpp runs it: addresses, sizes and forms in 8-byte words. The fields and their
// order are those of svd_engine/model/step/cpu.py, which fills them in. An address of 0 stands for
// what a layer lacks.
#pragma once

#include <cstdint>

struct LinearPlan {  // out = x weight^T + bias; in the adapted rows + up (down x) + up_bias
  int64_t weight, row_bytes, out, in;
  int64_t bias, bias_stride;
  int64_t down, down_row_bytes, rank, up, up_row_bytes, up_bias, up_bias_stride, low_rank_dtype;
  int64_t input_scale, output_scale, scale_dtype;  // of the adapted rows, [in] and [out]
};

struct NormPlan {
  int64_t weight, size;
  double eps, offset;
  int64_t rounded_between;
};

struct LayerPlan {
  LinearPlan query, key, value, output, gate, up, down;
  NormPlan attention_norm, query_norm, key_norm, attended_norm;  // the last one: of the output
  NormPlan feedforward_norm, fed_norm;
  int64_t heads, kv_heads, head_dim;
  int64_t window;                 // 0 if there is none
  int64_t rotary_dim, cos, sin;   // tables [positions, rotary_dim]
  int64_t activation;             // 0: SiLU, 1: GELU with tanh
  double scaling, softcap, residual_scale;  // softcap 0 if there is none
};

struct DecoderPlan {
  int64_t dtype, layers, hidden_size;
  int64_t format;  // of all weights; see codes.h
  NormPlan norm;
  LinearPlan head;
  LayerPlan layer[];
};

struct LayerCache {  // contiguous keys and values [rows, kv_heads, slots, head_dim]
  int64_t keys, values, slots;
};
