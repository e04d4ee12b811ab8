// The ways a matrix lies in memory, and how a thread turns a segment of a row into pairs of float16.
//
// A warp multiplies sixteen rows at a time, four threads to a row, so a step of a warp is four segments of each row. A format
// says: kSegment, the weights that a thread reads at once; load, which starts the reads; pairs, which writes the segment as
// 16-bit pairs in the order of `slot`s; column, the column in W of a segment's slot. The order of slots is whatever costs
// least to unpack, and activations are laid down in the same order: of eight slots that start at a multiple of eight, four
// neighbouring columns and four others, in the same places of all eights.
//
// A pair may stand for weights that are still to be shifted and scaled: weight = (half - away) * scale. The shift costs
// nothing, because all rows share it: it is one more product of the same activations, with -away (kAway). A format of
// kGroups > 0 has as many groups of columns in a step, all of them in every segment of it, and the sums of a group are
// multiplied by the row's scale of it, and of kMinima formats the activations' sum times its minimum is taken off; kUnit is what the sums of the others are multiplied by. Such codes are woven: a
// group's bytes are dealt to the four threads of a row, `woven` of device_matrix.py.
//
// kStaged formats are copied to shared memory ahead of the wait for the kernel before, sixteen bytes a segment and, for
// each row and kScaleSteps steps, kScaleBytes of scales; kMoreBytes are what a segment has besides, behind all others of
// its row. The others are read into registers.
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

constexpr u32 kThousand = 0x64006400;   // 1024 twice: its last ten bits count units
constexpr u32 kSmallUnits = 16777216;  // of the least float16, whose bits are a number's own, in one

__device__ __forceinline__ u32 pair_of_bytes(u32 bytes, int upper) {
  return pick_bytes(bytes, kThousand >> 8, upper ? 0x4342 : 0x4140);
}

// What staged formats are read as: sixteen bytes, and the scales of a step.
struct Staged {
  Quad codes;
  Duo scales;
};
template <int kScaleBytes>
__device__ __forceinline__ void load_staged(Staged& raw, const Matrix& w, int row, int segment) {
  raw.codes = load_stream(w.codes + row * w.row_bytes + segment * 16);
  const u8* scales = w.scales + 2 * row * w.scale_stride + segment / 4 * kScaleBytes;
#pragma unroll
  for (int i = 0; i < kScaleBytes / 4; ++i) raw.scales.v[i] = both(load_half(scales + 4 * i), load_half(scales + 4 * i + 2));
}
__device__ __forceinline__ float scale_of(const Staged& raw, int group) {
  return widen_half(static_cast<u16>(raw.scales.v[group / 2] >> group % 2 * 16));
}

// Two bytes a weight, of the type of the activations.
struct Plain {
  static constexpr int kSegment = 8, kGroups = 0, kScaleBytes = 0, kScaleSteps = 1, kMoreBytes = 0;
  static constexpr bool kStaged = true, kRowScale = false, kTable = false, kAway = false, kMinima = false;
  static constexpr float kUnit = 1;
  using Raw = Staged;
  __device__ static __forceinline__ void load(Raw& raw, const Matrix& w, int row, int segment) {
    load_staged<0>(raw, w, row, segment);
  }
  __device__ static __forceinline__ void pairs(const Raw& raw, int, SharedAddress, u32 (&to)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = raw.codes.v[i];
  }
  __device__ static constexpr int column(int segment, int slot) { return segment * kSegment + slot; }
};

// Bytes as so many of the least float16s.
__device__ __forceinline__ void pairs_of_bytes(u32 codes, u32& first, u32& second) {
  first = pick_bytes(codes, 0, 0x4140);
  second = pick_bytes(codes, 0, 0x4342);
}

// int8, 128 more so that none is negative, with one float32 scale for a row, which goes on the sum.
struct Int8Rows {
  static constexpr int kSegment = 16, kGroups = 0, kScaleBytes = 0, kScaleSteps = 1, kMoreBytes = 0;
  static constexpr bool kStaged = true, kRowScale = true, kTable = false, kAway = true, kMinima = false;
  static constexpr float kUnit = kSmallUnits;
  using Raw = Staged;
  __device__ static __forceinline__ void load(Raw& raw, const Matrix& w, int row, int segment) {
    load_staged<0>(raw, w, row, segment);
  }
  __device__ static __forceinline__ void pairs(const Raw& raw, int, SharedAddress, u32 (&to)[8]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs_of_bytes(raw.codes.v[i], to[2 * i], to[2 * i + 1]);
  }
  __device__ static constexpr u32 minus_away(int, int) { return 0x80808080; }
  __device__ static constexpr int column(int segment, int slot) { return segment * kSegment + slot; }
};

// int8, 128 more, in groups of 32 with a float16 scale: two groups of a row are woven, eight weights of each to a thread.
struct Int8Groups {
  static constexpr int kSegment = 16, kGroups = 2, kScaleBytes = 4, kScaleSteps = 1, kMoreBytes = 0;
  static constexpr bool kStaged = true, kRowScale = false, kTable = false, kAway = true, kMinima = false;
  static constexpr float kUnit = kSmallUnits;
  using Raw = Staged;
  __device__ static __forceinline__ void load(Raw& raw, const Matrix& w, int row, int segment) {
    load_staged<kScaleBytes>(raw, w, row, segment);
  }
  __device__ static __forceinline__ void pairs(const Raw& raw, int group, SharedAddress, u32 (&to)[4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) pairs_of_bytes(raw.codes.v[2 * group + i], to[2 * i], to[2 * i + 1]);
  }
  __device__ static constexpr u32 minus_away(int, int) { return 0x80808080; }
  __device__ static __forceinline__ float scale(const Raw& raw, int group) { return scale_of(raw, group); }
  __device__ static constexpr int column(int segment, int slot) {
    return segment / 4 * 64 + slot / 8 * 32 + segment % 4 * 8 + slot % 8;
  }
};

// Four bits a weight in groups of 32 with a float16 scale: byte j of a group holds weights j and j + 16, and four groups
// are woven, a word of each to a thread. The table holds what both codes of a byte stand for, once for each bank of shared
// memory, so that no two threads of a warp meet there.
struct Table4 {
  static constexpr int kSegment = 32, kGroups = 4, kScaleBytes = 8, kScaleSteps = 1, kMoreBytes = 0;
  static constexpr bool kStaged = true, kRowScale = false, kTable = true, kAway = false, kMinima = false;
  static constexpr float kUnit = 1;
  using Raw = Staged;
  __device__ static __forceinline__ void load(Raw& raw, const Matrix& w, int row, int segment) {
    load_staged<kScaleBytes>(raw, w, row, segment);
  }
  __device__ static __forceinline__ void pairs(const Raw& raw, int group, SharedAddress table, u32 (&to)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = load_shared(table + pick_bytes(raw.codes.v[group], 0, 0x4440 + i) * (kWarp * 4));
  }
  __device__ static __forceinline__ float scale(const Raw& raw, int group) { return scale_of(raw, group); }
  __device__ static constexpr int column(int segment, int slot) {
    return segment / 4 * 128 + slot / 8 * 32 + segment % 4 * 4 + slot % 8 / 2 + slot % 2 * 16;
  }
};

// The same layout for even steps from -8 to 7, which are computed: Q4_0, and int4 with a scale of an eighth. Of a pair the
// codes are the last four bits of 1024 and more, of the next the four before those, of 64 and more.
struct Linear4 {
  static constexpr int kSegment = 32, kGroups = 4, kScaleBytes = 8, kScaleSteps = 1, kMoreBytes = 0;
  static constexpr bool kStaged = true, kRowScale = false, kTable = false, kAway = true, kMinima = false;
  static constexpr float kUnit = 1;
  using Raw = Staged;
  __device__ static __forceinline__ void load(Raw& raw, const Matrix& w, int row, int segment) {
    load_staged<kScaleBytes>(raw, w, row, segment);
  }
  __device__ static __forceinline__ void pairs(const Raw& raw, int group, SharedAddress, u32 (&to)[4]) {
    const u32 word = raw.codes.v[group], rest = word >> 8;
    to[0] = masked_with(word, 0x000f000fu, 0x64006400u);
    to[1] = masked_with(word, 0x00f000f0u, 0x54005400u);
    to[2] = masked_with(rest, 0x000f000fu, 0x64006400u);
    to[3] = masked_with(rest, 0x00f000f0u, 0x54005400u);
  }
  __device__ static constexpr u32 minus_away(int, int pair) { return pair % 2 ? 0xd480d480 : 0xe408e408; }  // -72, -1032
  __device__ static __forceinline__ float scale(const Raw& raw, int group) { return scale_of(raw, group); }
  // A pair's halves come from bytes 0 and 2, or 1 and 3; pairs are low 0 2, high 0 2, low 1 3, high 1 3.
  __device__ static constexpr int column(int segment, int slot) {
    const int pair = slot / 2 % 4;
    return segment / 4 * 128 + slot / 8 * 32 + segment % 4 * 4 + pair / 2 + slot % 2 * 2 + pair % 2 * 16;
  }
};

// Two bits a weight, digits 0, 1 and 2 for -1, 0 and 1, in groups of 64 with a float16 scale, four groups woven. A word holds
// sixteen weights, the first eight in its lower half.
struct Ternary {
  static constexpr int kSegment = 64, kGroups = 4, kScaleBytes = 8, kScaleSteps = 1, kMoreBytes = 0;
  static constexpr bool kStaged = true, kRowScale = false, kTable = false, kAway = true, kMinima = false;
  static constexpr float kUnit = 1;
  using Raw = Staged;
  __device__ static __forceinline__ void load(Raw& raw, const Matrix& w, int row, int segment) {
    load_staged<kScaleBytes>(raw, w, row, segment);
  }
  __device__ static __forceinline__ void pairs(const Raw& raw, int group, SharedAddress, u32 (&to)[8]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const u32 word = raw.codes.v[group] >> 8 * i;
      to[4 * i] = masked_with(word, 0x00030003u, 0x64006400u);
      to[4 * i + 1] = masked_with(word, 0x000c000cu, 0x5c005c00u);
      to[4 * i + 2] = masked_with(word, 0x00300030u, 0x54005400u);
      to[4 * i + 3] = masked_with(word, 0x00c000c0u, 0x4c004c00u);
    }
  }
  // One more than what each pair's bits are set in: -1025, -257, -65, -17.
  __device__ static constexpr u32 minus_away(int, int pair) {
    return pair % 4 == 0 ? 0xe401e401 : pair % 4 == 1 ? 0xdc04dc04 : pair % 4 == 2 ? 0xd410d410 : 0xcc40cc40;
  }
  __device__ static __forceinline__ float scale(const Raw& raw, int group) { return scale_of(raw, group); }
  __device__ static constexpr int column(int segment, int slot) {
    return segment / 4 * 256 + slot / 16 * 64 + segment % 4 * 16 + slot % 16 / 2 + slot % 2 * 8;
  }
};

// Two bits a weight, even steps from -2 to 1, groups of 32 with a float16 scale. Words as in Ternary, in their order.
struct Linear2 {
  static constexpr int kSegment = 64, kGroups = 0, kScaleBytes = 0, kScaleSteps = 1, kMoreBytes = 0;
  static constexpr bool kStaged = false, kRowScale = false, kTable = false, kAway = false, kMinima = false;
  static constexpr float kUnit = 1;
  struct Raw {
    Quad codes;
    u16 scales[2];
  };
  __device__ static __forceinline__ void load(Raw& raw, const Matrix& w, int row, int segment) {
    raw.codes = load_stream(w.codes + row * w.row_bytes + segment * 16);
#pragma unroll
    for (int i = 0; i < 2; ++i) raw.scales[i] = load_half(w.scales + 2 * (row * w.scale_stride + segment * 2 + i));
  }
  __device__ static __forceinline__ void pairs(const Raw& raw, int, SharedAddress, u32 (&to)[32]) {
#pragma unroll
    for (int word = 0; word < 4; ++word)
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const u32 codes = raw.codes.v[word] >> 2 * i & 0x00030003u;
        to[8 * word + i] = mul_halves(sub_halves(codes | kThousand, kThousand + 0x00020002u), twice(raw.scales[word / 2]));
      }
  }
  __device__ static constexpr int column(int segment, int slot) {
    return segment * kSegment + slot / 16 * 16 + slot % 16 / 2 + slot % 2 * 8;
  }
};

// ggml's Q4_K: for 256 weights `scales` has two float16 (d, dmin) and eight 6-bit pairs (scale, minimum) in twelve bytes, as
// in a file; of the codes a run of 32 bytes holds two groups of 32, and two runs are woven, two words of each to a thread.
struct Q4K {
  static constexpr int kSegment = 32, kGroups = 4, kScaleBytes = 16, kScaleSteps = 2, kMoreBytes = 0;
  static constexpr bool kStaged = true, kRowScale = false, kTable = false, kAway = true, kMinima = true;
  static constexpr float kUnit = 1;
  struct Raw {
    Quad codes, scales;
    int half;  // of 256 weights
  };
  __device__ static __forceinline__ void load(Raw& raw, const Matrix& w, int row, int segment) {
    raw.codes = load_stream(w.codes + row * w.row_bytes + segment * 16);
    raw.scales = load_shared_lines(w.scales + 2 * row * w.scale_stride + segment / 8 * kScaleBytes);
    raw.half = segment / 4 % 2;
  }
  __device__ static __forceinline__ void pairs(const Raw& raw, int group, SharedAddress, u32 (&to)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const u32 word = raw.codes.v[group / 2 * 2 + i / 2] >> i % 2 * 8;
      to[i] = group % 2 ? masked_with(word, 0x00f000f0u, 0x54005400u) : masked_with(word, 0x000f000fu, 0x64006400u);
    }
  }
  __device__ static constexpr u32 minus_away(int group, int) { return group % 2 ? 0xd400d400 : 0xe400e400; }  // -64, -1024
  // Four scales or minima in the bytes of a word: of the first half lower bits of one word, of the second bits of two.
  __device__ static __forceinline__ float small(u32 lower, u32 upper, int half, int shift, int group) {
    const u32 four = half ? (upper >> shift & 0x0f0f0f0fu) | (lower >> 2 & 0x30303030u) : lower & 0x3f3f3f3fu;
    return __uint_as_float(pick_bytes(four, 0x4b000000u, 0x7650 + group)) - 8388608.0f;
  }
  __device__ static __forceinline__ float scale(const Raw& raw, int group) {
    return widen_half(static_cast<u16>(raw.scales.v[0])) * small(raw.scales.v[1], raw.scales.v[3], raw.half, 0, group);
  }
  __device__ static __forceinline__ float minimum(const Raw& raw, int group) {
    return widen_half(static_cast<u16>(raw.scales.v[0] >> 16)) * small(raw.scales.v[2], raw.scales.v[3], raw.half, 4, group);
  }
  // Of eight slots: bytes 0 2 1 3 of one word, and of the next.
  __device__ static constexpr int column(int segment, int slot) {
    return segment / 4 * 128 + slot / 8 * 32 + segment % 4 * 8 + slot % 8 / 4 * 4 + slot % 4 / 2 + slot % 2 * 2;
  }
};

// ggml's Q5_K as it lies in a file: the same scales, 32 bytes of fifth bits, then 128 bytes of codes.
struct Q5K {
  static constexpr int kSegment = 32;  // sixteen of each of two neighbouring groups
  static constexpr int kGroups = 0, kScaleBytes = 0, kScaleSteps = 1, kMoreBytes = 0;
  static constexpr bool kStaged = false, kRowScale = false, kTable = false, kAway = false, kMinima = false;
  static constexpr float kUnit = 1;
  struct Raw {
    Quad codes, header, fifth;
    int group;
  };
  __device__ static __forceinline__ void load(Raw& raw, const Matrix& w, int row, int segment) {
    const u8* block = w.codes + row * w.row_bytes + segment / 8 * 176;
    raw.header = load_shared_lines(block);
    raw.fifth = load_shared_lines(block + 16 + segment % 2 * 16);
    raw.codes = load_stream(block + 48 + segment % 8 * 16);
    raw.group = segment % 8 / 2 * 2;
  }
  __device__ static __forceinline__ void pairs(const Raw& raw, int, SharedAddress, u32 (&to)[16]) {
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
        codes |= (raw.fifth.v[word] >> (i / 2 * 8 + raw.group + i % 2) & 0x00010001u) << 4;
        to[4 * word + i] = fma_halves(sub_halves(codes | kThousand, kThousand), scales[i % 2], minima[i % 2]);
      }
  }
  __device__ static constexpr int column(int segment, int slot) {
    const int i = slot / 2 % 4;
    return segment / 8 * 256 + segment % 8 / 2 * 64 + segment % 2 * 16 + slot / 8 * 4 + i / 2 + slot % 2 * 2 + i % 2 * 32;
  }
};

// ggml's Q5_0 and Q5_1, low bits apart from the rest: bytes as Linear4 has them, not woven; in `scales` a float16 scale, of Q5_1 a
// float16 minimum, and 32 fifth bits, for 32 weights.
template <bool kMinimum>
struct Linear5 {
  static constexpr int kSegment = 32;
  static constexpr int kGroups = 0, kScaleBytes = 0, kScaleSteps = 1, kMoreBytes = 0;
  static constexpr bool kStaged = false, kRowScale = false, kTable = false, kAway = false, kMinima = false;
  static constexpr float kUnit = 1;
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
  __device__ static __forceinline__ void pairs(const Raw& raw, int, SharedAddress, u32 (&to)[16]) {
    const u32 scale = twice(raw.rest[0]), minimum = twice(raw.rest[1]);
    const u32 fifth = raw.rest[kScales - 2] | static_cast<u32>(raw.rest[kScales - 1]) << 16;
#pragma unroll
    for (int word = 0; word < 4; ++word)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const u32 bits = fifth >> (4 * word + i / 2 + i % 2 * 16);
        const u32 codes = (raw.codes.v[word] >> 4 * i & 0x000f000fu) | (bits & 1) << 4 | (bits & 4) << 18;
        const u32 whole = sub_halves(codes | kThousand, kMinimum ? kThousand : 0x64106410u);
        to[4 * word + i] = kMinimum ? fma_halves(whole, scale, minimum) : mul_halves(whole, scale);
      }
  }
  __device__ static constexpr int column(int segment, int slot) {
    const int pair = slot / 2 % 4;
    return segment * kSegment + slot / 8 * 4 + pair / 2 + slot % 2 * 2 + pair % 2 * 16;
  }
};

// ggml's Q6_K in groups of 16 with an int8 scale, times one float16 for 256 weights. Of a row all low bits lie before all high
// ones; a step has half a block's, woven: of each group a word to a thread. `scales` has 24 bytes a block: sixteen
// scales, the float16 and nothing.
struct Q6K {
  static constexpr int kSegment = 32, kGroups = 8, kScaleBytes = 24, kScaleSteps = 2, kMoreBytes = 8;
  static constexpr bool kStaged = true, kRowScale = false, kTable = false, kAway = true, kMinima = false;
  static constexpr float kUnit = 1;
  struct Raw {
    Quad codes;
    Duo more, scales;
    u32 d;
  };
  __device__ static __forceinline__ void load(Raw& raw, const Matrix& w, int row, int segment) {
    const u8 *codes = w.codes + row * w.row_bytes, *scales = w.scales + 2 * row * w.scale_stride + segment / 8 * kScaleBytes;
    raw.codes = load_stream(codes + segment * 16);
    raw.more = load_stream_duo(codes + w.n_columns / 2 + segment * 8);
    raw.scales = load_stream_duo(scales + segment / 4 % 2 * 8);
    raw.d = load_half(scales + 16);
  }
  // Groups are the first sixteen of each of four runs of 32, then the others: low bits of runs 0 and 2 share a word, and of 1 and 3.
  __device__ static __forceinline__ void pairs(const Raw& raw, int group, SharedAddress, u32 (&to)[2]) {
    const int run = group % 4;
    const u32 word = raw.codes.v[group / 4 * 2 + run % 2], top = raw.more.v[group / 4];
    const u32 upper = run == 0 ? top << 4 : run == 1 ? top << 2 : run == 2 ? top : top >> 2;
    const u32 codes = masked_with(upper, 0x30303030u, (run < 2 ? word : word >> 4) & 0x0f0f0f0fu);
#pragma unroll
    for (int i = 0; i < 2; ++i) to[i] = pair_of_bytes(codes, i);
  }
  __device__ static constexpr u32 minus_away(int, int) { return 0xe420e420; }  // -1056
  __device__ static __forceinline__ float scale(const Raw& raw, int group) {
    const int at = group % 4 * 2 + group / 4;
    const u32 four = raw.scales.v[at / 4] ^ 0x80808080u;
    const float whole = __uint_as_float(pick_bytes(four, 0x4b000000u, 0x7650 + at % 4)) - (8388608.0f + 128.0f);
    return widen_half(static_cast<u16>(raw.d)) * whole;
  }
  __device__ static constexpr int column(int segment, int slot) {
    return segment / 4 * 128 + slot % 16 / 4 * 32 + slot / 16 * 16 + segment % 4 * 4 + slot % 4;
  }
};

// Segments of a row: of woven codes whole steps.
template <class Format>
__device__ __forceinline__ int segments(int n_columns) {
  return Format::kGroups ? 4 * divide_up(n_columns, 4 * Format::kSegment) : divide_up(n_columns, Format::kSegment);
}

// Pairs of a set: of a group's part of a segment, or of a whole one.
template <class Format>
constexpr int kPairs = Format::kSegment / 2 / (Format::kGroups ? Format::kGroups : 1);

// What a format does not have is nothing.
template <class Format>
__device__ constexpr u32 minus_away_of(int set, int pair) {
  if constexpr (Format::kAway)
    return Format::minus_away(set, pair);
  else
    return 0;
}
template <class Format>
__device__ __forceinline__ float scale_of_set(const typename Format::Raw& raw, int set) {
  if constexpr (Format::kGroups > 0)
    return Format::scale(raw, set);
  else
    return 1;
}
template <class Format>
__device__ __forceinline__ float minimum_of_set(const typename Format::Raw& raw, int set) {
  if constexpr (Format::kMinima)
    return Format::minimum(raw, set);
  else
    return 0;
}

// The weights of a segment, as floats in the order of slots: for `embed` and `widen_rows`. Row scales are not in them.
template <class Format>
__device__ __forceinline__ void expand(const typename Format::Raw& raw, SharedAddress table, float (&to)[Format::kSegment]) {
  constexpr int kSets = Format::kGroups ? Format::kGroups : 1;
#pragma unroll
  for (int set = 0; set < kSets; ++set) {
    u32 some[kPairs<Format>];
    Format::pairs(raw, set, table, some);
    const float scale = Format::kUnit * scale_of_set<Format>(raw, set), minimum = minimum_of_set<Format>(raw, set);
#pragma unroll
    for (int i = 0; i < kPairs<Format>; ++i) {
      const u32 minus = minus_away_of<Format>(set, i);
      to[2 * (set * kPairs<Format> + i)] = (low(some[i]) + low(minus)) * scale - minimum;
      to[2 * (set * kPairs<Format> + i) + 1] = (high(some[i]) + high(minus)) * scale - minimum;
    }
  }
}

// A table of pairs in shared memory: 256 of them, each 32 times.
constexpr int kTableWords = 256 * kWarp;

// Fill the table, by all threads; they meet before it is read.
__device__ __forceinline__ void fill_table(u32* table, const float* values) {
  for (int byte = thread(); byte < 256; byte += blockDim.x) {
    const u32 pair = narrow_half(values[byte % 16]) | static_cast<u32>(narrow_half(values[byte / 16])) << 16;
    const Quad quad = {{pair, pair, pair, pair}};
    Quad* row = reinterpret_cast<Quad*>(table + byte * kWarp);
#pragma unroll
    for (int i = 0; i < kWarp / 4; ++i) row[(i + byte) % (kWarp / 4)] = quad;  // another bank for each thread
  }
}
