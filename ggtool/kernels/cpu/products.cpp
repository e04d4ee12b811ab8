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
constexpr int kInputs = 4;          // rows of x at once, so that a widened row serves four
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

// sums[r] = codes[r] . x for R rows of int8.
template <int R>
void dot_int8(const Matrix& matrix, int64_t row, const float* x, float* sums) {
  const int8_t* codes = reinterpret_cast<const int8_t*>(matrix.row(row));
  const int64_t n = matrix.n_columns;
  Lanes total[R];
  for (int r = 0; r < R; ++r) total[r] = zero();
  int64_t at = 0;
  for (; at + kLanes <= n; at += kLanes) {
    const Lanes inputs = load(x + at);
    for (int r = 0; r < R; ++r) total[r] = fma(widen_int8(codes + r * n + at), inputs, total[r]);
  }
  if (at < n) {
    const Lanes inputs = load(x + at);
    for (int r = 0; r < R; ++r) {
      int8_t rest[kLanes] = {};
      std::memcpy(rest, codes + r * n + at, n - at);
      total[r] = fma(widen_int8(rest), inputs, total[r]);
    }
  }
  for (int r = 0; r < R; ++r) sums[r] = sum(total[r]);
}

// sums[r] = W[r] . x for R rows of one 16-value plane; `scales` has room for R rows of them.
template <int R>
void dot_table(const Matrix& matrix, const Table& values, int64_t row, const float* x, float* scales, float* sums) {
  const int64_t n_groups = matrix.n_groups(), stride = matrix.row_bytes();
  const int half = matrix.format.group / 2;
  const uint8_t* codes = matrix.row(row);
  for (int r = 0; r < R; ++r) matrix.read_scales(row + r, scales + r * (n_groups + kLanes));
  Lanes total[R];
  for (int r = 0; r < R; ++r) total[r] = zero();
  for (int64_t g = 0; g < n_groups; ++g, x += 2 * half) {
    for (int at = 0; at < half; at += kLanes) {
      const Lanes low = load(x + at), high = load(x + half + at);
      for (int r = 0; r < R; ++r) {
        const Codes both = bytes(codes + r * stride + g * half + at);
        const Lanes part = fma(values[shift_right(both, 4)], high, mul(values[both], low));
        total[r] = fma(part, spread(scales[r * (n_groups + kLanes) + g]), total[r]);
      }
    }
  }
  for (int r = 0; r < R; ++r) sums[r] = sum(total[r]);
}

// sums[r * M + m] = rows[r] . x[m] for R widened rows and M inputs, both `stride` floats apart, n of them counted.
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

template <int R>
void dot_floats(const float* rows, int64_t row_stride, const float* x, int64_t n, int n_inputs, float* sums) {
  switch (n_inputs) {
    case 1: return dot_floats<R, 1>(rows, row_stride, x, n, sums);
    case 2: return dot_floats<R, 2>(rows, row_stride, x, n, sums);
    case 3: return dot_floats<R, 3>(rows, row_stride, x, n, sums);
    default: return dot_floats<R, 4>(rows, row_stride, x, n, sums);
  }
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

  // R rows from `row` on.
  template <int R>
  void rows(int64_t row) const {
    float sums[R * kInputs];
    const int64_t n = matrix.n_padded();
    const int64_t room = Scratch::floats(matrix), stride = n + kLanes;
    if (n_inputs == 1 && (matrix.format.kind == kInt8Rows || matrix.is_table_of_16())) {
      if (matrix.format.kind == kInt8Rows)
        dot_int8<R>(matrix, row, x, sums);
      else
        dot_table<R>(matrix, Table(matrix.format.tables[0]), row, x, thread_floats(R * (matrix.n_groups() + kLanes)), sums);
      for (int r = 0; r < R; ++r) put(row + r, 0, sums[r]);
      return;
    }
    float* floats = thread_floats(room + R * stride);
    const Scratch scratch(matrix, floats);
    for (int r = 0; r < R; ++r) widen_row(matrix, row + r, scratch, floats + room + r * stride);
    for (int64_t first = 0; first < n_inputs; first += kInputs) {
      const int count = static_cast<int>(std::min<int64_t>(kInputs, n_inputs - first));
      dot_floats<R>(floats + room, stride, x + first * n, n, count, sums);
      for (int r = 0; r < R; ++r)
        for (int m = 0; m < count; ++m) put(row + r, first + m, sums[r * count + m]);
    }
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
