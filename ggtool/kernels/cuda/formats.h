// The ways a matrix lies in memory, and how a thread turns a segment of a row into pairs of float16.
//
// A format says: kSegment, the weights that a thread reads at once; load, which starts the reads; expand, which writes
// kSegment / 2 pairs in the order of `slot`s, given where this thread's column of the table is; column, the column in W of a segment's slot; place, where in the order of
// all slots a column is. The order of slots is whatever costs least to unpack: activations are laid down in the same order.
#pragma once

#include "device.h"

struct Matrix {
  const u8* codes;
  const u8* scales;
  const float* values;  // of a table, 16
  i64 row_bytes;        // from one row's codes to the next's
  i64 scale_stride;     // from one row's scales to the next's, in scales
  int n_rows, n_columns;
};

constexpr u32 kThousand = 0x64006400;  // 1024 twice: its last ten bits count units

__device__ __forceinline__ u32 pair_of_bytes(u32 bytes, int upper) {
  return pick_bytes(bytes, kThousand >> 8, upper ? 0x4342 : 0x4140);
}

// Two bytes a weight, of the type of the activations.
struct Plain {
  static constexpr int kSegment = 8;
  static constexpr bool kRowScale = false, kTable = false, kNatural = true;
  struct Raw {
    Quad codes;
  };
  __device__ static __forceinline__ void load(Raw& raw, const Matrix& w, int row, int segment) {
    raw.codes = load_stream(w.codes + row * w.row_bytes + segment * 16);
  }
  __device__ static __forceinline__ void expand(const Raw& raw, SharedAddress, u32 (&pairs)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = raw.codes.v[i];
  }
  __device__ static __forceinline__ int column(int segment, int slot) { return segment * kSegment + slot; }
  __device__ static __forceinline__ int place(int column) { return column; }
};

// int8 with one float32 scale for a row, which goes on the sum (kGroup 0), or a float16 scale for kGroup weights.
template <int kGroup>
struct Int8 {
  static constexpr int kSegment = 16;
  static constexpr bool kRowScale = kGroup == 0, kTable = false, kNatural = true;
  struct Raw {
    Quad codes;
    u16 scale;
  };
  __device__ static __forceinline__ void load(Raw& raw, const Matrix& w, int row, int segment) {
    raw.codes = load_stream(w.codes + row * w.row_bytes + segment * 16);
    if (kGroup) raw.scale = load_half(w.scales + 2 * (row * w.scale_stride + segment * kSegment / (kGroup ? kGroup : 1)));
  }
  __device__ static __forceinline__ void expand(const Raw& raw, SharedAddress, u32 (&pairs)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const u32 above = raw.codes.v[i / 2] ^ 0x80808080u;  // 128 more, and never negative
      pairs[i] = sub_halves(pair_of_bytes(above, i % 2), 0x64806480u);
      if (kGroup) pairs[i] = mul_halves(pairs[i], twice(raw.scale));
    }
  }
  __device__ static __forceinline__ int column(int segment, int slot) { return segment * kSegment + slot; }
  __device__ static __forceinline__ int place(int column) { return column; }
};

// Four bits a weight in groups of 32 with a float16 scale: byte j holds weights j and j + 16. The table holds what both
// codes of a byte stand for, once for each bank of shared memory, so that no two threads of a warp meet there.
struct Table4 {
  static constexpr int kSegment = 32;
  static constexpr bool kRowScale = false, kTable = true, kNatural = false;
  struct Raw {
    Quad codes;
    u16 scale;
  };
  __device__ static __forceinline__ void load(Raw& raw, const Matrix& w, int row, int segment) {
    raw.codes = load_stream(w.codes + row * w.row_bytes + segment * 16);
    raw.scale = load_half(w.scales + 2 * (row * w.scale_stride + segment));
  }
  __device__ static __forceinline__ void expand(const Raw& raw, SharedAddress table, u32 (&pairs)[16]) {
    const u32 scale = twice(raw.scale);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const u32 byte = pick_bytes(raw.codes.v[i / 4], 0, 0x4440 + i % 4);
      pairs[i] = mul_halves(load_shared(table + byte * (kWarp * 4)), scale);
    }
  }
  __device__ static __forceinline__ int column(int segment, int slot) {
    return segment * kSegment + slot / 2 + slot % 2 * 16;
  }
  __device__ static __forceinline__ int place(int column) {
    return column / 32 * 32 + column % 16 * 2 + column / 16 % 2;
  }
};

// The same layout for even steps from -8 to 7, which are computed: Q4_0, and int4 with a scale of an eighth.
struct Linear4 {
  static constexpr int kSegment = 32;
  static constexpr bool kRowScale = false, kTable = false, kNatural = false;
  using Raw = Table4::Raw;
  __device__ static __forceinline__ void load(Raw& raw, const Matrix& w, int row, int segment) {
    Table4::load(raw, w, row, segment);
  }
  __device__ static __forceinline__ void expand(const Raw& raw, SharedAddress, u32 (&pairs)[16]) {
    const u32 scale = twice(raw.scale);
#pragma unroll
    for (int word = 0; word < 4; ++word)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const u32 codes = raw.codes.v[word] >> 4 * i & 0x000f000fu;
        pairs[4 * word + i] = mul_halves(sub_halves(codes | kThousand, 0x64086408u), scale);
      }
  }
  // A pair's halves come from bytes 0 and 2, or 1 and 3; i counts low 0 2, high 0 2, low 1 3, high 1 3.
  __device__ static __forceinline__ int column(int segment, int slot) {
    const int i = slot / 2 % 4;
    return segment * kSegment + slot / 8 * 4 + i / 2 + slot % 2 * 2 + i % 2 * 16;
  }
  __device__ static __forceinline__ int place(int column) {
    return column / 32 * 32 + column % 16 / 4 * 8 + column % 2 * 4 + column / 16 % 2 * 2 + column % 4 / 2;
  }
};

// Two bits a weight, digits from kZero below to above, groups of kGroup with a float16 scale. A word holds sixteen
// weights, the first eight in its lower half.
template <int kGroup, int kZero>
struct Linear2 {
  static constexpr int kSegment = 64;
  static constexpr bool kRowScale = false, kTable = false, kNatural = false;
  static constexpr int kScales = kSegment / kGroup;
  struct Raw {
    Quad codes;
    u16 scales[kScales];
  };
  __device__ static __forceinline__ void load(Raw& raw, const Matrix& w, int row, int segment) {
    raw.codes = load_stream(w.codes + row * w.row_bytes + segment * 16);
#pragma unroll
    for (int i = 0; i < kScales; ++i)
      raw.scales[i] = load_half(w.scales + 2 * (row * w.scale_stride + segment * kScales + i));
  }
  __device__ static __forceinline__ void expand(const Raw& raw, SharedAddress, u32 (&pairs)[32]) {
#pragma unroll
    for (int word = 0; word < 4; ++word)
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const u32 codes = raw.codes.v[word] >> 2 * i & 0x00030003u;
        pairs[8 * word + i] =
            mul_halves(sub_halves(codes | kThousand, kThousand + kZero * 0x10001u), twice(raw.scales[word * kScales / 4]));
      }
  }
  __device__ static __forceinline__ int column(int segment, int slot) {
    return segment * kSegment + slot / 16 * 16 + slot % 16 / 2 + slot % 2 * 8;
  }
  __device__ static __forceinline__ int place(int column) {
    return column / 16 * 16 + column % 8 * 2 + column / 8 % 2;
  }
};

// ggml's Q4_K and Q5_K as they lie in a file, for 256 weights: two float16 (d, dmin), eight 6-bit pairs (scale, minimum) in
// twelve bytes, of Q5_K 32 bytes of fifth bits, then 128 bytes of codes, where a run of 32 holds two groups of 32.
template <bool kFive>
struct Q45K {
  static constexpr int kSegment = 32;  // sixteen of each of two neighbouring groups
  static constexpr bool kRowScale = false, kTable = false, kNatural = false;
  static constexpr int kBlockBytes = kFive ? 176 : 144;
  struct Raw {
    Quad codes, header, fifth;
    int group;
  };
  __device__ static __forceinline__ void load(Raw& raw, const Matrix& w, int row, int segment) {
    const u8* block = w.codes + row * w.row_bytes + segment / 8 * kBlockBytes;
    raw.header = load_shared_lines(block);
    if (kFive) raw.fifth = load_shared_lines(block + 16 + segment % 2 * 16);
    raw.codes = load_stream(block + kBlockBytes - 128 + segment % 8 * 16);
    raw.group = segment % 8 / 2 * 2;
  }
  __device__ static __forceinline__ void expand(const Raw& raw, SharedAddress, u32 (&pairs)[16]) {
    const u32* packed = raw.header.v + 1;
    const float d = widen_half(static_cast<u16>(raw.header.v[0])), dmin = widen_half(static_cast<u16>(raw.header.v[0] >> 16));
    u32 scales[2], minima[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int shift = 8 * (raw.group % 4 + i);
      const u32 a = packed[0] >> shift & 255, b = packed[1] >> shift & 255, c = packed[2] >> shift & 255;
      const bool is_lower = raw.group < 4;
      const u32 scale = is_lower ? a & 63 : (c & 15) | a >> 6 << 4;
      const u32 minimum = is_lower ? b & 63 : c >> 4 | b >> 6 << 4;
      scales[i] = twice(narrow_half(d * scale));
      minima[i] = twice(narrow_half(-dmin * minimum));
    }
#pragma unroll
    for (int word = 0; word < 4; ++word)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        u32 codes = raw.codes.v[word] >> 4 * i & 0x000f000fu;
        if (kFive) codes |= (raw.fifth.v[word] >> (i / 2 * 8 + raw.group + i % 2) & 0x00010001u) << 4;
        pairs[4 * word + i] = fma_halves(sub_halves(codes | kThousand, kThousand), scales[i % 2], minima[i % 2]);
      }
  }
  __device__ static __forceinline__ int column(int segment, int slot) {
    const int i = slot / 2 % 4;
    return segment / 8 * 256 + segment % 8 / 2 * 64 + segment % 2 * 16 + slot / 8 * 4 + i / 2 + slot % 2 * 2 + i % 2 * 32;
  }
  __device__ static __forceinline__ int place(int column) {
    return column / 64 * 64 + column / 16 % 2 * 32 + column % 16 / 4 * 8 + column % 2 * 4 + column / 32 % 2 * 2 + column % 4 / 2;
  }
};
using Q4K = Q45K<false>;
using Q5K = Q45K<true>;

// ggml's Q5_0 and Q5_1, low bits apart from the rest: `codes` as Linear4 has them; in `scales` a float16 scale, of Q5_1 a
// float16 minimum, and 32 fifth bits, for 32 weights.
template <bool kMinimum>
struct Linear5 {
  static constexpr int kSegment = 32;
  static constexpr bool kRowScale = false, kTable = false, kNatural = false;
  static constexpr int kScales = kMinimum ? 4 : 3;  // of 16 bits
  struct Raw {
    Quad codes;
    u16 rest[kScales];
  };
  __device__ static __forceinline__ void load(Raw& raw, const Matrix& w, int row, int segment) {
    raw.codes = load_stream(w.codes + row * w.row_bytes + segment * 16);
#pragma unroll
    for (int i = 0; i < kScales; ++i) raw.rest[i] = load_half(w.scales + 2 * (row * w.scale_stride + segment * kScales + i));
  }
  __device__ static __forceinline__ void expand(const Raw& raw, SharedAddress, u32 (&pairs)[16]) {
    const u32 scale = twice(raw.rest[0]), minimum = twice(raw.rest[1]);
    const u32 fifth = raw.rest[kScales - 2] | static_cast<u32>(raw.rest[kScales - 1]) << 16;
#pragma unroll
    for (int word = 0; word < 4; ++word)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const u32 bits = fifth >> (4 * word + i / 2 + i % 2 * 16);
        const u32 codes = (raw.codes.v[word] >> 4 * i & 0x000f000fu) | (bits & 1) << 4 | (bits & 4) << 18;
        const u32 whole = sub_halves(codes | kThousand, kMinimum ? kThousand : 0x64106410u);
        pairs[4 * word + i] = kMinimum ? fma_halves(whole, scale, minimum) : mul_halves(whole, scale);
      }
  }
  __device__ static __forceinline__ int column(int segment, int slot) { return Linear4::column(segment, slot); }
  __device__ static __forceinline__ int place(int column) { return Linear4::place(column); }
};

// ggml's Q6_K, its parts apart so that the codes are aligned: for 256 weights `codes` has 128 bytes of low bits and 64 of
// high ones, `scales` sixteen int8 and a float16 d.
struct Q6K {
  static constexpr int kSegment = 32;  // eight in each of four runs of 32
  static constexpr bool kRowScale = false, kTable = false, kNatural = false;
  struct Raw {
    Duo low[2], high;
    u32 scales;
    u16 d;
  };
  __device__ static __forceinline__ void load(Raw& raw, const Matrix& w, int row, int segment) {
    const int block = segment / 8, half = segment % 8 / 4, at = segment % 4 * 8;
    const u8* codes = w.codes + row * w.row_bytes + block * 192;
    raw.low[0] = load_stream_duo(codes + half * 64 + at);
    raw.low[1] = load_stream_duo(codes + half * 64 + 32 + at);
    raw.high = load_stream_duo(codes + 128 + half * 32 + at);
    const u8* scales = w.scales + 2 * (row * w.scale_stride + block * 9);
    const int first = half * 8 + at / 16;
    raw.scales = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const u16 both = load_half(scales + (first + 2 * i) / 2 * 2);
      raw.scales |= (static_cast<u32>(both) >> first % 2 * 8 & 255) << 8 * i;
    }
    raw.d = load_half(scales + 16);
  }
  __device__ static __forceinline__ void expand(const Raw& raw, SharedAddress, u32 (&pairs)[16]) {
    const float d = widen_half(raw.d);
    u32 scales[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) scales[i] = twice(narrow_half(d * static_cast<i8>(raw.scales >> 8 * i)));
#pragma unroll
    for (int word = 0; word < 2; ++word) {
      const u32 first = raw.low[0].v[word], second = raw.low[1].v[word], top = raw.high.v[word];
      const u32 codes[4] = {(first & 0x0f0f0f0fu) | (top << 4 & 0x30303030u), (second & 0x0f0f0f0fu) | (top << 2 & 0x30303030u),
                            (first >> 4 & 0x0f0f0f0fu) | (top & 0x30303030u), (second >> 4 & 0x0f0f0f0fu) | (top >> 2 & 0x30303030u)};
#pragma unroll
      for (int run = 0; run < 4; ++run)
#pragma unroll
        for (int upper = 0; upper < 2; ++upper)
          pairs[8 * word + 2 * run + upper] =
              mul_halves(sub_halves(pair_of_bytes(codes[run], upper), 0x64206420u), scales[run]);
    }
  }
  __device__ static __forceinline__ int column(int segment, int slot) {
    return segment / 8 * 256 + segment % 8 / 4 * 128 + segment % 4 * 8 + slot / 16 * 4 + slot % 16 / 4 * 32 + slot % 4;
  }
  __device__ static __forceinline__ int place(int column) {
    return column / 128 * 128 + column % 32 / 8 * 32 + column % 8 / 4 * 16 + column / 32 % 4 * 4 + column % 4;
  }
};

__device__ __forceinline__ int segments(int n_columns, int segment) { return divide_up(n_columns, segment); }

// Room for a table in shared memory: 256 pairs, each 32 times.
constexpr int kTableBytes = 256 * kWarp * 4;

// Where a thread's column of the table is.
__device__ __forceinline__ SharedAddress own_column(const u32* table) { return shared_address(table + lane()); }

// Fill the table of pairs, by all threads; they meet before it is read.
__device__ __forceinline__ void fill_table(u32* table, const float* values) {
  for (int byte = thread(); byte < 256; byte += blockDim.x) {
    const u32 pair = narrow_half(values[byte % 16]) | static_cast<u32>(narrow_half(values[byte / 16])) << 16;
    const Quad quad = {{pair, pair, pair, pair}};
    Quad* row = reinterpret_cast<Quad*>(table + byte * kWarp);
#pragma unroll
    for (int i = 0; i < kWarp / 4; ++i) row[(i + byte) % (kWarp / 4)] = quad;  // another bank for each thread
  }
}
