// Which of a few values is the nearest to each number, as torch.bucketize has it: half way, the lower one; a NaN is above all.

#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t kLanes = 16;

// The compiler makes them of whatever vectors the CPU has.
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Counts __attribute__((vector_size(4 * kLanes)));

}  // namespace

extern "C" {

// numbers (count,), bounds (n_bounds,) ascending, half way between the values; found (count,) gets how many bounds are below.
void ggtool_nearest(const float* numbers, int64_t count, const float* bounds, int64_t n_bounds, int32_t* found) {
  const int32_t all = static_cast<int32_t>(n_bounds);
  int64_t at = 0;
  for (; at + kLanes <= count; at += kLanes) {
    Floats some;
    std::memcpy(&some, numbers + at, sizeof some);
    Counts below = {};
    below += all;
    for (int64_t bound = 0; bound < n_bounds; ++bound) below += some <= bounds[bound];  // -1 where it holds
    std::memcpy(found + at, &below, sizeof below);
  }
  for (; at < count; ++at) {
    found[at] = all;
    for (int64_t bound = 0; bound < n_bounds; ++bound) found[at] -= numbers[at] <= bounds[bound];
  }
}

}  // extern "C"
