// Products of some rows of a packed matrix with float32 activations, which are never rounded. A row's sum is made by one
// thread, in an order that depends on the shape alone, so that results are the same for every number of threads.
#pragma once

#include "formats.h"
#include "threads.h"

namespace ggtool {

constexpr int kRows = 4;               // rows of W at once, so that a load of x serves four
constexpr int64_t kTaskBytes = 16384;  // codes that a thread takes at least: one that is slow holds up little

inline int64_t task_rows(const Matrix& matrix) {
  const int64_t rows = kTaskBytes / std::max<int64_t>(matrix.row_bytes(), 1) / kRows * kRows;
  return std::max<int64_t>(rows, kRows);
}

// Return x (n_inputs, n_padded) as products with `matrix` read it: as it is, or in another order in `room`.
const float* laid_down(const Matrix& matrix, const float* x, int64_t n_inputs, std::vector<float>& room);

struct Product {
  const Matrix& matrix;
  const float* x;  // (n_inputs, n_padded), zeros beyond the columns; as `laid_down` returns it
  int64_t n_inputs;
  const float* bias;
  float* y;  // (n_inputs, n_rows), `y_stride` from input to input
  int64_t y_stride;
  bool is_added = false;  // to what is there

  // Do rows [at, end) with all inputs.
  void run(int64_t at, int64_t end) const;
};

}  // namespace ggtool
