// Activations on their way into a product: normalized, and split in two numbers of 16 bits whose sum is a float32 nearly.
//
// The tensor cores multiply eight columns at once and a text has one, so what its rounding left is the next column and
// costs nothing. Of several texts the rest has a product of its own up to eight; from nine to sixteen that is the other
// texts' product, and there is no room for rests.
//
// A row of activations is in the order of the format's slots, but that the four threads of a row read sixteen bytes each
// next to one another: eight slots of the first, eight of the second, and so on, then the next eight of the first.
#pragma once

#include "formats.h"

enum Norm { kNone = 0, kLayerNorm = 1, kRmsNorm = 2 };

enum Which { kBoth, kFirst, kSecond };

struct NormWeights {
  const float* weight;
  const float* bias;
  float epsilon;
};

// Eight slots' columns: four from one column on, four kApart further.
template <class Format>
__device__ constexpr int offset_of(int slot) {
  return Format::column(0, slot) - Format::column(0, 0);
}
template <class Format>
__device__ constexpr int offset_of_others() {
  int least = Format::kSegment * 4;
  for (int slot = 0; slot < 8; ++slot)
    if (offset_of<Format>(slot) >= 4 && offset_of<Format>(slot) < least) least = offset_of<Format>(slot);
  return least;
}

// Lays down one text by all kThreads threads of a block, kUnits times eight slots of each thread under way at once.
//
// With kDeferred, an RMS norm's factor is left to the sums of the product, `factor` says it: nobody waits for it. A norm
// that is not deferred holds the whole text in registers, so kUnits * kThreads * 8 slots are its most.
template <class Format, int kNorm, bool kDeferred, int kThreads, int kUnits>
class Layer {
 public:
  // Start reading the norm's weights, which do not depend on another kernel.
  __device__ __forceinline__ Layer(const NormWeights& norm, int n_columns, int n_slots)
      : norm_(norm), n_columns_(n_columns), n_units_(n_slots / 8) {
    if (kNorm != kNone) fetch_norm(thread());
  }

  // Write text x into a pair of rows, `second` numbers apart, zeros where there is no column: as the first row and its rest
  // as the second, or as `which` of them alone. `room` holds two floats for each warp. The threads meet before any reads the
  // rows.
  __device__ __forceinline__ void lay_down(const float* x, u16* rows, int second, Which which, float* room) {
    float sum = 0, squares = 0;
    for (int turn = 0; turn < n_units_; turn += kUnits * kThreads) {  // as often by every thread
      const int first = turn + thread();
      Unit some[kUnits];
#pragma unroll
      for (int i = 0; i < kUnits; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int column = column_of(first + i * kThreads, half);
          some[i].of[half] = column < n_columns_ ? load_fresh(reinterpret_cast<const Floats*>(x + column)) : Floats{};
        }
      if (kNorm != kNone) {
#pragma unroll
        for (int i = 0; i < kUnits; ++i)
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const float value = some[i].of[j / 4].v[j % 4];
            sum += value, squares += value * value;
          }
      }
      float mean = 0, factor = 1;
      if (kNorm != kNone && !kDeferred) {
        sum = sum_of_warp(sum), squares = sum_of_warp(squares);
        if (lane() == 0) room[warp()] = sum, room[kThreads / kWarp + warp()] = squares;
        sync_block();
        float all = 0, all_squares = 0;
#pragma unroll
        for (int i = 0; i < kThreads / kWarp; ++i) all += room[i], all_squares += room[kThreads / kWarp + i];
        mean = kNorm == kLayerNorm ? all / n_columns_ : 0.0f;
        factor = rsqrtf(all_squares / n_columns_ - mean * mean + norm_.epsilon);
      }
#pragma unroll
      for (int i = 0; i < kUnits; ++i) {
        const int unit = first + i * kThreads;
        if (unit >= n_units_) break;
        if (kNorm != kNone) {
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            float& value = some[i].of[j / 4].v[j % 4];
            value = (value - mean) * factor * weights_[i].of[j / 4].v[j % 4];
            if (kNorm == kLayerNorm) value += biases_[i].of[j / 4].v[j % 4];
          }
        }
        write(unit, some[i], rows, second, which);
      }
      if (kNorm != kNone && kDeferred && first + kUnits * kThreads < n_units_) fetch_norm(first + kUnits * kThreads);
    }
    if (kNorm != kNone && kDeferred) {
      squares = sum_of_warp(squares);
      if (lane() == 0) room[warp()] = squares;
    }
  }

  // What a deferred norm's sums are to be multiplied by, once the threads have met.
  __device__ __forceinline__ float factor(const float* room) const {
    float squares = 0;
#pragma unroll
    for (int i = 0; i < kThreads / kWarp; ++i) squares += room[i];
    return rsqrtf(squares / n_columns_ + norm_.epsilon);
  }

 private:
  struct Unit {
    Floats of[2];
  };

  // The first column of half a unit: units lie as the row does, and those beyond it have no columns.
  __device__ __forceinline__ int column_of(int unit, int half) const {
    constexpr int kQuads = Format::kSegment / 8;
    if (unit >= n_units_) return n_columns_;
    return Format::column(unit / (4 * kQuads) * 4 + unit % 4, unit / 4 % kQuads * 8) + half * offset_of_others<Format>();
  }

  __device__ __forceinline__ void fetch_norm(int first) {
#pragma unroll
    for (int i = 0; i < kUnits; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = column_of(first + i * kThreads, half);
        const bool is_column = column < n_columns_;
        weights_[i].of[half] = is_column ? *reinterpret_cast<const Floats*>(norm_.weight + column) : Floats{};
        if (kNorm == kLayerNorm) biases_[i].of[half] = is_column ? *reinterpret_cast<const Floats*>(norm_.bias + column) : Floats{};
      }
  }

  __device__ static __forceinline__ void write(int unit, const Unit& values, u16* rows, int second, Which which) {
    u16 rounded[8], rest[8];
#pragma unroll
    for (int slot = 0; slot < 8; ++slot) {
      constexpr int kOthers = offset_of_others<Format>();
      const int offset = offset_of<Format>(slot);
      const float value = offset < kOthers ? values.of[0].v[offset % 4] : values.of[1].v[(offset - kOthers) % 4];
      rounded[slot] = narrow(value);
      rest[slot] = which == kBoth ? narrow(value - widen(rounded[slot])) : rounded[slot];
    }
    const auto quad = [](const u16(&of)[8]) {
      return Quad{{both(of[0], of[1]), both(of[2], of[3]), both(of[4], of[5]), both(of[6], of[7])}};
    };
    if (which != kSecond) *reinterpret_cast<Quad*>(rows + unit * 8) = quad(rounded);
    if (which != kFirst) *reinterpret_cast<Quad*>(rows + second + unit * 8) = quad(rest);
  }

  const NormWeights norm_;
  const int n_columns_, n_units_;
  Unit weights_[kNorm == kNone ? 1 : kUnits], biases_[kNorm == kLayerNorm ? kUnits : 1];
};
