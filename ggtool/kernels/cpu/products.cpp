// Products of float32 activations with packed matrices, behind a plain C interface: ggtool/kernels/native.py calls it.
//
// Activations are never rounded. A row's sum is made by one thread, in an order that depends on the shape alone, so
// that results are the same for every number of threads. No thread is started here: the caller hands over the
// GOMP_parallel of the OpenMP that torch runs on, so that there is one pool and not two that spin against each other.

#include "rows.h"

namespace ggtool {
namespace {

constexpr int64_t kThreadBytes = 65536;  // fewer codes are not worth waking a thread

int threads_for(const Matrix& matrix, int64_t n_inputs, int n_threads) {
  return matrix.n_rows * matrix.row_bytes() * n_inputs < kThreadBytes ? 1 : n_threads;
}

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
  thread_local std::vector<float> room;
  const Product product{matrix, laid_down(matrix, x, n_inputs, room), n_inputs, bias, y, n_rows};
  for_rows(reinterpret_cast<Parallel>(parallel), threads_for(matrix, n_inputs, n_threads), n_rows, task_rows(matrix),
           [&](int64_t at, int64_t end) { product.run(at, end); });
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
