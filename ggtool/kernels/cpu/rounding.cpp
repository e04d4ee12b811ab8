// Rounding rows to the grids of GGUF's tensor types under the output error (q - w) H (q - w)': error feedback over columns,
// and descents that never raise the error. Rows are independent; the caller gives each thread some of them.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "lanes.h"

namespace {

constexpr int kMaxLevels = 256;
constexpr int kMaxGroup = 32;
constexpr int kRowsAtOnce = 16;    // they share each row of H while it is in the cache
constexpr int64_t kPanel = 256;  // columns that are moved before the rest of a row's gradient follows; a multiple of all blocks

// ctypes has the same structs: ggtool/kernels/rounding.py. See ggtool/gguf/grids.py for what the numbers mean.
struct Grid {
  int32_t n_levels, group, block;
  int32_t least_scale, largest_scale, max_minimum;
  float levels[kMaxLevels];
};

struct Rows {
  int64_t n_rows, n_columns;
  uint8_t* codes;
  int16_t* scales;
  int16_t* minimums;
  float* d;
  float* dmin;
};

float from_half(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = half >> 10 & 31, mantissa = half & 1023;
  if (exponent == 0) {
    const float small = std::ldexp(float(mantissa), -24);
    return sign ? -small : small;
  }
  const uint32_t bits = exponent == 31 ? sign | 0x7f800000 | mantissa << 13 : sign | (exponent + 112) << 23 | mantissa << 13;
  float found;
  std::memcpy(&found, &bits, sizeof found);
  return found;
}

// The nearest float16, ties to even, as a float; what float16 cannot hold becomes its largest number.
float to_half(float value) {
  const float magnitude = std::min(std::fabs(value), 65504.0f);
  uint16_t half;
  if (magnitude < 6.103515625e-05f) {
    half = uint16_t(std::nearbyint(std::ldexp(magnitude, 24)));
  } else {
    uint32_t bits;
    std::memcpy(&bits, &magnitude, sizeof bits);
    bits += 0xfff + (bits >> 13 & 1);
    half = uint16_t((bits >> 13) - (112 << 10));
  }
  const float found = from_half(std::min<uint16_t>(half, 0x7bff));
  return value < 0 ? -found : found;
}

class Rounder {
 public:
  explicit Rounder(const Grid& grid) : grid_(grid), uniform_(true) {
    for (int at = 1; at < grid.n_levels; ++at) {
      uniform_ = uniform_ && grid.levels[at] == grid.levels[at - 1] + 1;
      middles_[at - 1] = (grid.levels[at] + grid.levels[at - 1]) / 2;
    }
  }

  // The code whose value is nearest; 0 where the scale is 0 and all values are one.
  int nearest(float weight, float scale, float minimum) const {
    if (scale == 0) return 0;
    const float level = (weight + minimum) / scale;
    if (uniform_) {
      const float index = std::nearbyint(level - grid_.levels[0]);
      return int(std::min(std::max(index, 0.0f), float(grid_.n_levels - 1)));
    }
    int code = 0;
    for (int at = 0; at + 1 < grid_.n_levels; ++at) code += level > middles_[at];
    return code;
  }
  float value(int code, float scale, float minimum) const { return scale * grid_.levels[code] - minimum; }

 private:
  const Grid& grid_;
  bool uniform_;
  float middles_[kMaxLevels];
};

void add(float* to, const float* from, float factor, int64_t n) {
  for (int64_t at = 0; at < n; ++at) to[at] += factor * from[at];
}

// to[row, :] += from[row, :] times `matrix`, for kRows rows and n columns, a multiple of 16; `from` is (rows, kPanel), `matrix` has n_inner
// rows, `stride` floats apart; the rows of `to` are `to_stride` apart.
template <int kRows>
void multiply(float* to, int64_t to_stride, const float* from, const float* matrix, int64_t stride, int64_t n_inner, int64_t n) {
  for (int64_t column = 0; column < n; column += ggtool::kLanes) {
    ggtool::Lanes sums[kRows];
    for (int row = 0; row < kRows; ++row) sums[row] = ggtool::load(to + row * to_stride + column);
    for (int64_t inner = 0; inner < n_inner; ++inner) {
      const ggtool::Lanes values = ggtool::load(matrix + inner * stride + column);
      for (int row = 0; row < kRows; ++row)
        sums[row] = ggtool::fma(ggtool::spread(from[row * kPanel + inner]), values, sums[row]);
    }
    for (int row = 0; row < kRows; ++row) ggtool::store(to + row * to_stride + column, sums[row]);
  }
}

void multiply(float* to, int64_t to_stride, const float* from, const float* matrix, int64_t stride, int64_t n_inner, int64_t n_rows, int64_t n) {
  int64_t row = 0;
  for (; row + kRowsAtOnce <= n_rows; row += kRowsAtOnce)
    multiply<kRowsAtOnce>(to + row * to_stride, to_stride, from + row * kPanel, matrix, stride, n_inner, n);
  for (; row < n_rows; ++row) multiply<1>(to + row * to_stride, to_stride, from + row * kPanel, matrix, stride, n_inner, n);
}

// Some rows, their gradient (q - w) H, and the moves that lower their error.
class Descent {
 public:
  Descent(const Grid& grid, const Rows& rows, float* gradient, const float* hessian)
      : grid_(grid), rounder_(grid), rows_(rows), gradient_(gradient), hessian_(hessian) {
    per_block_ = grid.block / grid.group;
    n_groups_ = rows.n_columns / grid.group;
    n_blocks_ = rows.n_columns / grid.block;
    nested_ = grid.group < grid.block;
  }

  // A round of moves of all columns, panel by panel: within a panel the gradient follows each move, behind it all of them at once.
  double round(int64_t first, int64_t last, int reach) {
    double gained = 0;
    for (int64_t begin = 0; begin < rows_.n_columns; begin += kPanel) {
      begin_ = begin;
      end_ = std::min(begin + kPanel, rows_.n_columns);
      first_ = first;
      std::fill(steps_.begin(), steps_.end(), 0.0f);
      gained += blocks(first, last);
      if (reach) gained += groups(first, last, reach);
      gained += codes(first, last);
      spread(first, last);
    }
    return gained;
  }

 private:
  // One coordinate at a time to its best code.
  double codes(int64_t first, int64_t last) {
    double gained = 0;
    for (int64_t column = begin_; column < end_; ++column) {
      const float curvature = at(column, column);
      for (int64_t row = first; row < last; ++row) {
        const float scale = this->scale(row, column / grid_.group), minimum = this->minimum(row, column / grid_.group);
        uint8_t& code = rows_.codes[row * rows_.n_columns + column];
        const float now = rounder_.value(code, scale, minimum);
        const float slope = gradient(row)[column];
        const int better = rounder_.nearest(now - slope / curvature, scale, minimum);
        if (better == code) continue;
        const float step = rounder_.value(better, scale, minimum) - now;
        const float change = step * (2 * slope + step * curvature);
        if (!(change < 0)) continue;
        code = uint8_t(better);
        gained -= change;
        move(row, column, step);
      }
    }
    return gained;
  }

  // Each group to the best of the scales and minimums near its own, its codes rounded anew for each. Groups go outside and
  // rows inside, so that the rows of H are in the cache.
  double groups(int64_t first, int64_t last, int reach) {
    double gained = 0;
    for (int64_t group = begin_ / grid_.group; group < end_ / grid_.group; ++group)
      for (int64_t row = first; row < last; ++row) gained += nested_ ? nested_group(row, group, reach) : plain_group(row, group, reach);
    return gained;
  }

  // d and dmin of each block to the least squares solution for its codes, where rounding to float16 leaves a gain.
  double blocks(int64_t first, int64_t last) {
    double gained = 0;
    const int64_t size = grid_.block, n_rows = last - first;
    for (int64_t start = begin_; start < end_; start += size) {
      const float* curvatures = hessian_ + start * rows_.n_columns + start;
      for (auto* one : {&turned_d_, &turned_dmin_, &moved_}) std::fill(one->begin(), one->end(), 0.0f);
      for (int64_t row = 0; row < n_rows; ++row) directions(first + row, start, &along_d_[row * kPanel], &along_dmin_[row * kPanel]);
      multiply(turned_d_.data(), kPanel, along_d_.data(), curvatures, rows_.n_columns, size, n_rows, size);
      if (grid_.max_minimum) multiply(turned_dmin_.data(), kPanel, along_dmin_.data(), curvatures, rows_.n_columns, size, n_rows, size);
      for (int64_t row = 0; row < n_rows; ++row) gained += block_scales(first + row, start / size, row * kPanel);
      multiply(gradient(first) + begin_, rows_.n_columns, moved_.data(), hessian_ + start * rows_.n_columns + begin_, rows_.n_columns, size,
               n_rows, end_ - begin_);
    }
    return gained;
  }

  // A weight moves by `step`: the gradient of its panel follows.
  void move(int64_t row, int64_t column, float step) {
    steps_[(row - first_) * kPanel + column - begin_] += step;
    add(gradient(row) + begin_, hessian_ + column * rows_.n_columns + begin_, step, end_ - begin_);
  }

  // The gradient outside the panel follows all that moved in it.
  void spread(int64_t first, int64_t last) {
    const int64_t n = rows_.n_columns, width = end_ - begin_;
    const float* panel = hessian_ + begin_ * n;
    multiply(gradient(first), n, steps_.data(), panel, n, width, last - first, begin_);
    multiply(gradient(first) + end_, n, steps_.data(), panel + end_, n, width, last - first, n - end_);
  }

  static std::vector<float> blank() { return std::vector<float>(kRowsAtOnce * kPanel); }
  float at(int64_t row, int64_t column) const { return hessian_[row * rows_.n_columns + column]; }
  float* gradient(int64_t row) { return gradient_ + row * rows_.n_columns; }
  float scale(int64_t row, int64_t group) const {
    return rows_.d[row * n_blocks_ + group / per_block_] * rows_.scales[row * n_groups_ + group];
  }
  float minimum(int64_t row, int64_t group) const {
    return rows_.dmin[row * n_blocks_ + group / per_block_] * rows_.minimums[row * n_groups_ + group];
  }

  struct Trial {
    double change = 0;
    uint8_t codes[kMaxGroup];
    float steps[kMaxGroup];
  };

  // What the group's codes become under another scale and minimum, two rounds of coordinates from the present weights.
  Trial attempt(int64_t row, int64_t group, float scale, float minimum) {
    Trial trial;
    const int n = grid_.group;
    const int64_t start = group * n;
    const float old_scale = this->scale(row, group), old_minimum = this->minimum(row, group);
    float slope[kMaxGroup], weight[kMaxGroup];
    std::copy_n(gradient(row) + start, n, slope);
    for (int at = 0; at < n; ++at) {
      trial.codes[at] = rows_.codes[row * rows_.n_columns + start + at];
      weight[at] = rounder_.value(trial.codes[at], old_scale, old_minimum);
      trial.steps[at] = 0;
    }
    for (int round = 0; round < 2; ++round)
      for (int at = 0; at < n; ++at) {
        const float* curvatures = hessian_ + (start + at) * rows_.n_columns + start;
        const float now = weight[at] + trial.steps[at];
        const int code = rounder_.nearest(now - slope[at] / curvatures[at], scale, minimum);
        const float step = rounder_.value(code, scale, minimum) - now;
        trial.codes[at] = uint8_t(code);
        if (step == 0) continue;
        trial.change += double(step) * (2 * slope[at] + step * curvatures[at]);
        trial.steps[at] += step;
        add(slope, curvatures, step, n);
      }
    return trial;
  }

  void take(int64_t row, int64_t group, const Trial& trial) {
    const int64_t start = group * grid_.group;
    for (int at = 0; at < grid_.group; ++at) {
      rows_.codes[row * rows_.n_columns + start + at] = trial.codes[at];
      if (trial.steps[at] != 0) move(row, start + at, trial.steps[at]);
    }
  }

  double nested_group(int64_t row, int64_t group, int reach) {
    int16_t& scale_code = rows_.scales[row * n_groups_ + group];
    int16_t& minimum_code = rows_.minimums[row * n_groups_ + group];
    const float d = rows_.d[row * n_blocks_ + group / per_block_], dmin = rows_.dmin[row * n_blocks_ + group / per_block_];
    const int old_scale = scale_code, old_minimum = minimum_code;
    const int reach_minimum = grid_.max_minimum ? reach : 0;
    Trial best;
    int best_scale = old_scale, best_minimum = old_minimum;
    for (int s = std::max(grid_.least_scale, old_scale - reach); s <= std::min(grid_.largest_scale, old_scale + reach); ++s)
      for (int m = std::max(0, old_minimum - reach_minimum); m <= std::min(grid_.max_minimum, old_minimum + reach_minimum); ++m) {
        Trial trial = attempt(row, group, d * s, dmin * m);
        if (trial.change < best.change) best = trial, best_scale = s, best_minimum = m;
      }
    if (!(best.change < 0)) return 0;
    take(row, group, best);
    scale_code = int16_t(best_scale);
    minimum_code = int16_t(best_minimum);
    return -best.change;
  }

  double plain_group(int64_t row, int64_t group, int reach) {
    float& d = rows_.d[row * n_blocks_ + group];
    Trial best;
    float best_d = d;
    const auto consider = [&](float other) {
      Trial trial = attempt(row, group, other, 0);
      if (trial.change < best.change) best = trial, best_d = other;
    };
    consider(d);
    for (int step = 1; step <= 4 * reach; ++step)
      for (const int sign : {-1, 1}) consider(to_half(d * (1 + 0.01f * sign * step)));
    consider(-d);
    if (!(best.change < 0)) return 0;
    take(row, group, best);
    d = best_d;
    return -best.change;
  }

  // What a row's weights of a block are per unit of d and of dmin.
  void directions(int64_t row, int64_t start, float* along_d, float* along_dmin) {
    for (int at = 0; at < grid_.block; ++at) {
      const int64_t group = row * n_groups_ + (start + at) / grid_.group;
      along_d[at] = grid_.levels[rows_.codes[row * rows_.n_columns + start + at]] * rows_.scales[group];
      along_dmin[at] = -float(rows_.minimums[group]);
    }
  }

  // Solves for one row's block, whose directions begin at `place`, and notes how its weights move.
  double block_scales(int64_t row, int64_t block, int64_t place) {
    const int n = grid_.block;
    const int64_t start = block * n;
    const float *along_d = &along_d_[place], *along_dmin = &along_dmin_[place], *turned_d = &turned_d_[place], *turned_dmin = &turned_dmin_[place];
    double dd = 0, dm = 0, mm = 0, slope_d = 0, slope_m = 0;
    const float* slope = gradient(row) + start;
    for (int at = 0; at < n; ++at) {
      dd += double(along_d[at]) * turned_d[at];
      dm += double(along_dmin[at]) * turned_d[at];
      mm += double(along_dmin[at]) * turned_dmin[at];
      slope_d += double(along_d[at]) * slope[at];
      slope_m += double(along_dmin[at]) * slope[at];
    }
    float& d = rows_.d[row * n_blocks_ + block];
    float& dmin = rows_.dmin[row * n_blocks_ + block];
    const double determinant = dd * mm - dm * dm;
    double step_d = dd > 0 ? -slope_d / dd : 0, step_m = 0;
    if (mm > 0 && determinant > 1e-6 * dd * mm) {
      step_d = (dm * slope_m - mm * slope_d) / determinant;
      step_m = (dm * slope_d - dd * slope_m) / determinant;
    }
    const float new_d = to_half(float(d + step_d)), new_dmin = to_half(float(dmin + step_m));
    step_d = double(new_d) - d;
    step_m = double(new_dmin) - dmin;
    const double change = 2 * (step_d * slope_d + step_m * slope_m) + step_d * step_d * dd + 2 * step_d * step_m * dm + step_m * step_m * mm;
    if (!(change < 0)) return 0;
    d = new_d;
    dmin = new_dmin;
    for (int at = 0; at < n; ++at) {
      const float step = float(step_d * along_d[at] + step_m * along_dmin[at]);
      moved_[place + at] = step;
      steps_[place + start + at - begin_] += step;
    }
    return -change;
  }

  const Grid& grid_;
  Rounder rounder_;
  const Rows& rows_;
  float* gradient_;
  const float* hessian_;
  int64_t per_block_, n_groups_, n_blocks_;
  int64_t first_ = 0, begin_ = 0, end_ = 0;  // the first row and the columns of the panel that is moved
  bool nested_;
  std::vector<float> steps_ = blank();  // of the panel's weights
  // (kRowsAtOnce, kPanel) each, of the rows' present block
  std::vector<float> along_d_ = blank(), along_dmin_ = blank(), turned_d_ = blank(), turned_dmin_ = blank(), moved_ = blank();
};

}  // namespace

extern "C" {

// Round columns start to stop of `work` (n_rows, n_columns), feeding each error into the columns behind it as far as `stop`.
// `factor` is the upper U with U'U = inverse of H. errors: (n_rows, stop - start), each error over U[j, j].
void ggtool_feedback(const Grid* grid, const Rows* rows, float* work, const float* factor, float* errors, int64_t start, int64_t stop) {
  const Rounder rounder(*grid);
  const int64_t n = rows->n_columns, n_groups = n / grid->group, n_blocks = n / grid->block;
  for (int64_t row = 0; row < rows->n_rows; ++row) {
    float* rest = work + row * n;
    for (int64_t column = start; column < stop; ++column) {
      const int64_t group = row * n_groups + column / grid->group, block = row * n_blocks + column / grid->block;
      const float scale = rows->d[block] * rows->scales[group], minimum = rows->dmin[block] * rows->minimums[group];
      const int code = rounder.nearest(rest[column], scale, minimum);
      rows->codes[row * n + column] = uint8_t(code);
      const float* spread = factor + column * n;
      const float error = (rest[column] - rounder.value(code, scale, minimum)) / spread[column];
      errors[row * (stop - start) + column - start] = error;
      add(rest + column + 1, spread + column + 1, -error, stop - column - 1);
    }
  }
}

// Lower the error of rows whose gradient (q - w) H is `gradient` (n_rows, n_columns), which follows; return by how much.
// Rounds end early when one gains less than `least` of the rows' first gain.
double ggtool_descend(const Grid* grid, const Rows* rows, float* gradient, const float* hessian, int n_rounds, int reach, double least) {
  Descent descent(*grid, *rows, gradient, hessian);
  double total = 0;
  for (int64_t first = 0; first < rows->n_rows; first += kRowsAtOnce) {
    const int64_t last = std::min(first + kRowsAtOnce, rows->n_rows);
    double all = 0;
    for (int round = 0; round < n_rounds; ++round) {
      const double gained = descent.round(first, last, reach);
      all += gained;
      if (gained <= least * all) break;
    }
    total += all;
  }
  return total;
}

}  // extern "C"
