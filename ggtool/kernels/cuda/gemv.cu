// y = epilogue(W @ norm(x)) for one to sixteen texts, W packed or float: the kernel that decoding spends its time in.
//
// A warp goes along TILES tiles of sixteen rows of W; a thread holds a segment of two rows, unpacks it to float16 and
// multiplies on the tensor cores with sums in float32. KSPLIT warps share the columns of a tile, ROW_GROUPS of them
// are in a block. The first UNROLL steps are under way before the kernel waits for the one before it, since weights
// do not depend on it. Constants: FORMAT, TILES, KSPLIT, ROW_GROUPS, UNROLL, UNITS, NORM, EPILOGUE, BATCHED.
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

using Format = FORMAT;

constexpr int kWarps = KSPLIT * ROW_GROUPS;
constexpr int kThreads = kWarps * kWarp;
// Threads of a processor that registers are to suffice for: more of them hide more waiting, until registers spill.
constexpr int kResidentThreads = TILES == 1 && !BATCHED && Format::kStaged ? 768 : 512;
constexpr int kResident = kResidentThreads / kThreads ? kResidentThreads / kThreads : 1;
constexpr int kTileRows = 16;
constexpr bool kGated = EPILOGUE == kSwiGlu;
constexpr int kTileOut = kGated ? 8 : kTileRows;                   // results of a tile: of a gated one a row and its factor's
constexpr int kBlockRows = ROW_GROUPS * TILES * kTileRows;         // rows of W of a block
constexpr int kBlockOut = ROW_GROUPS * TILES * kTileOut;           // results of a block
constexpr int kTexts = BATCHED ? 16 : 1;
constexpr int kProducts = BATCHED ? 2 : 1;                         // of eight columns each
constexpr int kApart = 32;                                         // from the end of a row to its rest: other banks

constexpr u32 kOnes = 0x3c003c00;                                   // float16
constexpr int kZeroQuads = BATCHED ? 0 : 4 * Format::kSegment / 8;  // what the other columns are read from
constexpr int kSegmentQuads = Format::kSegment / 8;                // of activations that go with a segment
constexpr int kSets = Format::kGroups ? Format::kGroups : 1;
constexpr int kSetProducts = kPairs<Format> / 2;                   // of sixteen columns each, in a set
constexpr int kQuadsOfTile = 2 * kWarp;                            // of codes in a step
constexpr int kStageBytes = TILES * (kQuadsOfTile * (16 + Format::kMoreBytes) + kTileRows * Format::kScaleBytes);  // of a warp and step

__device__ __forceinline__ float activated(float sum, float gate_up) {
  if (EPILOGUE == kGelu) {
    const float inner = 0.7978845608028654f * (sum + 0.044715f * sum * sum * sum);
    return 0.5f * sum * (1.0f + tanhf(inner));
  }
  if (kGated) return sum / (1.0f + __expf(-sum)) * gate_up;
  return sum;
}

// The first and second row of W that this thread reads of a tile.
struct Rows {
  int of[2];
};

// The steps of a warp that are under way, in shared memory: each thread reads what it copied, of scales its neighbours'.
template <class Format, bool kStaged = Format::kStaged>
class Stages {
 public:
  static constexpr int kSlot = kStageBytes;  // from one step's place to the next's
  __device__ __forceinline__ Stages(const Matrix& w, const Rows (&rows)[TILES], int n_segments, u8* room)
      : room_(shared_address(room)), part_(lane() % 4), segment_(warp() % KSPLIT * 4 + lane() % 4), n_segments_(n_segments) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const u8* row = w.codes + rows[tile].of[half] * w.row_bytes;
        codes_[tile][half] = row + segment_ * 16;
        more_[tile][half] = row + w.n_columns / 2 + segment_ * Format::kMoreBytes;
      }
      const int row = part_ % 2 ? rows[tile].of[1] : rows[tile].of[0];
      scales_[tile] = w.scales + 2 * row * w.scale_stride + (Format::kScaleSteps > 1 ? 0 : segment_ / 4 * Format::kScaleBytes);
    }
  }
  // Start reading the next step; zeros beyond the last segment.
  __device__ __forceinline__ void fetch(int slot, int) {
    if (segment_ - part_ < n_segments_) {
      const SharedAddress stage = room_ + slot + lane() * 16;
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const SharedAddress to = stage + (tile * 2 + half) * kWarp * 16;
          if (Format::kGroups)
            copy_stream(to, codes_[tile][half]);
          else
            copy_stream_or_zeros(to, codes_[tile][half], segment_ < n_segments_);
          if (Format::kMoreBytes)
            copy_few<8>(room_ + slot + kMoreAt + ((tile * 2 + half) * kWarp + lane()) * Format::kMoreBytes, more_[tile][half]);
        }
      }
      if (Format::kScaleBytes > 0 && part_ < 2) {
        const int at_scales = Format::kScaleSteps > 1 ? segment_ / (4 * Format::kScaleSteps) * Format::kScaleBytes : 0;
        const SharedAddress to = room_ + slot + kScalesAt + (part_ * 8 + lane() / 4) * Format::kScaleBytes;
        constexpr int kAtOnce = Format::kScaleBytes == 24 ? 8 : Format::kScaleBytes ? Format::kScaleBytes : 4;
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
          for (int at = 0; at < Format::kScaleBytes; at += kAtOnce)
            copy_few<kAtOnce>(to + tile * kTileRows * Format::kScaleBytes + at, scales_[tile] + at_scales + at);
      }
    }
    end_copies();
    segment_ += KSPLIT * 4;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        codes_[tile][half] += KSPLIT * 64;
        more_[tile][half] += KSPLIT * 4 * Format::kMoreBytes;
      }
      if (Format::kScaleSteps == 1) scales_[tile] += KSPLIT * Format::kScaleBytes;
    }
  }
  __device__ __forceinline__ void await() {
    keep_copies_under_way<UNROLL - 1>();
    if (Format::kScaleBytes > 0) sync_warp();
  }
  __device__ __forceinline__ void read(typename Format::Raw& raw, int slot, int step, int tile, int half) const {
    raw.codes = load_shared_quad(room_ + slot + lane() * 16 + (tile * 2 + half) * kWarp * 16);
    const SharedAddress at = room_ + slot + kScalesAt + (tile * kTileRows + half * 8 + lane() / 4) * Format::kScaleBytes;
    if constexpr (Format::kScaleBytes == 24) {
      const SharedAddress more = room_ + slot + kMoreAt + ((tile * 2 + half) * kWarp + lane()) * Format::kMoreBytes;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        raw.more.v[i] = load_shared(more + 4 * i);
        raw.scales.v[i] = load_shared(at + step % 2 * 8 + 4 * i);
      }
      raw.d = load_shared(at + 16);
    } else if constexpr (Format::kScaleBytes == 16) {
      raw.scales = load_shared_quad(at);
    } else {
#pragma unroll
      for (int i = 0; i < Format::kScaleBytes / 4; ++i) raw.scales.v[i] = load_shared(at + 4 * i);
    }
    if constexpr (Format::kMinima) raw.half = step % Format::kScaleSteps;
  }
  // Nobody reads this step's scales any more.
  __device__ __forceinline__ void release() {
    if (Format::kScaleBytes > 0) sync_warp();
  }

 private:
  // In a step's place the codes, what there is besides, and the scales.
  static constexpr int kMoreAt = TILES * kQuadsOfTile * 16, kScalesAt = kMoreAt + TILES * kQuadsOfTile * Format::kMoreBytes;
  const u8 *codes_[TILES][2], *more_[TILES][2], *scales_[TILES];  // of the step to be fetched next; of scales for several steps the row's
  const SharedAddress room_;
  const int part_;
  int segment_;
  const int n_segments_;
};

// The same in registers.
template <class Format>
class Stages<Format, false> {
 public:
  static constexpr int kSlot = 1;
  __device__ __forceinline__ Stages(const Matrix& w, const Rows (&rows)[TILES], int n_segments, u8*)
      : w_(w), n_segments_(n_segments) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) rows_[tile] = rows[tile];
  }
  __device__ __forceinline__ void fetch(int slot, int step) {
    if (step * 4 >= n_segments_) return;
    const int part = lane() % 4, segment = step * 4 + part < n_segments_ ? step * 4 + part : n_segments_ - 1;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half) Format::load(raw_[slot][tile][half], w_, rows_[tile].of[half], segment);
  }
  __device__ __forceinline__ void await() {}
  __device__ __forceinline__ void read(typename Format::Raw& raw, int slot, int, int tile, int half) const { raw = raw_[slot][tile][half]; }
  __device__ __forceinline__ void release() {}

 private:
  const Matrix& w_;
  const int n_segments_;
  Rows rows_[TILES];
  typename Format::Raw raw_[UNROLL][TILES][2];
};

// The activations that go with eight slots of this thread: as first column of the tensor cores' product the text, as second its
// rest, and zeros as the others (one text); or eight texts and, as another product, eight more or what their rounding left.
class Inputs {
 public:
  __device__ __forceinline__ Inputs(const Product& p, const u16* own_rows, const Quad* zeros) {
    const int column = lane() / 4, part = lane() % 4;
    if (BATCHED) {
      rows_ = reinterpret_cast<const Quad*>(p.rows + static_cast<i64>(column) * 2 * p.n_slots) + part;
      second_ = p.n_slots / 8;
    } else {
      own_ = column < 2 ? shared_address(own_rows + (column == 1 ? p.n_slots + kApart : 0) + part * 8) : shared_address(zeros);
      second_ = column < 2 ? kStepQuads * 16 : 0;
    }
  }
  __device__ __forceinline__ void read(Quad (&x)[kSegmentQuads][kProducts], int step) const {
#pragma unroll
    for (int i = 0; i < kSegmentQuads; ++i) {
      if (BATCHED) {
#pragma unroll
        for (int j = 0; j < kProducts; ++j) x[i][j] = rows_[j * second_ + step * kStepQuads + i * 4];
      } else {
        x[i][0] = load_shared_quad(own_ + step * second_ + i * 4 * 16);
      }
    }
  }

 private:
  static constexpr int kStepQuads = 4 * kSegmentQuads;
  const Quad* rows_;
  SharedAddress own_;
  int second_;  // Quads to the second product's, or bytes to the next step's
};

extern "C" __global__ void __launch_bounds__(kThreads, kResident) gemv(const __grid_constant__ Product p) {
  __shared__ u32 table[Format::kTable ? kTableWords : 1];
  SHARED_BYTES(shared);
  float* sums = reinterpret_cast<float*>(shared);  // (KSPLIT, kBlockRows, kTexts)
  float* room = sums + KSPLIT * kBlockRows * kTexts;
  Quad* zeros = reinterpret_cast<Quad*>(room + 2 * kWarp);
  u8* stages_room = reinterpret_cast<u8*>(zeros + kZeroQuads);
  u16* own_rows = reinterpret_cast<u16*>(stages_room + (Format::kStaged ? kWarps * UNROLL * kStageBytes : 0));

  const int k_slice = warp() % KSPLIT, row_group = warp() / KSPLIT;
  const int in_tile = lane() / 4, part = lane() % 4;
  const int n_segments = segments<Format>(p.w.n_columns), n_steps = divide_up(n_segments, 4);
  const int n_out = kGated ? p.gate_rows : p.w.n_rows;
  Rows rows[TILES];
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
    const int first = blockIdx.x * kBlockOut + (row_group * TILES + tile) * kTileOut + in_tile;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + half * (kGated ? p.gate_rows : 8);
      rows[tile].of[half] = row < p.w.n_rows ? row : p.w.n_rows - 1;
    }
  }
  using Steps = Stages<Format>;
  Steps stages(p.w, rows, n_segments, stages_room + warp() * UNROLL * kStageBytes);
#pragma unroll
  for (int slot = 0; slot < UNROLL; ++slot) stages.fetch(slot * Steps::kSlot, k_slice + slot * KSPLIT);
  if (Format::kTable) fill_table(table, p.w.values);
  if (thread() < kZeroQuads) zeros[thread()] = Quad{};
  // What the first of this thread's results needs besides its sum.
  const int my_row = thread() < kBlockOut ? blockIdx.x * kBlockOut + thread() : n_out;
  const bool is_mine = !BATCHED && my_row < n_out;
  const float my_bias = is_mine && p.bias ? p.bias[my_row] : 0.0f;
  Layer<Format, NORM, NORM == kRmsNorm, kThreads, UNITS> layer(p.norm, p.w.n_columns, p.n_slots);

  wait_for_kernel_before();
  let_next_kernel_in();
  const float my_residual = EPILOGUE == kAdd && is_mine ? load_fresh(p.y + my_row) : 0.0f;
  if (!BATCHED) layer.lay_down(p.x, own_rows, p.n_slots + kApart, kBoth, room);
  sync_block();
  const float factor = !BATCHED && NORM == kRmsNorm ? layer.factor(room) : 1.0f;

  const SharedAddress column = shared_address(table + (Format::kTable ? lane() : 0));  // of the table, this thread's
  const Inputs inputs(p, own_rows, zeros);
  // Two sums in turn where all of a row goes into one, so that a product need not wait for the one before.
  constexpr int kTurns = Format::kGroups ? 1 : 2;
  float totals[TILES][kProducts][kTurns][4] = {}, shifts[kProducts][4] = {};
  const auto along = [&](int slot, int step) {
    stages.await();
    Quad x[kSegmentQuads][kProducts];
    inputs.read(x, step);
    // What all rows share: their shift, and of formats with minima the sums of the activations, by products with constants.
    float shift[kSets][kProducts][4] = {}, ones[kSets][kProducts][4] = {};
    if constexpr (Format::kAway) {
#pragma unroll
      for (int set = 0; set < kSets; ++set)
#pragma unroll
        for (int j = 0; j < kProducts; ++j) {
#pragma unroll
          for (int i = 0; i < kSetProducts; ++i) {
            const u32 even = Format::kMinima ? kOnes : minus_away_of<Format>(set, 2 * i);
            const u32 odd = Format::kMinima ? kOnes : minus_away_of<Format>(set, 2 * i + 1);
            const u32 constants[4] = {even, even, odd, odd};
            const int at = set * kSetProducts + i;
            const Quad& quad = x[at / 2][j];
            add_product(Format::kMinima ? ones[set][j] : Format::kGroups ? shift[set][j] : shifts[j], constants,
                        quad.v[at % 2 * 2], quad.v[at % 2 * 2 + 1]);
          }
          if (Format::kMinima) {
#pragma unroll
            for (int i = 0; i < 4; ++i) shift[set][j][i] = ones[set][j][i] * low(minus_away_of<Format>(set, 0));
          }
        }
    }
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      typename Format::Raw raw[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) stages.read(raw[half], slot, step, tile, half);
#pragma unroll
      for (int set = 0; set < kSets; ++set) {
        u32 pairs[2][kPairs<Format>];
#pragma unroll
        for (int half = 0; half < 2; ++half) Format::pairs(raw[half], set, column, pairs[half]);
#pragma unroll
        for (int j = 0; j < kProducts; ++j) {
          float group[4];
#pragma unroll
          for (int i = 0; i < kSetProducts; ++i) {
            const u32 a[4] = {pairs[0][2 * i], pairs[1][2 * i], pairs[0][2 * i + 1], pairs[1][2 * i + 1]};
            const int at = set * kSetProducts + i;
            const u32 b0 = x[at / 2][j].v[at % 2 * 2], b1 = x[at / 2][j].v[at % 2 * 2 + 1];
            if constexpr (Format::kGroups > 0) {
              product_on(group, a, b0, b1, i ? group : shift[set][j]);
            } else {
              add_product(totals[tile][j][i % kTurns], a, b0, b1);
            }
          }
          if constexpr (Format::kGroups > 0) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const float scale = scale_of_set<Format>(raw[half], set);
#pragma unroll
              for (int i = 0; i < 2; ++i) totals[tile][j][0][2 * half + i] += scale * group[2 * half + i];
              if (Format::kMinima) {
                const float minimum = minimum_of_set<Format>(raw[half], set);
#pragma unroll
                for (int i = 0; i < 2; ++i) totals[tile][j][0][2 * half + i] -= minimum * ones[set][j][2 * half + i];
              }
            }
          }
        }
      }
    }
    stages.release();
    stages.fetch(slot, step + UNROLL * KSPLIT);
  };
  if constexpr (Format::kStaged) {
    int slot = 0;
#pragma unroll 1
    for (int step = k_slice; step < n_steps; step += KSPLIT) {
      along(slot, step);
      slot = slot + Steps::kSlot == UNROLL * Steps::kSlot ? 0 : slot + Steps::kSlot;
    }
  } else {
    for (int first = k_slice; first < n_steps; first += UNROLL * KSPLIT) {
#pragma unroll
      for (int slot = 0; slot < UNROLL; ++slot)
        if (first + slot * KSPLIT < n_steps) along(slot, first + slot * KSPLIT);
    }
  }

  // totals[..][0], [1]: row lane / 4, columns 2 * part and the next; totals[..][2], [3]: the same of eight rows below.
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* to = sums + (k_slice * kBlockRows + (row_group * TILES + tile) * kTileRows + half * 8 + in_tile) * kTexts;
      float found[kProducts][2];
#pragma unroll
      for (int j = 0; j < kProducts; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          found[j][i] = totals[tile][j][0][2 * half + i];
          if (kTurns > 1) found[j][i] += totals[tile][j][kTurns - 1][2 * half + i];
          if (Format::kAway && !Format::kGroups) found[j][i] += shifts[j][2 * half + i];
          found[j][i] *= Format::kUnit;
        }
      if (!BATCHED) {
        if (part == 0) to[0] = found[0][0] + found[0][1];
      } else {
        const bool is_split = p.n_texts <= 8;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          to[2 * part + i] = found[0][i] + (is_split ? found[kProducts - 1][i] : 0.0f);
          to[2 * part + i + 8] = found[kProducts - 1][i];
        }
      }
    }
  sync_block();

  const int n_results = kBlockOut * (BATCHED ? p.n_texts : 1);
  for (int i = thread(); i < n_results; i += kThreads) {
    const int text = i / kBlockOut, out = i % kBlockOut;
    const int row = blockIdx.x * kBlockOut + out;
    const int at = out / kTileOut * kTileRows + out % kTileOut;
    float sum = 0, up = 0;
#pragma unroll
    for (int k = 0; k < KSPLIT; ++k) {
      sum += sums[(k * kBlockRows + at) * kTexts + text];
      if (kGated) up += sums[(k * kBlockRows + at + kTileOut) * kTexts + text];
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
