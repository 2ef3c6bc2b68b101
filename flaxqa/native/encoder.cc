// The encoder on ragged rows: from token ids to the two logits of each token.
//
// Compiled once for each instruction set, with FLAXQA_ISA as its name and as the namespace of all
// that is here. Products are sums over panels of 32 columns, held in registers for a tile of rows.
// Work is cut into blocks of rows whose intermediate results stay in a core's second-level cache;
// between the blocks of one layer and the next only attention, window by window and head by head,
// needs all of them. The computation is that of flaxqa/inference.py, where it is told; the test
// tests/test_native.py holds the two together.

#include "encoder.h"

#include <cmath>
#include <cstdlib>
#include <cstring>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace flaxqa {
namespace FLAXQA_ISA {
namespace {

using i64 = int64_t;

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 14;  // floats of a register; rows of a tile
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRows = 3;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRows = 3;
#else
constexpr int kLanes = 4, kRows = 1;
#endif
constexpr int kVectors = kPanel / kLanes;
constexpr i64 kAhead = 8;             // rows of a panel fetched before they are needed
constexpr i64 kCacheBytes = 1 << 20;  // what a block of rows may take of the second-level cache
constexpr i64 kChunk = 384;           // columns of the feed-forward computed at a time
constexpr i64 kApart = 64;            // bytes that keep rows from falling on the same cache sets

#define FLAXQA_INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define FLAXQA_UNROLL _Pragma("unroll")
#else
#define FLAXQA_UNROLL _Pragma("GCC unroll 16")
#endif

typedef float Vector __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));

struct bfloat16 {
  uint16_t bits;
};

template <class V>
FLAXQA_INLINE V load(const void* from) {
  V v;
  memcpy(&v, from, sizeof v);
  return v;
}

template <class V>
FLAXQA_INLINE void store(void* to, V v) {
  memcpy(to, &v, sizeof v);
}

FLAXQA_INLINE Vector all(float x) {
  uint32_t bits;  // as integers, for 0.0f + x is not x where that is -0
  memcpy(&bits, &x, sizeof bits);
  return (Vector)(Bits{} + bits);
}

FLAXQA_INLINE Vector widened(const float* from) { return load<Vector>(from); }

FLAXQA_INLINE Vector widened(const bfloat16* from) {
  return (Vector)(__builtin_convertvector(load<Halves>(from), Bits) << 16);
}

FLAXQA_INLINE void narrow(float* to, Vector v) { store(to, v); }

// To the nearest, ties to even; NaN stays NaN.
FLAXQA_INLINE void narrow(bfloat16* to, Vector v) {
#if defined(__AVX512BF16__)
  store(to, _mm512_cvtneps_pbh((__m512)v));
#else
  Bits bits = (Bits)v;
  Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  rounded = v == v ? rounded : Bits{} + 0x7fc0;
  store(to, __builtin_convertvector(rounded, Halves));
#endif
}

FLAXQA_INLINE void narrow_one(float* to, float x) { *to = x; }

FLAXQA_INLINE void narrow_one(bfloat16* to, float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  to->bits = x == x ? uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : uint16_t(0x7fc0);
}

FLAXQA_INLINE float sum(Vector v) {
  float parts[kLanes], total = 0;
  memcpy(parts, &v, sizeof parts);
  for (float part : parts) total += part;
  return total;
}

FLAXQA_INLINE float highest(Vector v) {
  float parts[kLanes];
  memcpy(parts, &v, sizeof parts);
  float most = parts[0];
  for (float part : parts) most = part > most ? part : most;
  return most;
}

// The first n lanes of v, 0 in the others.
FLAXQA_INLINE Vector first(Vector v, i64 n) {
  Ints lane;
  for (int i = 0; i < kLanes; i++) lane[i] = i;
  return lane < Ints{} + int32_t(n) ? v : Vector{};
}

// e^x for x <= 0, to 2 units in the last place down to e^-87, below which it stays. The polynomial
// is a least-maximum fit of (e^r - 1 - r) / r^2 on [-ln 2 / 2, ln 2 / 2], with an error of 3e-9.
FLAXQA_INLINE Vector exponential(Vector x) {
  x = x < all(-87.0f) ? all(-87.0f) : x;  // NaN stays
  Ints n = __builtin_convertvector(x * 1.44269504f - 0.5f, Ints);
  Vector whole = __builtin_convertvector(n, Vector);
  Vector r = x - whole * 0.693145752f;  // ln 2 in two parts, the first exact in a product
  r = r - whole * 1.42860677e-6f;
  Vector p = r * 0.00138146f + 0.00836871f;
  p = p * r + 0.04166839f;
  p = p * r + 0.16666521f;
  p = p * r + 0.49999993f;
  p = p * (r * r) + (r + 1.0f);
  return p * (Vector)((n + 127) << 23);
}

// The error function to 4e-7: x times a polynomial in x^2, which is scaled to [-1, 1], where it loses
// no digits; a least-maximum fit on [-3.7, 3.7] with an error of 1.5e-7. Outside it stays.
FLAXQA_INLINE Vector error_function(Vector x) {
  constexpr float kTerms[] = {3.927413338e-03f,  -3.647330964e-03f, 5.223222060e-03f,
                              -1.415170939e-02f, 2.514615143e-02f,  -3.620024951e-02f,
                              5.147535364e-02f,  -7.043664091e-02f, 9.062488753e-02f,
                              -1.126455633e-01f, 1.407895353e-01f,  -1.904677322e-01f,
                              3.821375266e-01f};
  x = x > all(3.7f) ? all(3.7f) : x;
  x = x < all(-3.7f) ? all(-3.7f) : x;
  Vector u = x * x * 0.14609203798f - 1.0f;
  Vector p = all(-1.504677710e-03f);
  FLAXQA_UNROLL
  for (float term : kTerms) p = p * u + term;
  return x * p;
}

FLAXQA_INLINE Vector activated(Activation activation, Vector x) {
  if (activation == Activation::kRelu) return x < Vector{} ? Vector{} : x;  // NaN stays
  return 0.5f * x * (1.0f + error_function(x * 0.707106781f));
}

FLAXQA_INLINE i64 filled(i64 n, i64 multiple) { return (n + multiple - 1) / multiple * multiple; }

// The memory of a thread, kept from call to call.
struct Scratch {
  char* data = nullptr;
  size_t size = 0;
  ~Scratch() { free(data); }

  char* of(size_t bytes) {
    if (bytes > size) {
      free(data);
      size = filled(bytes, 4096);
      data = static_cast<char*>(aligned_alloc(64, size));
      if (data == nullptr) abort();  // as any allocation of a few hundred KB that fails
    }
    return data;
  }
};

thread_local Scratch scratch;

// --- products ---

// The type that K is counted in: bfloat16 comes in pairs.
template <class T>
constexpr i64 kDepth = sizeof(T) == 4 ? 1 : 2;

// Adds the products of R numbers and the columns: the fewer of the two stay in registers.
template <int R, class Rows, class Columns>
FLAXQA_INLINE void add_products(Vector (&sums)[R][kVectors], const Rows& row,
                                const Columns& column) {
  if constexpr (kRows < kVectors) {
    Vector x[R];
    FLAXQA_UNROLL
    for (int i = 0; i < R; i++) x[i] = row(i);
    FLAXQA_UNROLL
    for (int j = 0; j < kVectors; j++) {
      Vector y = column(j);
      FLAXQA_UNROLL
      for (int i = 0; i < R; i++) sums[i][j] += x[i] * y;
    }
  } else {
    Vector y[kVectors];
    FLAXQA_UNROLL
    for (int j = 0; j < kVectors; j++) y[j] = column(j);
    FLAXQA_UNROLL
    for (int i = 0; i < R; i++) {
      Vector x = row(i);
      FLAXQA_UNROLL
      for (int j = 0; j < kVectors; j++) sums[i][j] += x * y[j];
    }
  }
}

template <int R>
FLAXQA_INLINE void add_products(Vector (&sums)[R][kVectors], const float* a, i64 stride,
                                const float* b) {
  add_products(sums, [&](int i) { return all(a[i * stride]); },
               [&](int j) { return load<Vector>(b + j * kLanes); });
}

// Of pairs: two rows of b.
template <int R>
FLAXQA_INLINE void add_products(Vector (&sums)[R][kVectors], const bfloat16* a, i64 stride,
                                const bfloat16* b) {
  auto pair = [&](int i) {
    uint32_t bits;
    memcpy(&bits, a + i * stride, sizeof bits);
    return bits;
  };
  auto pairs = [&](int j) { return load<Bits>(b + 2 * j * kLanes); };
#if defined(__AVX512BF16__)
  Bits y[kVectors];
  FLAXQA_UNROLL
  for (int j = 0; j < kVectors; j++) y[j] = pairs(j);
  FLAXQA_UNROLL
  for (int i = 0; i < R; i++) {
    Bits x = Bits{} + pair(i);
    FLAXQA_UNROLL
    for (int j = 0; j < kVectors; j++)
      sums[i][j] = (Vector)_mm512_dpbf16_ps((__m512)sums[i][j], (__m512bh)x, (__m512bh)y[j]);
  }
#else
  add_products(sums, [&](int i) { return (Vector)(Bits{} + (pair(i) << 16)); },
               [&](int j) { return (Vector)(pairs(j) << 16); });
  add_products(sums, [&](int i) { return (Vector)(Bits{} + (pair(i) & 0xffff0000u)); },
               [&](int j) { return (Vector)(pairs(j) & 0xffff0000u); });
#endif
}

// tile [R, kPanel] = a [R, K] times a panel of b [K, kPanel].
//
// What `ahead` points at, the next panel, is fetched into the second-level cache meanwhile, `pace`
// bytes for each step; the tiles of a panel share it between them.
template <class T, int R>
__attribute__((noinline)) void multiply(const T* a, i64 stride, const T* b, i64 depth,
                                        float* tile, const char* ahead, i64 pace) {
  constexpr i64 step = kDepth<T>;
  Vector sums[R][kVectors] = {};
  for (i64 k = 0; k < depth; k += step, b += step * kPanel, ahead += pace) {
    __builtin_prefetch(ahead, 0, 2);
    FLAXQA_UNROLL
    for (int j = 0; j < kVectors; j++)
      __builtin_prefetch(b + step * (kAhead * kPanel + j * kLanes));
    add_products(sums, a + k, stride, b);
  }
  FLAXQA_UNROLL
  for (int i = 0; i < R; i++) {
    FLAXQA_UNROLL
    for (int j = 0; j < kVectors; j++) store(tile + i * kPanel + j * kLanes, sums[i][j]);
  }
}

template <class T, int R = kRows>
FLAXQA_INLINE void multiply_tile(i64 rows, const T* a, i64 stride, const T* b, i64 depth,
                                 float* tile, const char* ahead, i64 pace) {
  if (rows == R) {
    multiply<T, R>(a, stride, b, depth, tile, ahead, pace);
  } else if constexpr (R > 1) {
    multiply_tile<T, R - 1>(rows, a, stride, b, depth, tile, ahead, pace);
  }
}

// Hands a [rows, depth] times b to `take` in vectors: take(row, column, values).
//
// The panels of b are `panel` elements apart; `depth` counts what the sum is over.
template <class T, class Take>
FLAXQA_INLINE void product(const T* a, i64 stride, i64 rows, i64 depth, const T* b, i64 panel,
                           i64 columns, const Take& take) {
  alignas(64) float tile[kRows * kPanel];
  i64 tiles = (rows + kRows - 1) / kRows;
  i64 pace = 4 * kPanel / tiles;
  for (i64 column = 0; column < columns; column += kPanel, b += panel) {
    for (i64 t = 0; t < tiles; t++) {  // of nearly one size, as small ones are slow
      i64 begin = rows * t / tiles, end = rows * (t + 1) / tiles;
      const char* ahead = reinterpret_cast<const char*>(b + panel) + t * depth / kDepth<T> * pace;
      multiply_tile<T>(end - begin, a + begin * stride, stride, b, depth, tile, ahead, pace);
      for (i64 i = begin; i < end; i++)
        for (i64 j = 0; j < kPanel; j += kLanes)
          take(i, column + j, load<Vector>(tile + (i - begin) * kPanel + j));
    }
  }
}

// --- a block of rows ---

// What a block of rows needs of the whole: `Forward` with the weights' type, and sizes filled up.
template <class T>
struct Encoder {
  const Forward& f;
  Crew* crew;
  i64 tokens;         // up to the end of the last window
  i64 width;          // D filled up to whole panels
  i64 qkv_width;      // 3 D filled up
  i64 depth;          // D, even for pairs
  i64 stride;         // between the rows of a block
  i64 chunk;          // columns of the feed-forward at a time
  i64 chunk_stride;   // between rows of those
  i64 block;          // rows
  i64 layer;

  explicit Encoder(const Forward& forward, Crew* workers) : f(forward), crew(workers), layer(0) {
    tokens = 0;
    for (i64 w = 0; w < f.windows; w++) {
      i64 end = i64(f.starts[w]) + f.lengths[w];
      tokens = end > tokens ? end : tokens;
    }
    width = filled(f.dim, kPanel);
    qkv_width = filled(3 * f.dim, kPanel);
    depth = filled(f.dim, kDepth<T>);
    stride = width + kApart / i64(sizeof(T));
    i64 hidden = filled(f.hidden_dim, kPanel);
    i64 chunks = (hidden + kChunk - 1) / kChunk;
    chunk = filled((hidden + chunks - 1) / chunks, kPanel);
    chunk_stride = chunk + kApart / i64(sizeof(T));
    i64 most = kCacheBytes / row_bytes() / kRows * kRows;
    most = most < kRows ? kRows : most;
    i64 blocks = filled((tokens + most - 1) / most, crew->threads);
    block = blocks ? (tokens + blocks - 1) / blocks : 1;
    block = block < kRows ? kRows : block;
  }

  i64 row_bytes() const { return (width + kLanes) * 4 + (stride + chunk_stride) * i64(sizeof(T)); }

  i64 blocks() const { return (tokens + block - 1) / block; }

  // The layer's matrix, at a row and a column of it.
  const T* at(const Linear& linear, i64 of_layer, i64 rows, i64 columns, i64 row,
              i64 column) const {
    rows = filled(rows, kDepth<T>);
    const T* kernel = static_cast<const T*>(linear.kernel);
    return kernel + of_layer * rows * filled(columns, kPanel) + column * rows + row * kPanel;
  }

  const float* bias(const Linear& linear, i64 of_layer, i64 columns) const {
    return linear.bias + of_layer * filled(columns, kPanel);
  }
};

// A thread's room for a block of rows.
template <class T>
struct Block {
  const Encoder<T>& e;
  i64 begin, rows;
  float* sums;  // [rows, sums_stride], what is added up and normalised
  T* input;     // [rows, stride], the same as operands
  T* chunk;     // [rows, chunk_stride], of the feed-forward

  i64 sums_stride;

  Block(const Encoder<T>& encoder, i64 index) : e(encoder) {
    begin = index * e.block;
    rows = e.tokens - begin < e.block ? e.tokens - begin : e.block;
    sums_stride = e.width + kLanes;
    char* data = scratch.of(size_t(e.block * e.row_bytes() + 128));
    sums = reinterpret_cast<float*>(data);
    input = reinterpret_cast<T*>(data + filled(e.block * sums_stride * 4, 64));
    chunk = input + filled(e.block * e.stride, 64 / i64(sizeof(T)));
  }

  // Normalises a row of `sums` and puts it there, into `input`, and into the hidden state if asked.
  void normalise(i64 row, const Norm& norm, i64 of_layer, bool keep) {
    float* x = sums + row * sums_stride;
    const float* scale = norm.scale + of_layer * e.width;
    const float* bias = norm.bias + of_layer * e.width;
    i64 dim = e.f.dim;
    Vector total{}, squares{};
    for (i64 j = 0; j < dim; j += kLanes) total += first(load<Vector>(x + j), dim - j);
    Vector mean = all(sum(total) / float(dim));
    for (i64 j = 0; j < dim; j += kLanes) {
      Vector centred = first(load<Vector>(x + j) - mean, dim - j);
      squares += centred * centred;
    }
    Vector scaling = all(1.0f / sqrtf(sum(squares) / float(dim) + e.f.epsilon));
    float* hidden = e.f.hidden + (begin + row) * e.width;
    T* operands = input + row * e.stride;
    for (i64 j = 0; j < e.width; j += kLanes) {  // scale and bias are 0 past D
      Vector y = (load<Vector>(x + j) - mean) * scaling * load<Vector>(scale + j) +
                 load<Vector>(bias + j);
      y = first(y, dim - j);
      store(x + j, y);
      narrow(operands + j, y);
      if (keep) store(hidden + j, y);
    }
  }

  void normalise(const Norm& norm, i64 of_layer, bool keep) {
    for (i64 row = 0; row < rows; row++) normalise(row, norm, of_layer, keep);
  }

  void embed() {
    const Forward& f = e.f;
    auto* words = static_cast<const T*>(f.word_embeddings);
    auto* places = static_cast<const T*>(f.position_embeddings);
    auto* types = static_cast<const T*>(f.type_embeddings);
    for (i64 row = 0; row < rows; row++) {
      i64 token = begin + row;
      const T* word = words + f.input_ids[token] * e.width;
      const T* place = places + f.positions[token] * e.width;
      const T* type = f.token_types ? types + f.token_type_ids[token] * e.width : nullptr;
      for (i64 j = 0; j < e.width; j += kLanes) {
        Vector x = widened(word + j);
        if (type) x += widened(type + j);
        store(sums + row * sums_stride + j, x + widened(place + j));
      }
    }
    normalise(f.embedding_norm, 0, true);
  }

  void queries_keys_values(i64 of_layer) {
    T* target = static_cast<T*>(e.f.qkv_rows) + begin * e.qkv_width;
    const float* bias = e.bias(e.f.qkv, of_layer, 3 * e.f.dim);
    product<T>(input, e.stride, rows, e.depth, e.at(e.f.qkv, of_layer, e.f.dim, 3 * e.f.dim, 0, 0),
               e.depth * kPanel, e.qkv_width, [&](i64 row, i64 column, Vector v) {
                 narrow(target + row * e.qkv_width + column, v + load<Vector>(bias + column));
               });
  }

  void attention_output() {
    const T* mixed = static_cast<const T*>(e.f.mixed) + begin * e.width;
    for (i64 row = 0; row < rows; row++) {
      memcpy(input + row * e.stride, mixed + row * e.width, size_t(e.f.dim) * sizeof(T));
      memset(input + row * e.stride + e.f.dim, 0, size_t(e.width - e.f.dim) * sizeof(T));
    }
    const float* before = e.f.hidden + begin * e.width;
    const float* bias = e.bias(e.f.out, e.layer, e.f.dim);
    product<T>(input, e.stride, rows, e.depth, e.at(e.f.out, e.layer, e.f.dim, e.f.dim, 0, 0),
               e.depth * kPanel, e.width, [&](i64 row, i64 column, Vector v) {
                 store(sums + row * sums_stride + column,
                       v + load<Vector>(bias + column) +
                           load<Vector>(before + row * e.width + column));
               });
    normalise(e.f.attention_norm, e.layer, false);
  }

  void feed_forward() {
    const Forward& f = e.f;
    i64 hidden = filled(f.hidden_dim, kPanel);
    const float* inner = e.bias(f.lin1, e.layer, f.hidden_dim);
    const float* outer = e.bias(f.lin2, e.layer, f.dim);
    for (i64 row = 0; row < rows; row++)
      for (i64 j = 0; j < e.width; j += kLanes) {
        float* x = sums + row * sums_stride + j;
        store(x, load<Vector>(x) + load<Vector>(outer + j));
      }
    for (i64 from = 0; from < hidden; from += e.chunk) {
      i64 size = hidden - from < e.chunk ? hidden - from : e.chunk;
      product<T>(input, e.stride, rows, e.depth, e.at(f.lin1, e.layer, f.dim, f.hidden_dim, 0, from),
                 e.depth * kPanel, size, [&](i64 row, i64 column, Vector v) {
                   v = activated(f.activation, v + load<Vector>(inner + from + column));
                   narrow(chunk + row * e.chunk_stride + column, v);
                 });
      // Rows of lin2 past hidden_dim are not there; columns of lin1 past it gave 0.
      i64 depth = f.hidden_dim - from < size ? f.hidden_dim - from : size;
      product<T>(chunk, e.chunk_stride, rows, filled(depth, kDepth<T>),
                 e.at(f.lin2, e.layer, f.hidden_dim, f.dim, from, 0),
                 filled(f.hidden_dim, kDepth<T>) * kPanel, e.width,
                 [&](i64 row, i64 column, Vector v) {
                   float* x = sums + row * sums_stride + column;
                   store(x, load<Vector>(x) + v);
                 });
    }
    normalise(f.output_norm, e.layer, true);
  }

  void logits() {
    const float* bias = e.bias(e.f.qa_outputs, 0, 2);
    float* target = e.f.logits + 2 * begin;
    product<T>(input, e.stride, rows, e.depth, e.at(e.f.qa_outputs, 0, e.f.dim, 2, 0, 0),
               e.depth * kPanel, kPanel, [&](i64 row, i64 column, Vector v) {
                 if (column != 0) return;
                 target[2 * row] = v[0] + bias[0];
                 target[2 * row + 1] = v[1] + bias[1];
               });
  }
};

// --- attention ---

// Packs the keys [L, H], rows `stride` apart, as a matrix [H, L].
void pack_keys(const float* from, i64 stride, i64 length, i64 size, float* to) {
  i64 padded = filled(length, kPanel);
  for (i64 panel = 0; panel < padded; panel += kPanel, to += size * kPanel)
    for (i64 token = 0; token < kPanel; token++) {
      const float* row = from + (panel + token) * stride;
      bool there = panel + token < length;
      for (i64 h = 0; h < size; h++) to[h * kPanel + token] = there ? row[h] : 0.0f;
    }
}

void pack_keys(const bfloat16* from, i64 stride, i64 length, i64 size, bfloat16* to) {
  i64 padded = filled(length, kPanel);
  for (i64 panel = 0; panel < padded; panel += kPanel, to += size * kPanel)
    for (i64 token = 0; token < kPanel; token++) {
      const bfloat16* row = from + (panel + token) * stride;
      bool there = panel + token < length;
      for (i64 h = 0; h < size; h += 2) {
        uint32_t pair = 0;
        if (there) memcpy(&pair, row + h, sizeof pair);
        memcpy(to + h * kPanel + 2 * token, &pair, sizeof pair);
      }
    }
}

// Packs the values [L, H] as they are.
void pack_values(const float* from, i64 stride, i64 length, i64 size, float* to) {
  for (i64 panel = 0; panel < size; panel += kPanel)
    for (i64 token = 0; token < length; token++, to += kPanel) {
      i64 columns = size - panel < kPanel ? size - panel : kPanel;
      memcpy(to, from + token * stride + panel, size_t(columns) * sizeof(float));
      memset(to + columns, 0, size_t(kPanel - columns) * sizeof(float));
    }
}

void pack_values(const bfloat16* from, i64 stride, i64 length, i64 size, bfloat16* to) {
  for (i64 panel = 0; panel < size; panel += kPanel)
    for (i64 token = 0; token < length; token += 2, to += 2 * kPanel) {
      const bfloat16 *even = from + token * stride + panel, *odd = even + stride;
      bool both = token + 1 < length;
      for (i64 h = 0; h < kPanel; h++) {
        bool there = panel + h < size;
        to[2 * h].bits = there ? even[h].bits : uint16_t(0);
        to[2 * h + 1].bits = there && both ? odd[h].bits : uint16_t(0);
      }
    }
}

// What the tokens of one window mix for each other, of one head.
template <class T>
void attend(const Encoder<T>& e, i64 window, i64 head) {
  const Forward& f = e.f;
  i64 size = f.dim / f.n_heads, length = f.lengths[window], padded = filled(length, kPanel);
  const T* queries =
      static_cast<const T*>(f.qkv_rows) + f.starts[window] * e.qkv_width + head * size;
  T* mixed = static_cast<T*>(f.mixed) + f.starts[window] * e.width + head * size;

  i64 head_width = filled(size, kPanel), weights_stride = padded + kApart / i64(sizeof(T));
  char* data = scratch.of(size_t(kRows * (padded + head_width) * 4 +
                                  (padded * size + filled(length, 2) * head_width +
                                   kRows * weights_stride) * i64(sizeof(T)) + 256));
  float* scores = reinterpret_cast<float*>(data);  // [kRows, padded]
  float* sums = scores + kRows * padded;           // [kRows, head_width]
  T* keys = reinterpret_cast<T*>(sums + kRows * head_width);
  T* values = keys + padded * size;
  T* weights = values + filled(length, 2) * head_width;  // [kRows, weights_stride]
  pack_keys(queries + f.dim, e.qkv_width, length, size, keys);
  pack_values(queries + 2 * f.dim, e.qkv_width, length, size, values);

  i64 depth = filled(length, kDepth<T>);
  i64 tiles = (length + kRows - 1) / kRows;
  for (i64 t = 0; t < tiles; t++) {
    i64 begin = length * t / tiles, rows = length * (t + 1) / tiles - begin;
    product<T>(queries + begin * e.qkv_width, e.qkv_width, rows, size, keys, size * kPanel, padded,
               [&](i64 row, i64 column, Vector v) { store(scores + row * padded + column, v); });
    float totals[kRows];
    for (i64 row = 0; row < rows; row++) {
      float* x = scores + row * padded;
      T* w = weights + row * weights_stride;
      Vector most = all(x[0]);
      i64 whole = length / kLanes * kLanes;
      for (i64 j = 0; j < whole; j += kLanes) {
        Vector v = load<Vector>(x + j);
        most = v > most ? v : most;
      }
      float peak = highest(most);
      for (i64 j = whole; j < length; j++) peak = x[j] > peak ? x[j] : peak;
      Vector total{};
      for (i64 j = 0; j < whole; j += kLanes) {
        Vector v = exponential(load<Vector>(x + j) - peak);
        total += v;
        narrow(w + j, v);
      }
      if (whole < length) {
        Vector v = first(exponential(load<Vector>(x + whole) - peak), length - whole);
        total += v;
        narrow(w + whole, v);
      }
      totals[row] = 1.0f / sum(total);
    }
    product<T>(weights, weights_stride, rows, depth, values, depth * kPanel, head_width,
               [&](i64 row, i64 column, Vector v) {
                 store(sums + row * head_width + column, v * totals[row]);
               });
    for (i64 row = 0; row < rows; row++) {
      T* target = mixed + (begin + row) * e.width;
      const float* x = sums + row * head_width;
      i64 h = 0;
      for (; h + kLanes <= size; h += kLanes) narrow(target + h, load<Vector>(x + h));
      for (; h < size; h++) narrow_one(target + h, x[h]);
    }
  }
}

// --- all of it ---

template <class T>
void encode(const Forward& forward, Crew* crew) {
  Encoder<T> encoder(forward, crew);
  auto embed = [](void* context, i64 index) {
    Block<T> block(*static_cast<Encoder<T>*>(context), index);
    block.embed();
    block.queries_keys_values(0);
  };
  auto attention = [](void* context, i64 index) {
    auto& e = *static_cast<Encoder<T>*>(context);
    attend(e, index / e.f.n_heads, index % e.f.n_heads);
  };
  auto rest = [](void* context, i64 index) {
    auto& e = *static_cast<Encoder<T>*>(context);
    Block<T> block(e, index);
    block.attention_output();
    block.feed_forward();
    if (e.layer + 1 < e.f.n_layers) {
      block.queries_keys_values(e.layer + 1);
    } else {
      block.logits();
    }
  };
  memset(forward.logits, 0, size_t(forward.tokens) * 2 * sizeof(float));
  crew->run(crew, encoder.blocks(), embed, &encoder);
  i64 windows = 0;
  while (windows < forward.windows && forward.lengths[windows] > 0) windows++;
  for (; encoder.layer < forward.n_layers; encoder.layer++) {
    crew->run(crew, windows * forward.n_heads, attention, &encoder);
    crew->run(crew, encoder.blocks(), rest, &encoder);
  }
}

}  // namespace

void compute(const Forward& forward, Crew* crew, bool bfloat16_weights) {
  if (bfloat16_weights) {
    encode<bfloat16>(forward, crew);
  } else {
    encode<float>(forward, crew);
  }
}

}  // namespace FLAXQA_ISA
}  // namespace flaxqa
