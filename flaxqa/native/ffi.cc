// The encoder as a custom call of XLA: checks what it is given, chooses the instruction set, and
// runs on XLA's own threads.

#include <atomic>
#include <condition_variable>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "encoder.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace flaxqa {
#define FLAXQA_DECLARE(isa)                            \
  namespace isa {                                      \
  void compute(const Forward&, Crew*, bool bfloat16); \
  }
FLAXQA_EACH_ISA(FLAXQA_DECLARE)

namespace {

struct Isa {
  const char* name;
  Compute compute;
};

// From the slowest to the fastest.
const Isa kIsas[] = {
#define FLAXQA_NAME(isa) {#isa, &isa::compute},
    FLAXQA_EACH_ISA(FLAXQA_NAME)};

#if defined(__x86_64__)
// Whether the processor says that it has all of some features: bits of what it tells of a leaf.
bool tells(unsigned leaf, bool ecx, std::initializer_list<int> bits) {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(leaf, 0, &a, &b, &c, &d)) return false;
  for (int bit : bits)
    if (((ecx ? c : b) >> bit & 1) == 0) return false;
  return true;
}
#endif

// A compiler that is told x86-64-v3 or v4 uses all of that level, so all of it is asked for, and
// that the system keeps the registers: __builtin_cpu_supports knows of that, but not of every
// feature in older compilers.
bool runs_here(std::string_view isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2 =
      __builtin_cpu_supports("avx2") &&
      // SSE3, SSSE3, FMA, CMPXCHG16B, SSE4.1, SSE4.2, MOVBE, POPCNT, XSAVE, OSXSAVE, AVX, F16C
      tells(1, true, {0, 9, 12, 13, 19, 20, 22, 23, 26, 27, 28, 29}) &&
      tells(7, false, {3, 5, 8}) &&         // BMI1, AVX2, BMI2
      tells(0x80000001u, true, {0, 5});     // LAHF, LZCNT
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                tells(7, false, {16, 17, 28, 30, 31});  // AVX-512 F, DQ, CD, BW, VL
  if (isa == "avx2") return avx2;
  if (isa == "avx512") return avx512;
  if (isa == "avx512bf16") return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return isa == "portable";
}

// One run of a task over its indices, shared by the threads that take part. Helpers may come late,
// even after the end: then they find nothing left, and nobody waits for them.
struct Run {
  int64_t count;
  void (*task)(void*, int64_t);
  void* context;
  std::atomic<int64_t> next{0}, done{0};
  std::mutex mutex;
  std::condition_variable finished;

  void take_part() {
    int64_t mine = 0;
    for (int64_t index; (index = next.fetch_add(1)) < count; mine++) task(context, index);
    if (mine != 0 && done.fetch_add(mine) + mine == count) {
      std::lock_guard<std::mutex> lock(mutex);
      finished.notify_all();
    }
  }

  void wait() {
    for (int spin = 0; spin < 4'000; spin++) {
      if (done.load() == count) return;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
    std::unique_lock<std::mutex> lock(mutex);
    finished.wait(lock, [&] { return done.load() == count; });
  }
};

struct XlaCrew : Crew {
  ffi::ThreadPool& pool;

  explicit XlaCrew(ffi::ThreadPool& threads) : pool(threads) {
    this->threads = pool.num_threads() > 1 ? pool.num_threads() : 1;
    this->run = [](Crew* self, int64_t count, void (*task)(void*, int64_t), void* context) {
      if (count == 0) return;
      auto run = std::make_shared<Run>();
      run->count = count;
      run->task = task;
      run->context = context;
      for (int64_t i = 1; i < self->threads && i < count; i++)
        static_cast<XlaCrew*>(self)->pool.Schedule([run] { run->take_part(); });
      run->take_part();
      run->wait();
    };
  }
};

using Ids = ffi::Buffer<ffi::S32, 1>;
using Floats = ffi::Buffer<ffi::F32>;

ffi::Error refused(const std::string& what) { return ffi::Error::InvalidArgument("flaxqa: " + what); }

ffi::Error forward(ffi::ThreadPool pool, Ids input_ids, Ids token_types, Ids positions, Ids starts,
                   Ids lengths, ffi::AnyBuffer word_embeddings, ffi::AnyBuffer position_embeddings,
                   ffi::AnyBuffer type_embeddings, Floats embedding_scale, Floats embedding_bias,
                   ffi::AnyBuffer qkv, Floats qkv_bias, ffi::AnyBuffer out, Floats out_bias,
                   Floats attention_scale, Floats attention_norm_bias, ffi::AnyBuffer lin1,
                   Floats lin1_bias, ffi::AnyBuffer lin2, Floats lin2_bias, Floats output_scale,
                   Floats output_norm_bias, ffi::AnyBuffer qa_outputs, Floats qa_bias,
                   ffi::Result<Floats> logits, ffi::Result<Floats> hidden,
                   ffi::Result<ffi::AnyBuffer> qkv_rows, ffi::Result<ffi::AnyBuffer> mixed,
                   std::string_view isa, std::string_view activation, int64_t dim,
                   int64_t hidden_dim, int64_t n_heads, float epsilon) {
  Forward f{};
  f.tokens = int64_t(input_ids.element_count());
  f.windows = int64_t(starts.element_count());
  f.dim = dim;
  f.hidden_dim = hidden_dim;
  f.n_heads = n_heads;
  f.epsilon = epsilon;
  if (activation == "gelu") {
    f.activation = Activation::kGelu;
  } else if (activation == "relu") {
    f.activation = Activation::kRelu;
  } else {
    return refused("no activation " + std::string(activation));
  }

  auto dtype = qkv.element_type();
  bool bfloat16 = dtype == ffi::BF16;
  if (!bfloat16 && dtype != ffi::F32) return refused("weights are neither float32 nor bfloat16");
  for (const auto& one : {word_embeddings, position_embeddings, type_embeddings, out, lin1, lin2,
                          qa_outputs, *qkv_rows, *mixed})
    if (one.element_type() != dtype) return refused("weights of several types");

  // The sizes of all buffers follow from a few numbers.
  auto filled = [](int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; };
  auto deep = [&](int64_t n) { return bfloat16 ? (n + 1) / 2 * 2 : n; };
  if (dim < 1 || hidden_dim < 1 || n_heads < 1 || dim % n_heads != 0)
    return refused("sizes that cannot be");
  if (bfloat16 && (dim / n_heads) % 2 != 0) return refused("heads of an odd size in bfloat16");
  int64_t width = filled(dim), wide = filled(3 * dim), inner = filled(hidden_dim);
  f.n_layers = int64_t(out_bias.element_count()) / width;
  f.vocab_size = int64_t(word_embeddings.element_count()) / width;
  f.max_positions = int64_t(position_embeddings.element_count()) / width;
  f.token_types = int64_t(type_embeddings.element_count()) / width;
  struct Size {
    const char* name;
    size_t got;
    int64_t wanted;
  };
  int64_t n = f.n_layers;
  for (const Size& one : {
           Size{"token_types", token_types.element_count(), f.tokens},
           Size{"positions", positions.element_count(), f.tokens},
           Size{"lengths", lengths.element_count(), f.windows},
           Size{"word_embeddings", word_embeddings.element_count(), f.vocab_size * width},
           Size{"position_embeddings", position_embeddings.element_count(),
                f.max_positions * width},
           Size{"type_embeddings", type_embeddings.element_count(), f.token_types * width},
           Size{"embedding_norm", embedding_scale.element_count(), width},
           Size{"embedding_norm", embedding_bias.element_count(), width},
           Size{"qkv", qkv.element_count(), n * deep(dim) * wide},
           Size{"qkv", qkv_bias.element_count(), n * wide},
           Size{"out", out.element_count(), n * deep(dim) * width},
           Size{"out", out_bias.element_count(), n * width},
           Size{"attention_norm", attention_scale.element_count(), n * width},
           Size{"attention_norm", attention_norm_bias.element_count(), n * width},
           Size{"lin1", lin1.element_count(), n * deep(dim) * inner},
           Size{"lin1", lin1_bias.element_count(), n * inner},
           Size{"lin2", lin2.element_count(), n * deep(hidden_dim) * width},
           Size{"lin2", lin2_bias.element_count(), n * width},
           Size{"output_norm", output_scale.element_count(), n * width},
           Size{"output_norm", output_norm_bias.element_count(), n * width},
           Size{"qa_outputs", qa_outputs.element_count(), deep(dim) * kPanel},
           Size{"qa_outputs", qa_bias.element_count(), kPanel},
           Size{"logits", logits->element_count(), f.tokens * 2},
           Size{"hidden", hidden->element_count(), f.tokens * width},
           Size{"qkv_rows", qkv_rows->element_count(), f.tokens * wide},
           Size{"mixed", mixed->element_count(), f.tokens * width},
       })
    if (int64_t(one.got) != one.wanted)
      return refused(std::string(one.name) + " of " + std::to_string(one.got) + " numbers, not " +
                     std::to_string(one.wanted));

  f.input_ids = input_ids.typed_data();
  f.token_type_ids = token_types.typed_data();
  f.positions = positions.typed_data();
  f.starts = starts.typed_data();
  f.lengths = lengths.typed_data();
  f.word_embeddings = word_embeddings.untyped_data();
  f.position_embeddings = position_embeddings.untyped_data();
  f.type_embeddings = type_embeddings.untyped_data();
  f.embedding_norm = {embedding_scale.typed_data(), embedding_bias.typed_data()};
  f.qkv = {qkv.untyped_data(), qkv_bias.typed_data()};
  f.out = {out.untyped_data(), out_bias.typed_data()};
  f.attention_norm = {attention_scale.typed_data(), attention_norm_bias.typed_data()};
  f.lin1 = {lin1.untyped_data(), lin1_bias.typed_data()};
  f.lin2 = {lin2.untyped_data(), lin2_bias.typed_data()};
  f.output_norm = {output_scale.typed_data(), output_norm_bias.typed_data()};
  f.qa_outputs = {qa_outputs.untyped_data(), qa_bias.typed_data()};
  f.hidden = hidden->typed_data();
  f.qkv_rows = qkv_rows->untyped_data();
  f.mixed = mixed->untyped_data();
  f.logits = logits->typed_data();

  // What a device would read past a table without an error.
  auto outside = [](const char* name, const int32_t* values, int64_t count, int64_t end) {
    for (int64_t i = 0; i < count; i++)
      if (values[i] < 0 || values[i] >= end)
        return std::string(name) + " has the value " + std::to_string(values[i]) +
               ", it must be from 0 to " + std::to_string(end - 1);
    return std::string();
  };
  std::string problem = outside("input_ids", f.input_ids, f.tokens, f.vocab_size);
  if (problem.empty()) problem = outside("positions", f.positions, f.tokens, f.max_positions);
  if (problem.empty() && f.token_types)
    problem = outside("token_types", f.token_type_ids, f.tokens, f.token_types);
  if (!problem.empty()) return refused(problem);
  // What lies in no window is not computed, so that there is nothing to be read between two.
  int64_t end = 0;
  bool ended = false;
  for (int64_t w = 0; w < f.windows; w++) {
    std::string called = "window " + std::to_string(w);
    if (f.starts[w] < 0 || f.lengths[w] < 0 || int64_t(f.starts[w]) + f.lengths[w] > f.tokens)
      return refused(called + " is not inside the row");
    if (f.lengths[w] == 0) {
      ended = true;
    } else if (ended) {
      return refused(called + " comes after an empty one");
    } else if (f.starts[w] != end) {
      return refused(called + " does not begin where the one before it ends");
    }
    end += f.lengths[w];
  }

  for (const Isa& one : kIsas)
    if (isa == one.name && runs_here(isa)) {
      XlaCrew crew(pool);
      one.compute(f, &crew, bfloat16);
      return ffi::Error::Success();
    }
  return refused("this processor has no " + std::string(isa));
}

}  // namespace

// These two are all that the library shows.
#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(flaxqa_forward, forward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Ids>()
                                  .Arg<Ids>()
                                  .Arg<Ids>()
                                  .Arg<Ids>()
                                  .Arg<Ids>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Floats>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Floats>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<std::string_view>("instruction_set")
                                  .Attr<std::string_view>("activation")
                                  .Attr<int64_t>("dim")
                                  .Attr<int64_t>("hidden_dim")
                                  .Attr<int64_t>("n_heads")
                                  .Attr<float>("epsilon"));

// The instruction sets that were compiled and that this processor has, the fastest last, with
// spaces between.
extern "C" const char* flaxqa_instruction_sets() {
  static const std::string names = [] {
    std::string joined;
    for (const Isa& one : kIsas)
      if (runs_here(one.name)) joined += (joined.empty() ? "" : " ") + std::string(one.name);
    return joined;
  }();
  return names.c_str();
}

#pragma GCC visibility pop

}  // namespace flaxqa
