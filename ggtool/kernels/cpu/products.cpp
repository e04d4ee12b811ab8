// Products of float32 activations with packed matrices, behind a plain C interface: ggtool/kernels/native.py calls it.
//
// Activations are never rounded. A row's sum is made by one thread, in an order that depends on the shape alone, so
// that results are the same for every number of threads. No thread is started here: the caller hands over the
// GOMP_parallel of the OpenMP that torch runs on, so that there is one pool and not two that spin against each other.

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "formats.h"

namespace ggtool {
namespace {

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using Clock = std::chrono::steady_clock;

constexpr int kRows = 4;            // rows of W at once, so that a load of x serves four
constexpr int64_t kTaskBytes = 32768;     // codes that a thread takes at a time: one that is slow holds up little
constexpr int64_t kThreadBytes = 65536;   // fewer codes are not worth waking a thread

// Whether to call upon other threads. On a busy machine a thread may wait milliseconds for a core, and OpenMP's barriers
// wait with it, before and after work that takes microseconds. When they did, the next calls are done alone: 32 of
// them, and each time that it happens again twice as many.
class Company {
 public:
  bool is_wanted() { return alone_.load(std::memory_order_relaxed) <= 0 || alone_.fetch_sub(1) <= 0; }
  void waited(Clock::duration time) {
    const int next = time < kLongWait ? kFewest : std::min(2 * pause_.load(), kMost);
    if (time >= kLongWait) alone_.store(next / 2);
    pause_.store(next);
  }

 private:
  static constexpr Clock::duration kLongWait = std::chrono::microseconds(500);
  static constexpr int kFewest = 32, kMost = 4096;
  std::atomic<int> alone_{0}, pause_{kFewest};
} company;

// Have rows [0, n) done in tasks of `step`, whichever thread comes first; a thread that comes late finds none left.
template <class Work>
void for_rows(Parallel parallel, int n_threads, int64_t n, int64_t step, const Work& work) {
  struct Shared {
    const Work& work;
    const int64_t n, step;
    std::atomic<int64_t> next{0};
    const std::thread::id caller = std::this_thread::get_id();
    Clock::time_point started{}, done{};
  } shared{work, n, step};
  const auto run = [](void* data) {
    Shared& all = *static_cast<Shared*>(data);
    const bool is_caller = std::this_thread::get_id() == all.caller;
    if (is_caller) all.started = Clock::now();
    for (int64_t at; (at = all.next.fetch_add(all.step, std::memory_order_relaxed)) < all.n;)
      all.work(at, std::min(at + all.step, all.n));
    if (is_caller) all.done = Clock::now();
  };
  if (!parallel || n_threads < 2 || n <= step || !company.is_wanted()) {
    run(&shared);
    return;
  }
  const Clock::time_point called = Clock::now();
  parallel(run, &shared, static_cast<unsigned>(n_threads), 0);
  company.waited((shared.started - called) + (Clock::now() - shared.done));
}

int64_t task_rows(const Matrix& matrix) {
  const int64_t rows = kTaskBytes / std::max<int64_t>(matrix.row_bytes(), 1) / kRows * kRows;
  return std::max<int64_t>(rows, kRows);
}

int threads_for(const Matrix& matrix, int64_t n_inputs, int n_threads) {
  return matrix.n_rows * matrix.row_bytes() * n_inputs < kThreadBytes ? 1 : n_threads;
}

float* thread_floats(int64_t n) {
  thread_local std::vector<float> kept;
  if (static_cast<int64_t>(kept.size()) < n) kept.resize(n);
  return kept.data();
}

// A row is shorter than what memory needs to answer, and the processor's own prefetching ends with a page: ask for the
// codes some rows ahead, which are those of the next tasks too.
template <int64_t kAheadBytes>
inline void prefetch(const void* codes) {
  __builtin_prefetch(static_cast<const char*>(codes) + kAheadBytes);
}

// Call `step(at, weights)` for n codes, sixteen at a time; what is missing of the last sixteen is zeros.
template <class Step>
inline void rest_of_int8(const int8_t* codes, int64_t at, int64_t n, const Step& step) {
  for (; at < n; at += kLanes) {
    int8_t rest[kLanes] = {};
    std::memcpy(rest, codes + at, std::min<int64_t>(n - at, kLanes));
    step(at, widen_int8(rest));
  }
}

// codes[row] . x for one input. Row after row is one stream, which memory serves faster than four side by side.
inline float stream_int8(const Matrix& matrix, int64_t row, const float* x) {
  const int8_t* codes = reinterpret_cast<const int8_t*>(matrix.row(row));
  Lanes total[4] = {zero(), zero(), zero(), zero()};
  int64_t at = 0;
  for (; at + 4 * kLanes <= matrix.n_columns; at += 4 * kLanes) {
    prefetch<2048>(codes + at);
    for (int i = 0; i < 4; ++i) {
      const int64_t here = at + i * kLanes;
      total[i] = fma(widen_int8(codes + here), load(x + here), total[i]);
    }
  }
  rest_of_int8(codes, at, matrix.n_columns,
               [&](int64_t here, Lanes weights) { total[0] = fma(weights, load(x + here), total[0]); });
  return sum(add(add(total[0], total[1]), add(total[2], total[3])));
}

// sums[r * M + m] = codes[r] . x[m] for R rows of int8 and M inputs.
template <int R, int M>
void dot_int8(const Matrix& matrix, int64_t row, const float* x, float* sums) {
  const int8_t* codes = reinterpret_cast<const int8_t*>(matrix.row(row));
  const int64_t n = matrix.n_columns, n_padded = matrix.n_padded();
  Lanes total[R][M];
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) total[r][m] = zero();
  const auto step = [&](int64_t at, int r, Lanes weights) {
    for (int m = 0; m < M; ++m) total[r][m] = fma(weights, load(x + m * n_padded + at), total[r][m]);
  };
  int64_t at = 0;
  for (; at + 4 * kLanes <= n; at += 4 * kLanes) {
    for (int r = 0; r < R; ++r) prefetch<4096>(codes + r * n + at);
    for (int part = 0; part < 4 * kLanes; part += kLanes)
      for (int r = 0; r < R; ++r) step(at + part, r, widen_int8(codes + r * n + at + part));
  }
  for (int r = 0; r < R; ++r)
    rest_of_int8(codes + r * n, at, n, [&](int64_t here, Lanes weights) { step(here, r, weights); });
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) sums[r * M + m] = sum(total[r][m]);
}

// sums[r * M + m] = W[r] . x[m] for R rows of one 16-value plane and M inputs.
template <int R, int M>
void dot_table(const Matrix& matrix, int64_t row, const float* x, float* sums) {
  const Table values(matrix.format.tables[0]);
  const int64_t n_groups = matrix.n_groups(), n_padded = matrix.n_padded(), stride = matrix.row_bytes();
  const int half = matrix.format.group / 2;
  const uint8_t* codes = matrix.row(row);
  float* scales = thread_floats(R * (n_groups + kLanes));
  for (int r = 0; r < R; ++r) matrix.read_scales(row + r, scales + r * (n_groups + kLanes));
  Lanes total[R][M];
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) total[r][m] = zero();
  for (int64_t g = 0; g < n_groups; ++g, x += 2 * half, codes += half) {
    for (int at = 0; at < half; at += kLanes) {
      for (int r = 0; r < R; ++r) {
        prefetch<4096>(codes + r * stride + at);
        const Codes both = bytes(codes + r * stride + at);
        const Lanes scale = spread(scales[r * (n_groups + kLanes) + g]);
        const Lanes low = mul(values[both], scale), high = mul(values[shift_right(both, 4)], scale);
        for (int m = 0; m < M; ++m) {
          total[r][m] = fma(low, load(x + m * n_padded + at), total[r][m]);
          total[r][m] = fma(high, load(x + m * n_padded + half + at), total[r][m]);
        }
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) sums[r * M + m] = sum(total[r][m]);
}

// sums[r * M + m] = rows[r] . x[m] for R widened rows and M inputs, n floats of each.
template <int R, int M>
void dot_floats(const float* rows, int64_t row_stride, const float* x, int64_t n, float* sums) {
  Lanes total[R][M];
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) total[r][m] = zero();
  for (int64_t at = 0; at < n; at += kLanes) {
    Lanes weights[R];
    for (int r = 0; r < R; ++r) weights[r] = load(rows + r * row_stride + at);
    for (int m = 0; m < M; ++m) {
      const Lanes inputs = load(x + m * n + at);
      for (int r = 0; r < R; ++r) total[r][m] = fma(weights[r], inputs, total[r][m]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) sums[r * M + m] = sum(total[r][m]);
}

struct Product {
  const Matrix& matrix;
  const float* x;  // (n_inputs, n_padded), zeros beyond the columns
  int64_t n_inputs;
  const float* bias;
  float* y;  // (n_inputs, n_rows)

  void put(int64_t row, int64_t input, float sum) const {
    if (matrix.format.kind == kInt8Rows) sum *= matrix.row_scale(row);
    y[input * matrix.n_rows + row] = bias ? sum + bias[row] : sum;
  }

  // R rows from `row` on with all inputs.
  template <int R>
  void rows(int64_t row) const {
    const int64_t room = Scratch::floats(matrix), stride = matrix.n_padded() + kLanes;
    const float* widened = nullptr;
    if (matrix.format.kind != kInt8Rows && !matrix.is_table_of_16()) {
      float* floats = thread_floats(room + R * stride);
      for (int r = 0; r < R; ++r) widen_row(matrix, row + r, Scratch(matrix, floats), floats + room + r * stride);
      widened = floats + room;
    }
    int64_t input = 0;
    for (; input + 4 <= n_inputs; input += 4) block<R, 4>(row, input, widened);
    if (input + 2 <= n_inputs) block<R, 2>(row, input, widened), input += 2;
    if (input < n_inputs) block<R, 1>(row, input, widened);
  }

  template <int R, int M>
  void block(int64_t row, int64_t input, const float* widened) const {
    float sums[R * M];
    const int64_t n = matrix.n_padded();
    if (widened)
      dot_floats<R, M>(widened, n + kLanes, x + input * n, n, sums);
    else if (matrix.format.kind == kInt8Rows && M == 1)
      for (int r = 0; r < R; ++r) sums[r] = stream_int8(matrix, row + r, x + input * n);
    else if (matrix.format.kind == kInt8Rows)
      dot_int8<R, M>(matrix, row, x + input * n, sums);
    else
      dot_table<R, M>(matrix, row, x + input * n, sums);
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m) put(row + r, input + m, sums[r * M + m]);
  }
};

}  // namespace
}  // namespace ggtool

extern "C" {

const char* ggtool_instructions() { return ggtool::kInstructions; }

// y = x @ W.T + bias. x: float32 (n_inputs, n_padded). bias: float32 (n_rows,) or null. y: float32 (n_inputs, n_rows).
void ggtool_product(const ggtool::Format* format, const void* codes, const void* scales, int64_t scale_stride,
                    int has_half_scales, int64_t n_rows, int64_t n_columns, const float* x, int64_t n_inputs, const float* bias, float* y,
                    void* parallel, int n_threads) {
  using namespace ggtool;
  const Matrix matrix{*format, codes, scales, scale_stride, has_half_scales, n_rows, n_columns};
  const Product product{matrix, x, n_inputs, bias, y};
  for_rows(reinterpret_cast<Parallel>(parallel), threads_for(matrix, n_inputs, n_threads), n_rows, task_rows(matrix),
           [&](int64_t row, int64_t end) {
             for (; row + kRows <= end; row += kRows) product.rows<kRows>(row);
             for (; row < end; ++row) product.rows<1>(row);
           });
}

// Write W, or for kInt8Rows its codes, as float32 (n_rows, n_columns).
void ggtool_widen(const ggtool::Format* format, const void* codes, const void* scales, int64_t scale_stride,
                  int has_half_scales, int64_t n_rows, int64_t n_columns, float* to, void* parallel, int n_threads) {
  using namespace ggtool;
  const Matrix matrix{*format, codes, scales, scale_stride, has_half_scales, n_rows, n_columns};
  for_rows(reinterpret_cast<Parallel>(parallel), threads_for(matrix, 4, n_threads), n_rows, task_rows(matrix),
           [&](int64_t row, int64_t end) {
             const int64_t room = Scratch::floats(matrix);
             float* floats = thread_floats(room + matrix.n_padded() + kLanes);
             for (const Scratch scratch(matrix, floats); row < end; ++row) {
               widen_row(matrix, row, scratch, floats + room);
               std::memcpy(to + row * n_columns, floats + room, n_columns * sizeof(float));
             }
           });
}

}  // extern "C"
