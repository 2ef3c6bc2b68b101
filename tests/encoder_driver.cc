// Runs the encoder without Python on random shapes, for `make sanitize`: compiled with a sanitizer,
// once for each instruction set. Every buffer is exactly as large as the encoder may use.
//
//   encoder_driver SEED SHAPES
//
// Checks besides what the sanitizers see: the same logits, bit for bit, with one thread and with
// many, and of a window alone; numbers where weights are finite; 0 after the last window.

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "encoder.h"

namespace flaxqa {
namespace FLAXQA_ISA {
void compute(const Forward&, Crew*, bool bfloat16);
}

namespace {

std::mt19937_64 rng;

int64_t between(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(rng);
}

int64_t filled(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }

uint16_t shortened(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return uint16_t(bits >> 16);
}

// Numbers on the heap, with a sanitizer's fence right behind them.
struct Numbers {
  std::unique_ptr<char[]> bytes;

  Numbers(int64_t count, bool bfloat16, double size, bool broken) {
    std::normal_distribution<float> normal(0, float(size));
    bytes.reset(new char[size_t(count) * (bfloat16 ? 2 : 4)]);
    const float odd[] = {std::numeric_limits<float>::quiet_NaN(),
                         std::numeric_limits<float>::infinity(),
                         -std::numeric_limits<float>::infinity()};
    for (int64_t i = 0; i < count; i++) {
      float x = broken && between(0, 999) == 0 ? odd[between(0, 2)] : normal(rng);
      if (bfloat16) {
        uint16_t half = shortened(x);
        std::memcpy(bytes.get() + 2 * i, &half, 2);
      } else {
        std::memcpy(bytes.get() + 4 * i, &x, 4);
      }
    }
  }

  const float* floats() const { return reinterpret_cast<const float*>(bytes.get()); }
  const void* data() const { return bytes.get(); }
};

struct Threads : Crew {
  explicit Threads(int64_t n) {
    threads = n;
    run = [](Crew* self, int64_t count, void (*task)(void*, int64_t), void* context) {
      std::atomic<int64_t> next{0};
      auto work = [&] {
        for (int64_t index; (index = next.fetch_add(1)) < count;) task(context, index);
      };
      std::vector<std::thread> others;
      for (int64_t i = 1; i < self->threads && i < count; i++) others.emplace_back(work);
      work();
      for (auto& one : others) one.join();
    };
  }
};

struct Shape {
  int64_t heads, head, hidden, layers, types;
  bool bfloat16, broken;
  Activation activation;
};

struct Model {
  Shape shape;
  int64_t dim, width, wide, inner, deep, deep_hidden;
  std::vector<Numbers> all;
  Forward f{};

  explicit Model(const Shape& s) : shape(s) {
    bool b = s.bfloat16;
    dim = s.heads * s.head;
    width = filled(dim), wide = filled(3 * dim), inner = filled(s.hidden);
    deep = b ? (dim + 1) / 2 * 2 : dim;
    deep_hidden = b ? (s.hidden + 1) / 2 * 2 : s.hidden;
    f.dim = dim, f.hidden_dim = s.hidden, f.n_heads = s.heads, f.n_layers = s.layers;
    f.vocab_size = 50, f.max_positions = 512, f.token_types = s.types;
    f.epsilon = 1e-12f, f.activation = s.activation;
    auto made = [&](int64_t count, bool half, double size = 0.2) -> const Numbers& {
      return all.emplace_back(count, half, size, s.broken);
    };
    all.reserve(32);
    auto linear = [&](int64_t k, int64_t n) {
      const void* kernel = made(s.layers * k * n, b, 1 / std::sqrt(double(k))).data();
      return Linear{kernel, made(s.layers * n, false).floats()};
    };
    auto norm = [&](int64_t layers) {
      const float* scale = made(layers * width, false, 1.0).floats();
      return Norm{scale, made(layers * width, false).floats()};
    };
    f.word_embeddings = made(f.vocab_size * width, b).data();
    f.position_embeddings = made(f.max_positions * width, b).data();
    f.type_embeddings = made(f.token_types * width, b).data();
    f.embedding_norm = norm(1);
    f.qkv = linear(deep, wide);
    f.out = linear(deep, width);
    f.attention_norm = norm(s.layers);
    f.lin1 = linear(deep, inner);
    f.lin2 = linear(deep_hidden, width);
    f.output_norm = norm(s.layers);
    f.qa_outputs.kernel = made(deep * kPanel, b).data();
    f.qa_outputs.bias = made(kPanel, false).floats();
  }

  // The logits of windows one after the other in a row of so many tokens.
  std::vector<float> run(const std::vector<int32_t>& ids, const std::vector<int32_t>& lengths,
                         int64_t tokens, int64_t slots, int64_t threads) {
    size_t half = shape.bfloat16 ? 2 : 4;
    std::vector<int32_t> input(tokens), positions(tokens), types(tokens), starts(slots),
        sizes(slots);
    int64_t at = 0;
    for (size_t w = 0; w < lengths.size(); w++) {
      starts[w] = int32_t(at), sizes[w] = lengths[w];
      for (int32_t i = 0; i < lengths[w]; i++, at++) {
        input[at] = ids[at], positions[at] = i;
        types[at] = shape.types ? int32_t(i % shape.types) : 0;
      }
    }
    std::unique_ptr<float[]> hidden(new float[tokens * width]), logits(new float[tokens * 2]);
    std::unique_ptr<char[]> qkv(new char[tokens * wide * half]);
    std::unique_ptr<char[]> mixed(new char[tokens * width * half]);
    f.tokens = tokens, f.windows = slots;
    f.input_ids = input.data(), f.token_type_ids = types.data(), f.positions = positions.data();
    f.starts = starts.data(), f.lengths = sizes.data();
    f.hidden = hidden.get(), f.qkv_rows = qkv.get(), f.mixed = mixed.get();
    f.logits = logits.get();
    Threads crew(threads);
    FLAXQA_ISA::compute(f, &crew, shape.bfloat16);
    return {logits.get(), logits.get() + tokens * 2};
  }
};

[[noreturn]] void fail(const char* what, const Shape& s) {
  std::fprintf(stderr, "%s: %lld heads of %lld, hidden %lld, %lld layers, %s\n", what,
               (long long)s.heads, (long long)s.head, (long long)s.hidden, (long long)s.layers,
               s.bfloat16 ? "bfloat16" : "float32");
  std::exit(1);
}

bool same(const float* a, const float* b, int64_t count) {
  for (int64_t i = 0; i < count; i++)
    if (!(a[i] == b[i] || (std::isnan(a[i]) && std::isnan(b[i])))) return false;
  return true;
}

void one() {
  Shape s;
  s.bfloat16 = between(0, 1);
  s.heads = between(1, 5);
  s.head = s.bfloat16 ? 2 * between(1, 40) : between(1, 80);
  s.hidden = between(1, 400), s.layers = between(1, 3), s.types = between(0, 2);
  s.broken = between(0, 4) == 0;
  s.activation = between(0, 1) ? Activation::kGelu : Activation::kRelu;
  Model model(s);
  std::vector<int32_t> lengths;
  int64_t total = 0;
  for (int64_t w = between(0, 6); w > 0; w--) {
    lengths.push_back(int32_t(between(0, 3) ? between(1, 60) : between(1, 512)));
    total += lengths.back();
  }
  std::vector<int32_t> ids(total);
  for (auto& id : ids) id = int32_t(between(0, 49));
  int64_t tokens = total + between(0, 40), slots = int64_t(lengths.size()) + between(0, 3);
  auto logits = model.run(ids, lengths, tokens, slots, 1);
  auto again = model.run(ids, lengths, tokens, slots, between(2, 16));
  if (!same(logits.data(), again.data(), 2 * tokens)) fail("threads change logits", s);
  for (int64_t i = 2 * total; i < 2 * tokens; i++)
    if (logits[i] != 0) fail("a logit after the last window", s);
  if (!s.broken)
    for (float x : logits)
      if (!std::isfinite(x)) fail("a logit that is not finite", s);
  if (lengths.empty()) return;
  size_t chosen = size_t(between(0, int64_t(lengths.size()) - 1));
  int64_t begin = 0;
  for (size_t w = 0; w < chosen; w++) begin += lengths[w];
  std::vector<int32_t> own(ids.begin() + begin, ids.begin() + begin + lengths[chosen]);
  auto alone = model.run(own, {lengths[chosen]}, lengths[chosen], 1, 1);
  if (!same(alone.data(), logits.data() + 2 * begin, 2 * lengths[chosen]))
    fail("other windows change logits", s);
}

}  // namespace
}  // namespace flaxqa

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  flaxqa::rng.seed(std::strtoull(argv[1], nullptr, 10));
  int64_t shapes = std::strtoll(argv[2], nullptr, 10);
  for (int64_t i = 0; i < shapes; i++) flaxqa::one();
  std::printf("%lld shapes\n", (long long)shapes);
}
