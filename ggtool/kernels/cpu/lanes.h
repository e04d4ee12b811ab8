// Sixteen float32 lanes and the few operations that packed products need, for AVX-512, for AVX2, and for any compiler.
//
// Sixteen, whatever the machine's registers hold: a table of 16 values is then one register, or two, and a group of
// 32 codes is two steps. Every function is exact but for the rounding of float32 sums.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__) && defined(__F16C__))
#include <immintrin.h>
#endif

namespace ggtool {

constexpr int kLanes = 16;

#if defined(__AVX512F__)

constexpr const char* kInstructions = "AVX-512";

using Lanes = __m512;
using Codes = __m512i;  // sixteen int32

inline Lanes zero() { return _mm512_setzero_ps(); }
inline Lanes spread(float value) { return _mm512_set1_ps(value); }
inline Lanes load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Lanes a) { _mm512_storeu_ps(to, a); }
inline Lanes mul(Lanes a, Lanes b) { return _mm512_mul_ps(a, b); }
inline Lanes add(Lanes a, Lanes b) { return _mm512_add_ps(a, b); }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(Lanes a) { return _mm512_reduce_add_ps(a); }
inline Codes bytes(const void* from) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from)));
}
inline Codes dwords(const void* from) { return _mm512_loadu_si512(from); }
inline Codes words(__m256i sixteen) { return _mm512_cvtepu16_epi32(sixteen); }
inline Codes shift_right(Codes a, int bits) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(bits)); }
template <int kBits>
inline Codes shift_right(Codes a) {
  return _mm512_srli_epi32(a, kBits);
}
inline Lanes widen_int8(const int8_t* from) {
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
}
inline Lanes widen_half(const uint16_t* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline Lanes widen_bfloat(const uint16_t* from) {
  const __m256i upper = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(upper), 16));
}

struct Table {
  __m512 values;
  explicit Table(const float* from) : values(_mm512_loadu_ps(from)) {}
  // By the low four bits of each code, whatever is above them.
  Lanes operator[](Codes codes) const { return _mm512_permutexvar_ps(codes, values); }
};

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

constexpr const char* kInstructions = "AVX2";

struct Lanes {
  __m256 a, b;
};
struct Codes {
  __m256i a, b;
};

inline Lanes zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Lanes spread(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Lanes load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline void store(float* to, Lanes x) {
  _mm256_storeu_ps(to, x.a);
  _mm256_storeu_ps(to + 8, x.b);
}
inline Lanes mul(Lanes x, Lanes y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Lanes add(Lanes x, Lanes y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Lanes fma(Lanes x, Lanes y, Lanes z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline float sum(Lanes x) {
  const __m256 eight = _mm256_add_ps(x.a, x.b);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline Codes bytes(const void* from) {
  const __m128i all = _mm_loadu_si128(static_cast<const __m128i*>(from));
  return {_mm256_cvtepu8_epi32(all), _mm256_cvtepu8_epi32(_mm_srli_si128(all, 8))};
}
inline Codes dwords(const void* from) {
  const __m256i* halves = static_cast<const __m256i*>(from);
  return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}
inline Codes words(__m256i sixteen) {
  return {_mm256_cvtepu16_epi32(_mm256_castsi256_si128(sixteen)),
          _mm256_cvtepu16_epi32(_mm256_extracti128_si256(sixteen, 1))};
}
inline Codes shift_right(Codes x, int bits) {
  const __m128i count = _mm_cvtsi32_si128(bits);
  return {_mm256_srl_epi32(x.a, count), _mm256_srl_epi32(x.b, count)};
}
template <int kBits>
inline Codes shift_right(Codes x) {
  return {_mm256_srli_epi32(x.a, kBits), _mm256_srli_epi32(x.b, kBits)};
}
inline Lanes widen_int8(const int8_t* from) {
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(codes, 8)))};
}
inline Lanes widen_half(const uint16_t* from) {
  const __m128i* halves = reinterpret_cast<const __m128i*>(from);
  return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}
inline Lanes widen_bfloat(const uint16_t* from) {
  const __m128i* upper = reinterpret_cast<const __m128i*>(from);
  const __m256i a = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(upper)), 16);
  const __m256i b = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(upper + 1)), 16);
  return {_mm256_castsi256_ps(a), _mm256_castsi256_ps(b)};
}

struct Table {
  __m256 low, high;
  explicit Table(const float* from) : low(_mm256_loadu_ps(from)), high(_mm256_loadu_ps(from + 8)) {}
  Lanes operator[](Codes codes) const { return {eight(codes.a), eight(codes.b)}; }

 private:
  // vpermps looks at three bits; the fourth, moved to the sign, chooses between the halves.
  __m256 eight(__m256i codes) const {
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, codes), _mm256_permutevar8x32_ps(high, codes),
                            _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
  }
};

#else

constexpr const char* kInstructions = "scalar";

struct Lanes {
  float v[kLanes];
};
struct Codes {
  int32_t v[kLanes];
};

inline Lanes spread(float value) {
  Lanes r;
  for (float& x : r.v) x = value;
  return r;
}
inline Lanes zero() { return spread(0.0f); }
inline Lanes load(const float* from) {
  Lanes r;
  std::memcpy(r.v, from, sizeof r.v);
  return r;
}
inline void store(float* to, Lanes a) { std::memcpy(to, a.v, sizeof a.v); }
inline Lanes mul(Lanes a, Lanes b) {
  for (int i = 0; i < kLanes; ++i) a.v[i] *= b.v[i];
  return a;
}
inline Lanes add(Lanes a, Lanes b) {
  for (int i = 0; i < kLanes; ++i) a.v[i] += b.v[i];
  return a;
}
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
  for (int i = 0; i < kLanes; ++i) c.v[i] += a.v[i] * b.v[i];
  return c;
}
inline float sum(Lanes a) {
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) a.v[i] += a.v[i + half];
  return a.v[0];
}
inline Codes bytes(const void* from) {
  Codes r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = static_cast<const uint8_t*>(from)[i];
  return r;
}
inline Codes dwords(const void* from) {
  Codes r;
  std::memcpy(r.v, from, sizeof r.v);
  return r;
}
inline Codes shift_right(Codes a, int bits) {
  for (int32_t& x : a.v) x = static_cast<int32_t>(static_cast<uint32_t>(x) >> bits);
  return a;
}
template <int kBits>
inline Codes shift_right(Codes a) {
  return shift_right(a, kBits);
}
inline Lanes widen_int8(const int8_t* from) {
  Lanes r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = from[i];
  return r;
}
inline Lanes widen_bfloat(const uint16_t* from) {
  Lanes r;
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
    std::memcpy(&r.v[i], &bits, sizeof bits);
  }
  return r;
}
inline float half_to_float(uint16_t half) {
  const uint32_t magnitude = half & 0x7fff, sign = static_cast<uint32_t>(half & 0x8000) << 16;
  // Exponent and mantissa in float32's places, then the difference of the two biases by a product that is exact for
  // subnormals too. Infinity and NaN are no scales and do not occur.
  const uint32_t bits = magnitude << 13;
  float value;
  std::memcpy(&value, &bits, sizeof bits);
  value *= 0x1p112f;
  return sign ? -value : value;
}
inline Lanes widen_half(const uint16_t* from) {
  Lanes r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = half_to_float(from[i]);
  return r;
}

struct Table {
  float values[kLanes];
  explicit Table(const float* from) { std::memcpy(values, from, sizeof values); }
  Lanes operator[](Codes codes) const {
    Lanes r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = values[codes.v[i] & 15];
    return r;
  }
};

class Trits {
 public:
  explicit Trits(const void* from) : left_(bytes(from)) {}
  Codes next() {
    Codes digits;
    for (int i = 0; i < kLanes; ++i) {
      digits.v[i] = left_.v[i] % 3;
      left_.v[i] /= 3;
    }
    return digits;
  }

 private:
  Codes left_;
};

#endif

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__) && defined(__F16C__))

// The digits to base 3 of sixteen bytes, the lowest first.
class Trits {
 public:
  explicit Trits(const void* from) : left_(_mm256_cvtepu8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(from)))) {}
  Codes next() {
    // a / 3 for a up to 255, in 16 bits.
    const __m256i above = _mm256_srli_epi16(_mm256_mullo_epi16(left_, _mm256_set1_epi16(171)), 9);
    const __m256i digits = _mm256_sub_epi16(left_, _mm256_add_epi16(above, _mm256_add_epi16(above, above)));
    left_ = above;
    return words(digits);
  }

 private:
  __m256i left_;  // sixteen uint16
};

#endif

}  // namespace ggtool
