// One decode step of a whole model: every text gets one more token. ggtool/kernels/host_step.py calls it.
//
// All threads are called once a step and not once a product. They meet between products, where a thread goes on as soon as
// the rows are done, not as soon as the others are there: one that the machine does not let run holds up nobody, unless it
// was stopped in the middle of some rows. Activations are float32, and so are keys and values.

#include <cmath>

#include "rows.h"

namespace ggtool {

// ctypes has the same structs: ggtool/kernels/host_step.py.
struct Part {
  const Format* format;
  const void *codes, *scales;
  int64_t scale_stride, has_half_scales, n_rows, n_columns;
  Matrix matrix() const { return {*format, codes, scales, scale_stride, static_cast<int>(has_half_scales), n_rows, n_columns}; }
};

struct Projection {
  const Part* parts;  // under each other
  int64_t n_parts;
  const float* bias;  // of all rows, or null
};

struct Norm {
  const float *weight, *bias;  // (n,); bias may be null
  double epsilon;
  int64_t is_layer_norm;  // or an RMSNorm
};

struct Layer {
  Norm attention_norm, feed_forward_norm;
  Projection projected, output, up, down;  // up of a gated model: the gate's part, then the other factor's
  const float *query_norm, *key_norm;      // (head_dim,), or null
};

struct Model {
  Part table;
  const float* positions;  // (positions, n_embd), or null
  const float* rotations;  // (positions, n_rotated / 2, 2): cosine and sine; or null
  const Layer* layers;
  Norm final_norm;
  Projection head;
  int64_t n_layers, n_embd, n_heads, n_kv_heads, head_dim, n_rotated, n_hidden, is_gated;
  double scale;
};

// A text's keys and values by layer, each (n_kv_heads, capacity, head_dim); `token` comes behind `position` others.
struct Text {
  float *const *keys, *const *values;
  int64_t capacity, position, token;
};

namespace {

// e^x to 2e-7 of itself, in operations that compilers do for several numbers at once.
inline float exponential(float x) {
  x = std::min(std::max(x, -87.0f), 88.0f);
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to whole numbers
  const float n = (x * 1.44269504f + magic) - magic;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

void gelu(float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float inner = 0.7978845608f * (x[i] + 0.044715f * x[i] * x[i] * x[i]);
    x[i] = x[i] - x[i] / (exponential(2.0f * inner) + 1.0f);  // x (1 + tanh(inner)) / 2
  }
}

void silu_times(float* gate, const float* other, int64_t n) {
  for (int64_t i = 0; i < n; ++i) gate[i] = gate[i] / (1.0f + exponential(-gate[i])) * other[i];
}

// sum of f(i) over n, where f gives sixteen numbers; `rest` one.
template <class Sixteen, class One>
inline float total(int64_t n, const Sixteen& sixteen, const One& one) {
  Lanes lanes = zero();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) lanes = sixteen(i, lanes);
  float all = sum(lanes);
  for (; i < n; ++i) all += one(i);
  return all;
}

inline float dot(const float* a, const float* b, int64_t n) {
  return total(
      n, [&](int64_t i, Lanes so_far) { return fma(load(a + i), load(b + i), so_far); },
      [&](int64_t i) { return a[i] * b[i]; });
}

void normalize(const Norm& norm, const float* x, int64_t n, float* to) {
  float mean = 0.0f;
  if (norm.is_layer_norm) {
    const Lanes ones = spread(1.0f);
    mean = total(
               n, [&](int64_t i, Lanes so_far) { return fma(load(x + i), ones, so_far); },
               [&](int64_t i) { return x[i]; }) / n;
  }
  for (int64_t i = 0; i < n; ++i) to[i] = x[i] - mean;
  const float factor = 1.0f / std::sqrt(dot(to, to, n) / n + static_cast<float>(norm.epsilon));
  for (int64_t i = 0; i < n; ++i) to[i] = to[i] * factor * norm.weight[i];
  for (int64_t i = 0; norm.bias && i < n; ++i) to[i] += norm.bias[i];
}

void rotate(float* head, const float* rotations, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float cosine = rotations[2 * i], sine = rotations[2 * i + 1], a = head[i], b = head[i + half];
    head[i] = a * cosine - b * sine;
    head[i + half] = b * cosine + a * sine;
  }
}

// Rows that all threads share: which are to be taken, and how many are done.
struct alignas(64) Stage {
  Tasks tasks;
  int64_t n;
  std::atomic<int64_t> n_done{0};
  void wait() const {
    for (int spins = 0; n_done.load(std::memory_order_acquire) < n; ++spins)
      if (spins < 4000) pause_briefly();
      else std::this_thread::yield();
  }
};

// What a thread keeps for itself: the inputs of a product, as each of its parts reads them.
struct Own {
  std::vector<float> normed, padded, laid_down, scores;
};

float* grown(std::vector<float>& room, int64_t n) {
  if (static_cast<int64_t>(room.size()) < n) room.resize(n);
  return room.data();
}

class Step {
 public:
  Step(const Model& model, const Text* texts, int64_t n_texts, float* logits, int n_threads)
      : model_(model), texts_(texts), n_texts_(n_texts), logits_(logits),
        n_projected_((model.n_heads + 2 * model.n_kv_heads) * model.head_dim),
        n_attended_(model.n_heads * model.head_dim), stages_(5 * model.n_layers + 1) {
    const int64_t n_hidden = model.n_hidden;
    x_.resize(n_texts * model.n_embd);
    projected_.resize(n_texts * n_projected_);
    attended_.resize(n_texts * n_attended_);
    hidden_.resize(n_texts * n_hidden * (model.is_gated ? 2 : 1));
    for (int64_t i = 0; i < model.n_layers; ++i) {
      const Layer& layer = model.layers[i];
      Stage* stages = &stages_[5 * i];
      begin(stages[0], layer.projected, n_projected_, n_threads);
      stages[1].tasks.begin(stages[1].n = n_texts * model.n_kv_heads, 1, n_threads);
      begin(stages[2], layer.output, model.n_embd, n_threads);
      begin(stages[3], layer.up, n_hidden, n_threads);
      begin(stages[4], layer.down, model.n_embd, n_threads);
    }
    begin(stages_.back(), model.head, model.head.parts->n_rows, n_threads);
    for (int64_t t = 0; t < n_texts; ++t) embed(texts[t], &x_[t * model.n_embd]);
  }

  // What every thread does; whoever comes first takes what is next.
  void run() {
    thread_local Own own;
    const int64_t n_embd = model_.n_embd, n_hidden = model_.n_hidden;
    float *x = x_.data(), *hidden = hidden_.data(), *other = hidden + n_texts_ * n_hidden;
    for (int64_t i = 0; i < model_.n_layers; ++i) {
      const Layer& layer = model_.layers[i];
      Stage* stages = &stages_[5 * i];
      multiply(stages[0], layer.projected, &layer.attention_norm, x, n_embd, projected_.data(), n_projected_, false, own);
      each(stages[1], [&](int64_t at, int64_t end) {
        for (; at < end; ++at) attend(layer, i, at / model_.n_kv_heads, at % model_.n_kv_heads, own);
      });
      multiply(stages[2], layer.output, nullptr, attended_.data(), n_attended_, x, n_embd, true, own);
      if (model_.is_gated) {
        bool is_prepared = false;
        each(stages[3], [&](int64_t at, int64_t end) {
          const float* from = input(&layer.feed_forward_norm, x, n_embd, is_prepared, own);
          const float* bias = layer.up.bias;
          product(layer.up.parts[0], from, bias, at, end, hidden, n_hidden, false, own);
          product(layer.up.parts[1], from, bias ? bias + n_hidden : nullptr, at, end, other, n_hidden, false, own);
          for (int64_t t = 0; t < n_texts_; ++t)
            silu_times(hidden + t * n_hidden + at, other + t * n_hidden + at, end - at);
        });
      } else {
        multiply(stages[3], layer.up, &layer.feed_forward_norm, x, n_embd, hidden, n_hidden, false, own,
                 [&](int64_t at, int64_t end) {
                   for (int64_t t = 0; t < n_texts_; ++t) gelu(hidden + t * n_hidden + at, end - at);
                 });
      }
      multiply(stages[4], layer.down, nullptr, hidden, n_hidden, x, n_embd, true, own);
    }
    const int64_t n_vocab = model_.head.parts->n_rows;
    multiply(stages_.back(), model_.head, &model_.final_norm, x, n_embd, logits_, n_vocab, false, own);
  }

 private:
  // A run of rows is at least as long as for the codes that a thread takes at a time.
  static void begin(Stage& stage, const Projection& projection, int64_t n, int n_threads) {
    stage.tasks.begin(stage.n = n, task_rows(projection.parts->matrix()), n_threads);
  }

  template <class Work>
  static void each(Stage& stage, const Work& work) {
    for (int64_t at, end; stage.tasks.take(at, end);) {
      work(at, end);
      stage.n_done.fetch_add(end - at, std::memory_order_release);
    }
    stage.wait();
  }

  // y = W norm(x) + bias, or y += that; `after` is called with the rows that were done.
  template <class After>
  void multiply(Stage& stage, const Projection& projection, const Norm* norm, const float* x, int64_t n_columns, float* y,
                int64_t y_stride, bool is_added, Own& own, const After& after) {
    bool is_prepared = false;
    each(stage, [&](int64_t at, int64_t end) {
      const float* from = input(norm, x, n_columns, is_prepared, own);
      int64_t first = 0;
      for (int64_t i = 0; i < projection.n_parts; ++i) {
        const Part& part = projection.parts[i];
        const int64_t begin = std::max(at - first, int64_t{0}), stop = std::min(end - first, part.n_rows);
        if (begin < stop)
          product(part, from, projection.bias ? projection.bias + first : nullptr, begin, stop, y + first, y_stride, is_added, own);
        first += part.n_rows;
      }
      after(at, end);
    });
  }

  void multiply(Stage& stage, const Projection& projection, const Norm* norm, const float* x, int64_t n_columns, float* y,
                int64_t y_stride, bool is_added, Own& own) {
    multiply(stage, projection, norm, x, n_columns, y, y_stride, is_added, own, [](int64_t, int64_t) {});
  }

  // Every thread normalizes for itself: it takes less time than to wait for who does it for all.
  const float* input(const Norm* norm, const float* x, int64_t n, bool& is_prepared, Own& own) const {
    if (!norm) return x;
    float* to = grown(own.normed, n_texts_ * n);
    for (int64_t t = 0; t < n_texts_ && !is_prepared; ++t) normalize(*norm, x + t * n, n, to + t * n);
    is_prepared = true;
    return to;
  }

  void product(const Part& part, const float* x, const float* bias, int64_t at, int64_t end, float* y, int64_t y_stride,
               bool is_added, Own& own) const {
    const Matrix matrix = part.matrix();
    const int64_t n = matrix.n_columns, n_padded = matrix.n_padded();
    if (n_padded != n) {
      float* to = grown(own.padded, n_texts_ * n_padded);
      for (int64_t t = 0; t < n_texts_; ++t) {
        std::memcpy(to + t * n_padded, x + t * n, n * sizeof(float));
        std::fill(to + t * n_padded + n, to + (t + 1) * n_padded, 0.0f);
      }
      x = to;
    }
    Product{matrix, laid_down(matrix, x, n_texts_, own.laid_down), n_texts_, bias, y, y_stride, is_added}.run(at, end);
  }

  void embed(const Text& text, float* x) const {
    const Matrix matrix = model_.table.matrix();
    const int64_t room = Scratch::floats(matrix);
    float* floats = thread_floats(room + matrix.n_padded() + kLanes);
    widen_row(matrix, text.token, Scratch(matrix, floats), floats + room);
    const float scale = matrix.format.kind == kInt8Rows ? matrix.row_scale(text.token) : 1.0f;
    const float* place = model_.positions ? model_.positions + text.position * model_.n_embd : nullptr;
    for (int64_t i = 0; i < model_.n_embd; ++i) x[i] = floats[room + i] * scale + (place ? place[i] : 0.0f);
  }

  // Store the key and value of one head of keys, and attend with all heads of queries that share it.
  void attend(const Layer& layer, int64_t index, int64_t t, int64_t kv_head, Own& own) {
    const Text& text = texts_[t];
    const int64_t width = model_.head_dim, shared = model_.n_heads / model_.n_kv_heads, n = text.position + 1;
    float* projected = &projected_[t * n_projected_];
    float* queries = projected + kv_head * shared * width;
    float* key = projected + (model_.n_heads + kv_head) * width;
    const float* value = key + model_.n_kv_heads * width;
    if (layer.key_norm) {
      const Norm of_queries{layer.query_norm, nullptr, layer.attention_norm.epsilon, false};
      const Norm of_keys{layer.key_norm, nullptr, layer.attention_norm.epsilon, false};
      for (int64_t i = 0; i < shared; ++i) normalize(of_queries, queries + i * width, width, queries + i * width);
      normalize(of_keys, key, width, key);
    }
    if (model_.rotations) {
      const float* rotations = model_.rotations + text.position * model_.n_rotated;
      for (int64_t i = 0; i < shared; ++i) rotate(queries + i * width, rotations, model_.n_rotated / 2);
      rotate(key, rotations, model_.n_rotated / 2);
    }
    float* keys = text.keys[index] + kv_head * text.capacity * width;
    float* values = text.values[index] + kv_head * text.capacity * width;
    std::memcpy(keys + text.position * width, key, width * sizeof(float));
    std::memcpy(values + text.position * width, value, width * sizeof(float));
    float* scores = grown(own.scores, shared * n);
    for (int64_t at = 0; at < n; ++at)
      for (int64_t i = 0; i < shared; ++i)
        scores[i * n + at] = dot(queries + i * width, keys + at * width, width) * static_cast<float>(model_.scale);
    float* attended = &attended_[t * n_attended_ + kv_head * shared * width];
    std::fill(attended, attended + shared * width, 0.0f);
    for (int64_t i = 0; i < shared; ++i) soften(scores + i * n, n);
    for (int64_t at = 0; at < n; ++at)
      for (int64_t i = 0; i < shared; ++i) {
        const float weight = scores[i * n + at];
        for (int64_t column = 0; column < width; ++column) attended[i * width + column] += weight * values[at * width + column];
      }
  }

  static void soften(float* scores, int64_t n) {
    float most = scores[0];
    for (int64_t i = 1; i < n; ++i) most = std::max(most, scores[i]);
    for (int64_t i = 0; i < n; ++i) scores[i] = exponential(scores[i] - most);
    const Lanes ones = spread(1.0f);
    const float all = total(
        n, [&](int64_t i, Lanes so_far) { return fma(load(scores + i), ones, so_far); },
        [&](int64_t i) { return scores[i]; });
    for (int64_t i = 0; i < n; ++i) scores[i] /= all;
  }

  const Model& model_;
  const Text* texts_;
  const int64_t n_texts_;
  float* logits_;
  const int64_t n_projected_, n_attended_;
  std::vector<Stage> stages_;
  std::vector<float> x_, projected_, attended_, hidden_;
};

}  // namespace
}  // namespace ggtool

extern "C" {

// Store each text's token and write the logits of the next one, float32 (n_texts, n_vocab).
void ggtool_step(const ggtool::Model* model, const ggtool::Text* texts, int64_t n_texts, float* logits, void* parallel,
                 int n_threads) {
  using namespace ggtool;
  // A step is as long as fifty products: fewer of them are done alone when others kept one waiting.
  static Company company(2, 64);
  Step step(*model, texts, n_texts, logits, n_threads);
  on_threads(reinterpret_cast<Parallel>(parallel), n_threads, company, [&] { step.run(); });
}

}  // extern "C"
