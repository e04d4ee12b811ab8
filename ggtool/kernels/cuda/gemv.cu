// y = epilogue(W @ norm(x)) for one to sixteen texts, W packed or float: the kernel that decoding spends its time in.
//
// A warp goes along TILES tiles of eight rows of W; a thread holds a segment of a row, unpacks it to float16 and
// multiplies on the tensor cores with sums in float32. KSPLIT warps share the columns of a tile, ROW_GROUPS of them
// are in a block. The first UNROLL segments are under way before the kernel waits for the one before it, since weights
// do not depend on it. Constants: FORMAT, TILES, KSPLIT, ROW_GROUPS, UNROLL, QUADS, NORM, EPILOGUE, BATCHED.
#include "activations.h"

enum Epilogue {
  kStore = 0,     // y = sum
  kAdd = 1,       // y += sum: the residual stream
  kGelu = 2,      // y = gelu(sum), the tanh form
  kSwiGlu = 3,    // y = silu(sum) * sum of the row `gate_rows` further down
  kLogits = 4,    // y = sum, and the best row of each block
};

struct Product {
  Matrix w;
  NormWeights norm;
  const float* bias;        // (n_rows,) or null
  const float* row_scales;  // (n_rows,), of formats with a scale for a row
  const float* x;           // (n_texts, n_columns); of BATCHED kernels null
  const u16* rows;          // (8, 2, n_slots), laid down; of kernels for one text null
  float* y;                 // (n_texts, y_stride)
  float* best_values;       // (n_texts, blocks)
  int* best_indices;
  int n_texts, n_slots, y_stride, gate_rows;
};

constexpr int kWarps = KSPLIT * ROW_GROUPS;
constexpr int kThreads = kWarps * kWarp;
constexpr int kTileRows = 8;
constexpr bool kGated = EPILOGUE == kSwiGlu;
constexpr int kOutTiles = kGated ? TILES / 2 : TILES;              // tiles of y that a warp makes
constexpr int kBlockRows = ROW_GROUPS * TILES * kTileRows;         // rows of W of a block
constexpr int kBlockOut = ROW_GROUPS * kOutTiles * kTileRows;      // rows of y of a block
constexpr int kTexts = BATCHED ? 16 : 1;

using Format = FORMAT;
constexpr int kQuads = Format::kSegment / 4;  // of activations that go with a segment: sixteen bytes for four weights

__device__ __forceinline__ float activated(float sum, float gate_up) {
  if (EPILOGUE == kGelu) {
    const float inner = 0.7978845608028654f * (sum + 0.044715f * sum * sum * sum);
    return 0.5f * sum * (1.0f + tanhf(inner));
  }
  if (kGated) return sum / (1.0f + __expf(-sum)) * gate_up;
  return sum;
}

// The row of W behind row i of the sums of this block.
__device__ __forceinline__ int row_of(const Product& p, int i) {
  const int tile = i / kTileRows % TILES, group = i / kTileRows / TILES;
  const int first = (blockIdx.x * ROW_GROUPS + group) * kOutTiles * kTileRows + i % kTileRows;
  return tile < kOutTiles ? first + tile * kTileRows : first + (tile - kOutTiles) * kTileRows + p.gate_rows;
}

extern "C" __global__ void __launch_bounds__(kThreads) gemv(const __grid_constant__ Product p) {
  SHARED_BYTES(shared);
  float* sums = reinterpret_cast<float*>(shared);  // (KSPLIT, kBlockRows, kTexts)
  float* room = sums + KSPLIT * kBlockRows * kTexts;
  u32* table = reinterpret_cast<u32*>(room + 2 * kWarp);
  Quad* zeros = reinterpret_cast<Quad*>(table + (Format::kTable ? kTableBytes / 4 : 0));
  u16* own_rows = reinterpret_cast<u16*>(zeros + kQuads);

  const int k_slice = warp() % KSPLIT, row_group = warp() / KSPLIT;
  const int in_tile = lane() / 4, part = lane() % 4;
  const int n_segments = segments(p.w.n_columns, Format::kSegment), n_steps = divide_up(n_segments, 4);
  const int n_out = kGated ? p.gate_rows : p.w.n_rows;
  int rows[TILES];
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
    const int row = row_of(p, (row_group * TILES + tile) * kTileRows + in_tile);
    rows[tile] = row < p.w.n_rows ? row : p.w.n_rows - 1;
  }
  typename Format::Raw raw[UNROLL][TILES];
  const auto fetch = [&](int slot, int step) {
    // Beyond the last segment the last one again: activations are zero there.
    const int segment = step * 4 + part < n_segments ? step * 4 + part : n_segments - 1;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) Format::load(raw[slot][tile], p.w, rows[tile], segment);
  };
#pragma unroll
  for (int slot = 0; slot < UNROLL; ++slot)
    if (k_slice + slot * KSPLIT < n_steps) fetch(slot, k_slice + slot * KSPLIT);
  if (Format::kTable) fill_table(table, p.w.values);
  if (!BATCHED && thread() < kQuads) zeros[thread()] = Quad{};
  // What the first of this thread's results needs besides its sum.
  const int my_row = thread() < kBlockOut ? blockIdx.x * kBlockOut + thread() : n_out;
  const bool is_mine = !BATCHED && my_row < n_out;
  const float my_bias = is_mine && p.bias ? p.bias[my_row] : 0.0f;
  Layer<Format, NORM, NORM == kRmsNorm, kThreads, QUADS> layer(p.norm, p.w.n_columns);

  wait_for_kernel_before();
  const float my_residual = EPILOGUE == kAdd && is_mine ? load_fresh(p.y + my_row) : 0.0f;
  if (!BATCHED) layer.lay_down(p.x, p.n_slots, own_rows, kBoth, room);
  sync_block();
  const float factor = !BATCHED && NORM == kRmsNorm ? layer.factor(room) : 1.0f;

  const bool is_laid = BATCHED || in_tile == 0;
  const int stride = is_laid ? 1 : 0;
  const Quad* laid = BATCHED ? reinterpret_cast<const Quad*>(p.rows) + in_tile * (p.n_slots / 4) : reinterpret_cast<const Quad*>(own_rows);
  const Quad* mine = is_laid ? laid + part * kQuads : zeros;

  const SharedAddress column = own_column(table);
  float totals[TILES][4] = {};
  for (int first = k_slice; first < n_steps; first += UNROLL * KSPLIT) {
#pragma unroll
    for (int slot = 0; slot < UNROLL; ++slot) {
      const int step = first + slot * KSPLIT;
      if (step >= n_steps) break;
      // The activations of this thread's segment: rows in_tile and in_tile + 8, and of one text zeros but for the first.
      Quad x[kQuads];
#pragma unroll
      for (int i = 0; i < kQuads; ++i) x[i] = mine[step * 4 * kQuads * stride + i];
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        u32 pairs[Format::kSegment / 2];
        Format::expand(raw[slot][tile], column, pairs);
#pragma unroll
        for (int i = 0; i < Format::kSegment / 4; ++i) {
          add_product(totals[tile], x[i].v, pairs[2 * i], pairs[2 * i + 1]);
        }
      }
      if (step + UNROLL * KSPLIT < n_steps) fetch(slot, step + UNROLL * KSPLIT);
    }
  }

  // totals[0], [1]: text lane / 4, rows 2 * part and the next; totals[2], [3]: eight texts further, or what rounding left.
  const bool is_split = !BATCHED || p.n_texts <= 8;
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float* to = sums + ((k_slice * kBlockRows + (row_group * TILES + tile) * kTileRows + 2 * part + i) * kTexts);
      if (is_split) {
        if (in_tile < kTexts) to[in_tile] = totals[tile][i] + totals[tile][i + 2];
      } else {
        to[in_tile] = totals[tile][i];
        to[in_tile + 8] = totals[tile][i + 2];
      }
    }
  sync_block();

  const int n_results = kBlockOut * (BATCHED ? p.n_texts : 1);
  for (int i = thread(); i < n_results; i += kThreads) {
    const int text = i / kBlockOut, out = i % kBlockOut;
    const int row = blockIdx.x * kBlockOut + out;
    const int at = out / (kOutTiles * kTileRows) * TILES * kTileRows + out % (kOutTiles * kTileRows);
    float sum = 0, up = 0;
#pragma unroll
    for (int k = 0; k < KSPLIT; ++k) {
      sum += sums[(k * kBlockRows + at) * kTexts + text];
      if (kGated) up += sums[(k * kBlockRows + at + kOutTiles * kTileRows) * kTexts + text];
    }
    if (row >= n_out) continue;
    sum *= factor, up *= factor;
    if (Format::kRowScale) {
      sum *= p.row_scales[row];
      if (kGated) up *= p.row_scales[row + p.gate_rows];
    }
    if (p.bias) {
      sum += BATCHED ? p.bias[row] : my_bias;
      if (kGated) up += p.bias[row + p.gate_rows];
    }
    float* to = p.y + static_cast<i64>(text) * p.y_stride + row;
    float result = activated(sum, up);
    if (EPILOGUE == kAdd) result += BATCHED ? load_fresh(to) : my_residual;
    *to = result;
    if (EPILOGUE == kLogits) sums[at * kTexts + text] = result;
  }
  if (EPILOGUE == kLogits) {
    sync_block();
    for (int text = warp(); text < p.n_texts; text += kWarps) {
      Best best{kLowest, 0x7fffffff};
      for (int out = lane(); out < kBlockOut && blockIdx.x * kBlockOut + out < n_out; out += kWarp)
        best.meet(sums[out * kTexts + text], blockIdx.x * kBlockOut + out);
      best = best_of_warp(best);
      if (lane() == 0) {
        p.best_values[text * gridDim.x + blockIdx.x] = best.value;
        p.best_indices[text * gridDim.x + blockIdx.x] = best.index;
      }
    }
  }
}
