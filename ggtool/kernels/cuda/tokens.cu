// What happens around the layers: a token's row of the table, activations laid down for several texts, the next token.
//
// Constants: FORMAT of the table (embed) or of the product that follows (prepare); NORM, THREADS and UNITS of prepare.
#include "activations.h"
#include "choice.h"

using Format = FORMAT;

struct Embedding {
  Matrix w;
  const float* row_scales;
  const float* positions;  // (n_ctx, n_columns) or null
  const int* tokens;       // (n_texts,)
  const int* position;
  float* x;                // (n_texts, n_columns)
  int first_row;           // the token that row 0 of w belongs to
};

// Block (i, text): the segments from i * blockDim on of a text's token; zeros, where w is a part of the table, for one of
// another part.
extern "C" __global__ void embed(const __grid_constant__ Embedding p) {
  __shared__ u32 table[Format::kTable ? kTableWords : 1];
  if (Format::kTable) fill_table(table, p.w.values);
  wait_for_kernel_before();
  let_next_kernel_in();
  sync_block();
  const int segment = blockIdx.x * blockDim.x + thread(), text = blockIdx.y;
  if (segment >= segments<Format>(p.w.n_columns)) return;
  const int row = load_fresh(p.tokens + text) - p.first_row;
  const bool is_here = row >= 0 && row < p.w.n_rows;
  const int token = is_here ? row : 0;
  const float* place = p.positions ? p.positions + static_cast<i64>(load_fresh(p.position)) * p.w.n_columns : nullptr;
  const float scale = !is_here ? 0.0f : Format::kRowScale ? p.row_scales[token] : 1.0f;
  typename Format::Raw raw;
  float weights[Format::kSegment];
  Format::load(raw, p.w, token, segment);
  expand<Format>(raw, shared_address(table + (Format::kTable ? lane() : 0)), weights);
#pragma unroll
  for (int slot = 0; slot < Format::kSegment; ++slot) {
    const int column = Format::column(segment, slot);
    if (column < p.w.n_columns)
      p.x[static_cast<i64>(text) * p.w.n_columns + column] = scale * weights[slot] + (place ? place[column] : 0.0f);
  }
}

struct Widening {
  Matrix w;
  const float* row_scales;
  u16* to;  // (n_rows, n_columns), from `first_row` on
  int first_row, n_rows;
};

// Eight neighbours, or four and four others, at once: a thread that wrote each by itself would meet the others in every line.
__device__ __forceinline__ void write_octet(u16* row, int first, int n_columns, float scale, const float* weights) {
  constexpr int kOthers = offset_of_others<Format>();
  u16 narrowed[2][4];
#pragma unroll
  for (int slot = 0; slot < 8; ++slot) {
    const int offset = offset_of<Format>(slot);
    const bool is_other = offset >= kOthers;
    narrowed[is_other][is_other ? offset - kOthers : offset] = narrow(scale * weights[slot]);
  }
  Duo halves[2];
#pragma unroll
  for (int i = 0; i < 2; ++i)
    halves[i] = Duo{{both(narrowed[i][0], narrowed[i][1]), both(narrowed[i][2], narrowed[i][3])}};
  if (kOthers == 4) {
    if (first < n_columns)
      *reinterpret_cast<Quad*>(row + first) = Quad{{halves[0].v[0], halves[0].v[1], halves[1].v[0], halves[1].v[1]}};
    return;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i)
    if (first + i * kOthers < n_columns) *reinterpret_cast<Duo*>(row + first + i * kOthers) = halves[i];
}

// Block (i, j): the segments from i * blockDim on of rows j, j + gridDim.y and so on, to the type of the activations.
extern "C" __global__ void widen_rows(const __grid_constant__ Widening p) {
  __shared__ u32 table[Format::kTable ? kTableWords : 1];
  if (Format::kTable) fill_table(table, p.w.values);
  sync_block();
  const int segment = blockIdx.x * blockDim.x + thread();
  if (segment >= segments<Format>(p.w.n_columns)) return;
  for (int row = blockIdx.y; row < p.n_rows; row += gridDim.y) {
    const float scale = Format::kRowScale ? p.row_scales[p.first_row + row] : 1.0f;
    typename Format::Raw raw;
    float weights[Format::kSegment];
    Format::load(raw, p.w, p.first_row + row, segment);
    expand<Format>(raw, shared_address(table + (Format::kTable ? lane() : 0)), weights);
#pragma unroll
    for (int octet = 0; octet < Format::kSegment; octet += 8)
      write_octet(p.to + static_cast<i64>(row) * p.w.n_columns, Format::column(segment, octet), p.w.n_columns, scale, weights + octet);
  }
}

struct Preparation {
  NormWeights norm;
  const float* x;  // (n_texts, n_columns)
  u16* rows;       // (8, 2, n_slots)
  int n_columns, n_slots, n_texts;
};

// Block `text`: its rows for a BATCHED product.
extern "C" __global__ void prepare(const __grid_constant__ Preparation p) {
  __shared__ float room[2 * kWarp];
  Layer<Format, NORM, false, THREADS, UNITS> layer(p.norm, p.n_columns, p.n_slots);
  wait_for_kernel_before();
  let_next_kernel_in();
  const int text = blockIdx.x;
  u16* rows = p.rows + static_cast<i64>(text % 8) * 2 * p.n_slots;
  layer.lay_down(p.x + static_cast<i64>(text) * p.n_columns, rows, p.n_slots,
                 p.n_texts <= 8 ? kBoth : text < 8 ? kFirst : kSecond, room);
}

struct Choice {
  const float* best_values;  // (n_texts, n_blocks)
  const int* best_indices;
  int* tokens;    // (n_texts,): what `embed` reads next
  int* made;      // (n_ctx, n_texts): the token chosen at each position
  int* position;  // one further afterwards
  int n_blocks, n_texts;
};

// One block: the likeliest token of each text, the first of equals; -1 in `made` where there is none.
extern "C" __global__ void choose(const __grid_constant__ Choice p) {
  __shared__ ChoiceRoom room;
  wait_for_kernel_before();
  let_next_kernel_in();
  const int position = load_fresh(p.position);
  for (int text = 0; text < p.n_texts; ++text) {
    const Best best = best_of_block(p.best_values + text * p.n_blocks, p.best_indices + text * p.n_blocks, p.n_blocks, room);
    if (thread() == 0) {
      const bool is_finite = is_a_choice(best);
      p.tokens[text] = is_finite ? best.index : 0;
      p.made[static_cast<i64>(position) * p.n_texts + text] = is_finite ? best.index : -1;
    }
  }
  if (thread() == 0) *p.position = position + 1;
}
