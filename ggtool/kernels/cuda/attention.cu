// One new token's attention over the KV cache: normalizes and rotates its query and key, stores key and value, and
// weighs the values of all positions up to it.
//
// A block takes HEADS query heads that share a key head, and one of `n_splits` runs of positions; the last block of a
// head joins the runs, always in the same order. Earlier keys and values are under way before the kernel waits for the
// projections. Constants: HEAD_DIM, HEADS, WARPS, UNROLL, and IS_BFLOAT16 for the cache's type.
#include "device.h"

struct Attention {
  const float* projected;   // (n_texts, (n_heads + 2 * n_kv_heads) * HEAD_DIM): queries, keys, values
  u16 *keys, *values;       // of this layer: (n_texts, n_kv_heads, n_ctx, HEAD_DIM)
  float* y;                 // (n_texts, n_heads * HEAD_DIM)
  float* runs;              // (n_texts, n_heads, n_splits, HEAD_DIM + 2): sums, their weight, its exponent
  u32* counters;            // (n_texts, n_heads / HEADS), zeros
  const float* rotations;   // (positions, n_rotated / 2, 2): cosine, sine; null for none
  const float* query_norm;  // (HEAD_DIM,) or null
  const float* key_norm;
  const int* position;      // of the new token
  float scale, epsilon;
  int n_heads, n_kv_heads, n_ctx, n_splits, n_rotated, is_interleaved;
};

__device__ constexpr int power_of_two(int n) { return n <= 1 ? 1 : 2 * power_of_two((n + 1) / 2); }
constexpr int kWide = 8;                                         // dimensions that a thread holds: 16 bytes of the cache
constexpr int kLanes = power_of_two((HEAD_DIM + kWide - 1) / kWide);  // threads that share a position
constexpr int kAtOnce = kWarp / kLanes;                          // positions that a warp takes at once
constexpr int kThreads = WARPS * kWarp;

__device__ __forceinline__ float rotated(const Attention& p, const float* head, int i, int position) {
  if (i >= p.n_rotated) return head[i];
  const int half = p.n_rotated / 2;
  const int pair = p.is_interleaved ? i / 2 : i % half;
  const bool is_second = p.is_interleaved ? i % 2 : i >= half;
  const float* at = p.rotations + 2 * (static_cast<i64>(position) * half + pair);
  const int other = p.is_interleaved ? i ^ 1 : is_second ? i - half : i + half;
  return head[i] * at[0] + (is_second ? head[other] : -head[other]) * at[1];
}

extern "C" __global__ void __launch_bounds__(kThreads) attention(const __grid_constant__ Attention p) {
  __shared__ float heads[HEADS + 2][HEAD_DIM];  // the new token's queries, key and value as they came
  __shared__ float queries[HEADS][HEAD_DIM];
  alignas(16) __shared__ u16 new_key[HEAD_DIM], new_value[HEAD_DIM];
  __shared__ float part_sums[WARPS][HEADS][HEAD_DIM], part_weights[WARPS][HEADS], part_tops[WARPS][HEADS];
  __shared__ int is_last;

  const int split = blockIdx.x, group = blockIdx.y, text = blockIdx.z;
  const int first_head = group * HEADS, kv_head = first_head / (p.n_heads / p.n_kv_heads);
  const int position = load_fresh(p.position), n_positions = position + 1;
  const int n_run = divide_up(n_positions, p.n_splits), begin = split * n_run;
  const int end = begin + n_run < n_positions ? begin + n_run : n_positions;
  const i64 at_head = (static_cast<i64>(text) * p.n_kv_heads + kv_head) * p.n_ctx * HEAD_DIM;
  const int sub = lane() / kLanes, dim = lane() % kLanes * kWide;
  const bool has_dim = dim < HEAD_DIM;
  constexpr int kStep = WARPS * kAtOnce;  // positions from one turn of a warp to its next

  Quad keys[UNROLL], values[UNROLL];
  const auto fetch = [&](Quad (&to)[UNROLL], const u16* from, int first) {
#pragma unroll
    for (int slot = 0; slot < UNROLL; ++slot) {
      const int at = first + slot * kStep + sub;
      to[slot] = Quad{};
      if (at < end && at < position && has_dim)
        to[slot] = load_fresh(reinterpret_cast<const Quad*>(from + at_head + static_cast<i64>(at) * HEAD_DIM + dim));
    }
  };
  fetch(keys, p.keys, begin + warp() * kAtOnce);
  fetch(values, p.values, begin + warp() * kAtOnce);

  wait_for_kernel_before();
  let_next_kernel_in();
  const float* projected = p.projected + static_cast<i64>(text) * (p.n_heads + 2 * p.n_kv_heads) * HEAD_DIM;
  for (int i = warp(); i < HEADS + 2; i += WARPS) {
    const int head = i < HEADS ? first_head + i : i == HEADS ? p.n_heads + kv_head : p.n_heads + p.n_kv_heads + kv_head;
    const float* norm = i < HEADS ? p.query_norm : i == HEADS ? p.key_norm : nullptr;
    constexpr int kTurns = (HEAD_DIM + kWarp - 1) / kWarp;
    float some[kTurns], squares = 0;
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int d = lane() + turn * kWarp;
      some[turn] = d < HEAD_DIM ? load_fresh(projected + head * HEAD_DIM + d) : 0.0f;
    }
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) squares += some[turn] * some[turn];
    const float by = norm ? rsqrtf(sum_of_warp(squares) / HEAD_DIM + p.epsilon) : 1.0f;
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int d = lane() + turn * kWarp;
      if (d < HEAD_DIM) heads[i][d] = norm ? some[turn] * by * norm[d] : some[turn];
    }
  }
  sync_block();
  for (int i = thread(); i < (HEADS + 1) * HEAD_DIM; i += kThreads) {
    const int head = i / HEAD_DIM, d = i % HEAD_DIM;
    const float value = rotated(p, heads[head], d, position);
    if (head < HEADS) {
      queries[head][d] = value * p.scale;
    } else {
      new_key[d] = narrow(value);
      new_value[d] = narrow(heads[HEADS + 1][d]);
    }
  }
  sync_block();
  // One block of those that share the key head stores what is new.
  if (end == n_positions && begin < end && first_head % (p.n_heads / p.n_kv_heads) == 0) {
    for (int d = thread(); d < HEAD_DIM; d += kThreads) {
      p.keys[at_head + static_cast<i64>(position) * HEAD_DIM + d] = new_key[d];
      p.values[at_head + static_cast<i64>(position) * HEAD_DIM + d] = new_value[d];
    }
  }

  float query[HEADS][kWide], sums[HEADS][kWide] = {}, weights[HEADS] = {}, tops[HEADS];
#pragma unroll
  for (int h = 0; h < HEADS; ++h) {
    tops[h] = kLowest;
#pragma unroll
    for (int i = 0; i < kWide; ++i) query[h][i] = has_dim ? queries[h][dim + i] : 0.0f;
  }
  // Every thread of a warp takes as many turns as its first, for they hand each other what they have.
  for (int turn = begin + warp() * kAtOnce; turn < end; turn += UNROLL * kStep) {
    float scores[HEADS][UNROLL];
#pragma unroll
    for (int slot = 0; slot < UNROLL; ++slot) {
      if (turn + slot * kStep + sub == position && has_dim) {
        keys[slot] = *reinterpret_cast<const Quad*>(new_key + dim);
        values[slot] = *reinterpret_cast<const Quad*>(new_value + dim);
      }
#pragma unroll
      for (int h = 0; h < HEADS; ++h) {
        float score = 0;
#pragma unroll
        for (int i = 0; i < kWide / 2; ++i) {
          score += query[h][2 * i] * low(keys[slot].v[i]);
          score += query[h][2 * i + 1] * high(keys[slot].v[i]);
        }
        scores[h][slot] = score;
      }
    }
    const int next = turn + UNROLL * kStep;
    if (next < end) fetch(keys, p.keys, next);
#pragma unroll
    for (int mask = kLanes / 2; mask; mask /= 2)
#pragma unroll
      for (int h = 0; h < HEADS; ++h)
#pragma unroll
        for (int slot = 0; slot < UNROLL; ++slot) scores[h][slot] += swap_lanes(scores[h][slot], mask);
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
      float top = tops[h];
#pragma unroll
      for (int slot = 0; slot < UNROLL; ++slot)
        if (turn + slot * kStep + sub < end) top = fmaxf(top, scores[h][slot]);
      const float kept = __expf(tops[h] - top);
      tops[h] = top;
      weights[h] *= kept;
#pragma unroll
      for (int i = 0; i < kWide; ++i) sums[h][i] *= kept;
#pragma unroll
      for (int slot = 0; slot < UNROLL; ++slot) {
        const float weight = turn + slot * kStep + sub < end ? __expf(scores[h][slot] - top) : 0.0f;
        weights[h] += weight;
#pragma unroll
        for (int i = 0; i < kWide / 2; ++i) {
          sums[h][2 * i] += weight * low(values[slot].v[i]);
          sums[h][2 * i + 1] += weight * high(values[slot].v[i]);
        }
      }
    }
    if (next < end) fetch(values, p.values, next);
  }
#pragma unroll
  for (int h = 0; h < HEADS; ++h) {
#pragma unroll
    for (int mask = kLanes; mask < kWarp; mask *= 2) {
      const float other_top = swap_lanes(tops[h], mask), top = fmaxf(tops[h], other_top);
      const float mine_by = __expf(tops[h] - top), other_by = __expf(other_top - top);
      weights[h] = weights[h] * mine_by + swap_lanes(weights[h], mask) * other_by;
#pragma unroll
      for (int i = 0; i < kWide; ++i) sums[h][i] = sums[h][i] * mine_by + swap_lanes(sums[h][i], mask) * other_by;
      tops[h] = top;
    }
    if (sub == 0 && has_dim) {
#pragma unroll
      for (int i = 0; i < kWide; ++i) part_sums[warp()][h][dim + i] = sums[h][i];
      part_weights[warp()][h] = weights[h];
      part_tops[warp()][h] = tops[h];
    }
  }
  sync_block();
  for (int i = thread(); i < HEADS * HEAD_DIM; i += kThreads) {
    const int h = i / HEAD_DIM, d = i % HEAD_DIM;
    float top = kLowest, weight = 0, sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) top = fmaxf(top, part_tops[w][h]);
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      const float by = __expf(part_tops[w][h] - top);
      weight += part_weights[w][h] * by;
      sum += part_sums[w][h][d] * by;
    }
    const i64 head = static_cast<i64>(text) * p.n_heads + first_head + h;
    if (p.n_splits == 1) {
      p.y[head * HEAD_DIM + d] = sum / weight;
    } else {
      float* run = p.runs + (head * p.n_splits + split) * (HEAD_DIM + 2);
      run[d] = sum;
      if (d == 0) run[HEAD_DIM] = weight, run[HEAD_DIM + 1] = top;
    }
  }
  if (p.n_splits == 1) return;
  sync_block();
  if (thread() == 0) is_last = is_last_block(p.counters + text * gridDim.y + group, p.n_splits);
  sync_block();
  if (!is_last) return;
  for (int i = thread(); i < HEADS * HEAD_DIM; i += kThreads) {
    const int h = i / HEAD_DIM, d = i % HEAD_DIM;
    const i64 head = static_cast<i64>(text) * p.n_heads + first_head + h;
    const float* run = p.runs + head * p.n_splits * (HEAD_DIM + 2);
    float top = kLowest, weight = 0, sum = 0;
    for (int s = 0; s < p.n_splits; ++s) top = fmaxf(top, load_fresh(run + s * (HEAD_DIM + 2) + HEAD_DIM + 1));
    for (int s = 0; s < p.n_splits; ++s) {
      const float by = __expf(load_fresh(run + s * (HEAD_DIM + 2) + HEAD_DIM + 1) - top);
      weight += load_fresh(run + s * (HEAD_DIM + 2) + HEAD_DIM) * by;
      sum += load_fresh(run + s * (HEAD_DIM + 2) + d) * by;
    }
    p.y[head * HEAD_DIM + d] = sum / weight;
  }
}
