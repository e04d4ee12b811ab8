// Activations on their way into a product: normalized, and split in two numbers of 16 bits whose sum is a float32 nearly.
//
// The tensor cores multiply sixteen rows at once and a text has one, so the second number costs nothing: of up to
// eight texts, text i is row i and what its rounding left is row i + 8. From nine to sixteen there is no room for it.
// Rows i and i + 8 lie together, as a thread needs them: of every four slots two of row i, two of row i + 8, and again.
#pragma once

#include "formats.h"

enum Norm { kNone = 0, kLayerNorm = 1, kRmsNorm = 2 };

enum Which { kBoth, kFirst, kSecond };

struct NormWeights {
  const float* weight;
  const float* bias;
  float epsilon;
};

// Lays down one text by all kThreads threads of a block, kQuads times four columns of each thread under way at once.
//
// With kDeferred, an RMS norm's factor is left to the sums of the product, `factor` says it: nobody waits for it. A norm
// that is not deferred holds the whole text in registers, so kQuads * kThreads * 4 columns are its most.
template <class Format, int kNorm, bool kDeferred, int kThreads, int kQuads>
class Layer {
 public:
  // Start reading the norm's weights, which do not depend on another kernel.
  __device__ __forceinline__ Layer(const NormWeights& norm, int n_columns) : norm_(norm), n_quads_(n_columns / 4) {
    if (kNorm != kNone) fetch_norm(thread());
  }

  // Write text x into `rows`, a pair of rows of n_slots numbers in the order of Format's slots, zeros where there is no
  // column: as the first row and its rest as the second, or as `which` of them alone. `room` holds two floats for
  // each warp. The threads meet before any reads the rows.
  __device__ __forceinline__ void lay_down(const float* x, int n_slots, u16* rows, Which which, float* room) {
    const Floats* quads = reinterpret_cast<const Floats*>(x);
    float sum = 0, squares = 0;
    for (int turn = 0; turn < n_quads_; turn += kQuads * kThreads) {  // as often by every thread
      const int first = turn + thread();
      Floats some[kQuads];
#pragma unroll
      for (int i = 0; i < kQuads; ++i)
        some[i] = first + i * kThreads < n_quads_ ? load_fresh(quads + first + i * kThreads) : Floats{};
      if (kNorm != kNone) {
#pragma unroll
        for (int i = 0; i < kQuads; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) sum += some[i].v[j], squares += some[i].v[j] * some[i].v[j];
      }
      float mean = 0, factor = 1;
      if (kNorm != kNone && !kDeferred) {
        sum = sum_of_warp(sum), squares = sum_of_warp(squares);
        if (lane() == 0) room[warp()] = sum, room[kThreads / kWarp + warp()] = squares;
        sync_block();
        float all = 0, all_squares = 0;
#pragma unroll
        for (int i = 0; i < kThreads / kWarp; ++i) all += room[i], all_squares += room[kThreads / kWarp + i];
        mean = kNorm == kLayerNorm ? all / (4 * n_quads_) : 0.0f;
        factor = rsqrtf(all_squares / (4 * n_quads_) - mean * mean + norm_.epsilon);
      }
#pragma unroll
      for (int i = 0; i < kQuads; ++i) {
        const int quad = first + i * kThreads;
        if (quad >= n_quads_) break;
        Floats values = some[i];
        if (kNorm != kNone) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            values.v[j] = (values.v[j] - mean) * factor * weights_[i].v[j];
            if (kNorm == kLayerNorm) values.v[j] += biases_[i].v[j];
          }
        }
        write(quad, values, rows, which);
      }
      if (kNorm != kNone && kDeferred && first + kQuads * kThreads < n_quads_) fetch_norm(first + kQuads * kThreads);
    }
    if (kNorm != kNone && kDeferred) {
      squares = sum_of_warp(squares);
      if (lane() == 0) room[warp()] = squares;
    }
    for (int column = 4 * n_quads_ + thread(); column < n_slots; column += kThreads) {
      if (which != kSecond) rows[at(column)] = 0;
      if (which != kFirst) rows[at(column) + 2] = 0;
    }
  }

  // What a deferred norm's sums are to be multiplied by, once the threads have met.
  __device__ __forceinline__ float factor(const float* room) const {
    float squares = 0;
#pragma unroll
    for (int i = 0; i < kThreads / kWarp; ++i) squares += room[i];
    return rsqrtf(squares / (4 * n_quads_) + norm_.epsilon);
  }

 private:
  __device__ __forceinline__ void fetch_norm(int first) {
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const int quad = first + i * kThreads;
      if (quad >= n_quads_) break;
      weights_[i] = reinterpret_cast<const Floats*>(norm_.weight)[quad];
      if (kNorm == kLayerNorm) biases_[i] = reinterpret_cast<const Floats*>(norm_.bias)[quad];
    }
  }

  // Where a column is in the first row of a pair; in the second, two further.
  __device__ static __forceinline__ int at(int column) {
    const int place = Format::place(column);
    return place / 4 * 8 + place % 4 / 2 * 4 + place % 2;
  }

  __device__ static __forceinline__ void write(int quad, const Floats& values, u16* rows, Which which) {
    u16 rounded[4], rest[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      rounded[j] = narrow(values.v[j]);
      rest[j] = narrow(values.v[j] - widen(rounded[j]));
    }
    if (Format::kNatural && which == kBoth) {
      reinterpret_cast<Quad*>(rows)[quad] = Quad{{both(rounded[0], rounded[1]), both(rest[0], rest[1]),
                                                  both(rounded[2], rounded[3]), both(rest[2], rest[3])}};
      return;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int place = at(4 * quad + j);
      if (which != kSecond) rows[place] = rounded[j];
      if (which != kFirst) rows[place + 2] = which == kBoth ? rest[j] : rounded[j];
    }
  }

  const NormWeights norm_;
  const int n_quads_;
  Floats weights_[kNorm == kNone ? 1 : kQuads], biases_[kNorm == kLayerNorm ? kQuads : 1];
};
