// The nearest of a book of vectors under a quadratic error: ggtool/kernels/vector_search.py has the same search in numpy.

#include <algorithm>
#include <cstdint>
#include <limits>

namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kSize = 4;  // numbers of a vector

// The compiler makes them of whatever vectors the CPU has.
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Masks __attribute__((vector_size(4 * kLanes)));

}  // namespace

// For each row the k of least scale^2 norms[k] - 2 scale (pulled, book[k]). book: (n, 4), norms: (n,), pulled: (n_rows, 4), scales, found: (n_rows,).
extern "C" void ggtool_nearest_vector(const float* book, const float* norms, int64_t n, const float* pulled, const float* scales,
                               int32_t* found, int64_t n_rows) {
  for (int64_t first = 0; first < n_rows; first += kLanes) {
    Floats squares, pull[kSize];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t row = std::min(first + lane, n_rows - 1);
      squares[lane] = scales[row] * scales[row];
      for (int64_t i = 0; i < kSize; ++i) pull[i][lane] = -2 * scales[row] * pulled[row * kSize + i];
    }
    Floats least;
    Masks at{};
    for (int64_t lane = 0; lane < kLanes; ++lane) least[lane] = std::numeric_limits<float>::infinity();
    for (int64_t k = 0; k < n; ++k) {
      const float* entry = book + k * kSize;
      const Floats cost = squares * norms[k] + (pull[0] * entry[0] + pull[1] * entry[1]) + (pull[2] * entry[2] + pull[3] * entry[3]);
      const Masks is_less = cost < least;
      const Masks here = Masks{} + static_cast<int32_t>(k);
      least = is_less ? cost : least;
      at = is_less ? here : at;
    }
    const int64_t n_here = std::min(kLanes, n_rows - first);
    for (int64_t lane = 0; lane < n_here; ++lane) found[first + lane] = at[lane];
  }
}
