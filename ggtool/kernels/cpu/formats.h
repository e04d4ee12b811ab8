// How the rows of a packed matrix are laid out, and one of them widened to float32, bit for bit as torch's path does it.
#pragma once

#include <algorithm>

#include "lanes.h"

namespace ggtool {

enum Kind : int32_t {
  kInt8Rows = 0,    // int8 (rows, columns); the scales, float32 (rows,), go on the sums
  kInt8Affine = 1,  // int8 (rows, columns); float32 (rows, 2): step and smallest
  kInt8Groups = 2,  // int8 (rows, groups, group); float16 (rows, groups)
  kPlanes = 3,      // uint8 (rows, groups, bytes); float16 or float32 (rows, groups, scales_per_group)
  kBFloat16 = 4,    // uint16 (rows, columns); no scales
};

constexpr int kMaxPlanes = 3;

// What all matrices of one quantizer share. ctypes has the same struct: ggtool/kernels/form.py.
struct Format {
  int32_t kind;
  int32_t group;  // weights that share a scale, a multiple of 16; 0 where rows have no groups
  int32_t n_planes;
  int32_t scales_per_group;
  int32_t bases[kMaxPlanes];
  float tables[kMaxPlanes][kLanes];  // the values of a plane, again and again up to 16
};

class Matrix {
 public:
  const Format& format;
  const void* codes;
  const void* scales;
  int64_t scale_stride;  // scales from row to row; 0 where all rows share theirs
  int has_half_scales;
  int64_t n_rows, n_columns;

  Matrix(const Format& format, const void* codes, const void* scales, int64_t scale_stride, int has_half_scales,
         int64_t n_rows, int64_t n_columns)
      : format(format), codes(codes), scales(scales), scale_stride(scale_stride), has_half_scales(has_half_scales),
        n_rows(n_rows), n_columns(n_columns), n_groups_(format.group ? (n_columns + format.group - 1) / format.group : 0),
        n_padded_(format.group ? n_groups_ * format.group : (n_columns + kLanes - 1) / kLanes * kLanes),
        row_bytes_(bytes_of_row()) {}

  static int bits_of(int base) { return base == 16 ? 4 : base == 4 ? 2 : 1; }
  static int n_bytes(int base, int n_codes) {
    const int per_byte = base == 3 ? 5 : 8 / bits_of(base);
    return (n_codes + per_byte - 1) / per_byte;
  }
  int64_t n_groups() const { return n_groups_; }
  // Columns of a widened row: whole groups, and whole steps of sixteen.
  int64_t n_padded() const { return n_padded_; }
  int64_t row_bytes() const { return row_bytes_; }
  const uint8_t* row(int64_t index) const { return static_cast<const uint8_t*>(codes) + index * row_bytes(); }
  bool is_table_of_16() const {
    return format.kind == kPlanes && format.n_planes == 1 && format.bases[0] == 16 && format.group % 32 == 0;
  }
  float row_scale(int64_t index) const { return static_cast<const float*>(scales)[index * scale_stride]; }

  // Write the scales of one row as float32: n_groups * scales_per_group of them, and up to 15 more that mean nothing.
  void read_scales(int64_t index, float* to) const {
    const int64_t n = n_groups() * format.scales_per_group, start = index * scale_stride;
    if (!has_half_scales) {
      std::memcpy(to, static_cast<const float*>(scales) + start, n * sizeof(float));
      return;
    }
    const uint16_t* from = static_cast<const uint16_t*>(scales) + start;
    int64_t at = 0;
    for (; at + kLanes <= n; at += kLanes) store(to + at, widen_half(from + at));
    if (at < n) {
      uint16_t rest[kLanes] = {};
      std::memcpy(rest, from + at, (n - at) * sizeof *rest);
      store(to + at, widen_half(rest));
    }
  }

 private:
  int64_t bytes_of_row() const {
    switch (format.kind) {
      case kInt8Groups: return n_padded_;
      case kPlanes: {
        int64_t group_bytes = 0;
        for (int plane = 0; plane < format.n_planes; ++plane) group_bytes += n_bytes(format.bases[plane], format.group);
        return n_groups_ * group_bytes;
      }
      case kBFloat16: return 2 * n_columns;
      default: return n_columns;
    }
  }

  // Asked for with every few rows, and divisions take longer than those rows.
  const int64_t n_groups_, n_padded_, row_bytes_;
};

// Call `step(from, to)` for every sixteen of n values of type T; what is missing of the last sixteen is zeros.
template <class T, class Step>
inline void by_sixteens(const T* from, int64_t n, float* to, Step step) {
  int64_t at = 0;
  for (; at + kLanes <= n; at += kLanes) step(from + at, to + at);
  if (at < n) {
    T rest[kLanes] = {};
    std::memcpy(rest, from + at, (n - at) * sizeof(T));
    step(rest, to + at);
  }
}

// Write one plane of a group, and up to 15 floats beyond it that mean nothing. What lies from `end` on is not read.
inline void widen_plane(const uint8_t* from, const uint8_t* end, int base, int group, const Table& values, float scale,
                        float* to) {
  const int n_bytes = Matrix::n_bytes(base, group);
  const Lanes scales = spread(scale);
  if (base == 16 && n_bytes % kLanes == 0) {
    for (int at = 0; at < n_bytes; at += kLanes) {
      const Codes both = bytes(from + at);
      store(to + at, mul(values[both], scales));
      store(to + n_bytes + at, mul(values[shift_right(both, 4)], scales));
    }
    return;
  }
  for (int at = 0; at < n_bytes; at += kLanes) {
    const uint8_t* here = from + at;
    uint8_t rest[kLanes] = {};
    if (end - here < kLanes) {
      std::memcpy(rest, here, end - here);
      here = rest;
    }
    if (base == 3) {
      Trits trits(here);
      for (int place = 0; place * n_bytes < group; ++place)
        store(to + place * n_bytes + at, mul(values[trits.next()], scales));
      continue;
    }
    Codes codes = bytes(here);
    const int bits = Matrix::bits_of(base);
    for (int place = 0; place * n_bytes < group; ++place, codes = shift_right(codes, bits))
      store(to + place * n_bytes + at, mul(values[codes], scales));
  }
}

inline void widen_planes(const Matrix& matrix, int64_t index, float* scales, float* term, float* to) {
  const Format& format = matrix.format;
  matrix.read_scales(index, scales);
  const Table tables[kMaxPlanes] = {Table(format.tables[0]), Table(format.tables[1]), Table(format.tables[2])};
  const uint8_t* from = matrix.row(index);
  const uint8_t* end = matrix.row(matrix.n_rows);
  for (int64_t g = 0; g < matrix.n_groups(); ++g, to += format.group) {
    for (int plane = 0; plane < format.n_planes; ++plane) {
      const int base = format.bases[plane];
      const float scale = scales[g * format.scales_per_group + (format.scales_per_group > 1 ? plane : 0)];
      widen_plane(from, end, base, format.group, tables[plane], scale, plane ? term : to);
      from += Matrix::n_bytes(base, format.group);
      for (int i = 0; plane && i < format.group; ++i) to[i] += term[i];
    }
  }
}

// Room for one row: n_padded floats and what is written beyond them; the scales; one plane of a group.
struct Scratch {
  float *scales, *term;
  static int64_t floats(const Matrix& matrix) {
    return matrix.n_groups() * std::max(matrix.format.scales_per_group, 1) + matrix.format.group + 2 * kLanes;
  }
  Scratch(const Matrix& matrix, float* at) : scales(at), term(at + floats(matrix) - matrix.format.group - kLanes) {}
};

// Write row `index` to `to`: n_padded floats, and up to 15 more that mean nothing. kInt8Rows: codes without scale.
inline void widen_row(const Matrix& matrix, int64_t index, const Scratch& scratch, float* to) {
  const uint8_t* row = matrix.row(index);
  const int8_t* codes = reinterpret_cast<const int8_t*>(row);
  switch (matrix.format.kind) {
    case kInt8Rows:
      by_sixteens(codes, matrix.n_columns, to, [](const int8_t* from, float* at) { store(at, widen_int8(from)); });
      return;
    case kInt8Affine: {
      const float* scales = static_cast<const float*>(matrix.scales) + index * matrix.scale_stride;
      const Lanes step = spread(scales[0]), smallest = spread(scales[1]), offset = spread(128.0f);
      by_sixteens(codes, matrix.n_columns, to, [=](const int8_t* from, float* at) {
        store(at, add(mul(add(widen_int8(from), offset), step), smallest));
      });
      return;
    }
    case kInt8Groups:
      matrix.read_scales(index, scratch.scales);
      for (int64_t g = 0; g < matrix.n_groups(); ++g) {
        const Lanes scale = spread(scratch.scales[g]);
        by_sixteens(codes + g * matrix.format.group, matrix.format.group, to + g * matrix.format.group,
                    [=](const int8_t* from, float* at) { store(at, mul(widen_int8(from), scale)); });
      }
      return;
    case kPlanes: widen_planes(matrix, index, scratch.scales, scratch.term, to); return;
    case kBFloat16:
      by_sixteens(reinterpret_cast<const uint16_t*>(row), matrix.n_columns, to,
                  [](const uint16_t* from, float* at) { store(at, widen_bfloat(from)); });
  }
}

}  // namespace ggtool
