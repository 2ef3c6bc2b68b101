// What the encoder computes on, as plain data: encoder.cc is compiled once for each instruction set,
// so nothing here may be a function or a template, which the linker would share between them.
#ifndef FLAXQA_ENCODER_H_
#define FLAXQA_ENCODER_H_

#include <cstdint>

namespace flaxqa {

// Columns of a packed matrix that lie side by side. A matrix [K, N] is packed as [N / kPanel, K,
// kPanel], in bfloat16 as [N / kPanel, K / 2, kPanel, 2]; N and K are filled up with zeros.
inline constexpr int64_t kPanel = 32;

enum class Activation : int32_t { kGelu, kRelu };

// A matrix of each layer, packed, and its bias, float32, filled up to whole panels.
struct Linear {
  const void* kernel;
  const float* bias;
};

struct Norm {
  const float* scale;
  const float* bias;
};

// M tokens of a row, W windows; D channels, F of the feed-forward, N heads. A pointer of `Linear` or
// `Norm` is to the first layer; those of the others follow without a gap.
struct Forward {
  int64_t tokens, windows;
  int64_t dim, hidden_dim, n_heads, n_layers;
  int64_t vocab_size, max_positions, token_types;
  float epsilon;
  Activation activation;

  const int32_t* input_ids;         // [M]
  const int32_t* token_type_ids;    // [M], read where there are token_types
  const int32_t* positions;         // [M]
  const int32_t* starts;            // [W]
  const int32_t* lengths;           // [W]
  const void* word_embeddings;      // [vocab_size, D]
  const void* position_embeddings;  // [max_positions, D]
  const void* type_embeddings;      // [token_types, D]
  Norm embedding_norm;
  Linear qkv, out, lin1, lin2, qa_outputs;
  Norm attention_norm, output_norm;

  float* hidden;  // [M, D filled up], room to work
  void* qkv_rows;  // [M, 3 D filled up]
  void* mixed;     // [M, D filled up]
  float* logits;   // [M, 2]; 0 after the last window
};

// Runs task(context, index) for all indices below `count`, on several threads, and waits for them.
struct Crew {
  int64_t threads;
  void (*run)(Crew* self, int64_t count, void (*task)(void*, int64_t), void* context);
};

// With float32 weights, or bfloat16 ones.
using Compute = void (*)(const Forward&, Crew*, bool bfloat16);

}  // namespace flaxqa

#endif  // FLAXQA_ENCODER_H_
