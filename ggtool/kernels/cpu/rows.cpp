// Products of a few rows, by format: in registers for int8 and sixteen-value tables, by way of widened rows for others.

#include "rows.h"

namespace ggtool {
namespace {

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
    prefetch<4096>(codes + at);
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

// Whether a row is whole steps of 64 bytes and a step whole groups, so that `dot_dwords` serves.
inline bool is_in_dwords(const Matrix& matrix) {
  return matrix.is_table_of_16() && 128 % matrix.format.group == 0 && matrix.n_padded() % 128 == 0;
}

// Lay x (n_padded,) down in the order in which `dot_dwords` comes to it. Of sixteen words of four bytes it takes each word's
// first code, then each word's second, and so on; of a byte's two codes the upper one lies half a group behind the lower.
inline void by_dwords(const Matrix& matrix, const float* x, float* to) {
  const int group = matrix.format.group, words = group / 8;
  int32_t columns[128];
  for (int i = 0; i < 128; ++i) {
    const int place = i / kLanes, lane = i % kLanes;
    columns[i] = lane / words * group + place % 2 * (group / 2) + lane % words * 4 + place / 2;
  }
  for (int64_t block = 0; block < matrix.n_padded(); block += 128)
    for (int i = 0; i < 128; ++i) *to++ = x[block + columns[i]];
}

// Floats that the scales of a row take, and what is read beyond them.
inline int64_t scale_room(const Matrix& matrix) { return matrix.n_groups() + kLanes; }

// Which of a step's groups each lane's codes are of, for one, two and four groups.
constexpr int32_t kGroupOfLane[3][kLanes] = {
    {},
    {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1},
    {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3},
};

// The same product, 128 codes at once, with x in the order of `by_dwords`: a step of sixteen codes is a shift, a look into
// the table and one multiplication, and scales, `room` floats for each row, are for sums.
template <int R, int M>
void dot_dwords(const Matrix& matrix, int64_t row, const float* x, const float* scales, int64_t room, float* sums) {
  const Table values(matrix.format.tables[0]);
  const int64_t n_padded = matrix.n_padded(), stride = matrix.row_bytes();
  const int at_once = 128 / matrix.format.group;
  const Codes groups = dwords(kGroupOfLane[at_once / 2]);
  const uint8_t* codes = matrix.row(row);
  Lanes total[R][M];
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) total[r][m] = zero();
  for (int64_t at = 0; at < n_padded; at += 128, codes += 64, scales += at_once) {
    for (int r = 0; r < R; ++r) {
      prefetch<4096>(codes + r * stride);
      Codes eight = dwords(codes + r * stride);
      Lanes part[M];
      for (int place = 0; place < 8; ++place) {
        const Lanes weights = values[eight];
        eight = shift_right<4>(eight);
        for (int m = 0; m < M; ++m) {
          const Lanes inputs = load(x + m * n_padded + at + place * kLanes);
          part[m] = place ? fma(weights, inputs, part[m]) : mul(weights, inputs);
        }
      }
      const Lanes scale = Table(scales + r * room)[groups];
      for (int m = 0; m < M; ++m) total[r][m] = fma(part[m], scale, total[r][m]);
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

inline void put(const Product& product, int64_t row, int64_t input, float sum) {
  const Matrix& matrix = product.matrix;
  if (matrix.format.kind == kInt8Rows) sum *= matrix.row_scale(row);
  if (product.bias) sum += product.bias[row];
  float& to = product.y[input * product.y_stride + row];
  to = product.is_added ? to + sum : sum;
}

template <int R, int M>
void block(const Product& product, int64_t row, int64_t input, const float* widened, const float* scales) {
  const Matrix& matrix = product.matrix;
  const float* x = product.x;
  float sums[R * M];
  const int64_t n = matrix.n_padded();
  if (widened)
    dot_floats<R, M>(widened, n + kLanes, x + input * n, n, sums);
  else if (matrix.format.kind == kInt8Rows && M == 1)
    for (int r = 0; r < R; ++r) sums[r] = stream_int8(matrix, row + r, x + input * n);
  else if (matrix.format.kind == kInt8Rows)
    dot_int8<R, M>(matrix, row, x + input * n, sums);
  else if (scales)
    dot_dwords<R, M>(matrix, row, x + input * n, scales, scale_room(matrix), sums);
  else
    dot_table<R, M>(matrix, row, x + input * n, sums);
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) put(product, row + r, input + m, sums[r * M + m]);
}

// R rows from `row` on with all inputs; scales: for `dot_dwords`, or null.
template <int R>
void do_rows(const Product& product, int64_t row, const float* scales) {
  const Matrix& matrix = product.matrix;
  const int64_t n_inputs = product.n_inputs;
  const int64_t room = Scratch::floats(matrix), stride = matrix.n_padded() + kLanes;
  const float* widened = nullptr;
  if (matrix.format.kind != kInt8Rows && !matrix.is_table_of_16()) {
    float* floats = thread_floats(room + R * stride);
    for (int r = 0; r < R; ++r) widen_row(matrix, row + r, Scratch(matrix, floats), floats + room + r * stride);
    widened = floats + room;
  }
  int64_t input = 0;
  for (; input + 4 <= n_inputs; input += 4) block<R, 4>(product, row, input, widened, scales);
  if (input + 2 <= n_inputs) block<R, 2>(product, row, input, widened, scales), input += 2;
  if (input < n_inputs) block<R, 1>(product, row, input, widened, scales);
}

}  // namespace

const float* laid_down(const Matrix& matrix, const float* x, int64_t n_inputs, std::vector<float>& room) {
  if (!is_in_dwords(matrix)) return x;
  const int64_t n = matrix.n_padded();
  room.resize(std::max<size_t>(room.size(), n_inputs * n));
  for (int64_t i = 0; i < n_inputs; ++i) by_dwords(matrix, x + i * n, room.data() + i * n);
  return room.data();
}

void Product::run(int64_t at, int64_t end) const {
  // Scales are widened some rows ahead: what was just stored can only be loaded as it was stored, or much later.
  constexpr int64_t kAhead = 32;
  const bool has_scales = is_in_dwords(matrix);
  const int64_t room = has_scales ? scale_room(matrix) : 0;
  while (at < end) {
    float* scales = has_scales ? thread_floats(kAhead * room) : nullptr;
    const int64_t stop = has_scales ? std::min(end, at + kAhead) : end;
    for (int64_t row = at; has_scales && row < stop; ++row) matrix.read_scales(row, scales + (row - at) * room);
    const float* next = scales;
    for (; at + kRows <= stop; at += kRows, next += kRows * room) do_rows<kRows>(*this, at, has_scales ? next : nullptr);
    for (; at < stop; ++at, next += room) do_rows<1>(*this, at, has_scales ? next : nullptr);
  }
}

}  // namespace ggtool
