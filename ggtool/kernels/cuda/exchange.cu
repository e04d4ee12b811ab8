// Sums and choices over several GPUs, each of which writes what it has into the memory of the others.
//
// Four bytes travel with the number of the exchange beside them, and eight bytes arrive together: who reads waits until the
// number is there and needs no other signal (NCCL's low-latency protocol). Two exchanges have a place each, in turn: a GPU
// writes into a place again only after it has received the exchange between, which the other sends when it has read it.
//
// Constants: RANKS, the GPUs that take part; PHASE, what the kernel does: both, or for emulation one after the other.
#include "choice.h"

enum Phase { kSendAndReceive = 0, kSend = 1, kReceive = 2 };

struct Mailbox {
  Quad* inbox;         // (2, RANKS, n_quads): {word, number, word, number} from each rank
  Quad* inboxes[RANKS];  // every rank's inbox, this one's too
  u32* numbers;        // of the last exchange, for each block
  int n_quads, rank;
};

// Some seconds: a GPU that stands still must not hold up the others for ever.
constexpr u32 kMostPolls = 1u << 23;

__device__ __forceinline__ i64 place_of(const Mailbox& box, u32 number, int rank, int quad) {
  return (static_cast<i64>(number & 1) * RANKS + rank) * box.n_quads + quad;
}

__device__ __forceinline__ void send_to_others(const Mailbox& box, u32 number, int quad, u32 first, u32 second) {
#pragma unroll
  for (int rank = 0; rank < RANKS; ++rank)
    if (rank != box.rank) store_far(box.inboxes[rank] + place_of(box, number, box.rank, quad), Quad{{first, number, second, number}});
}

// Two words of a rank, NaNs if they do not come.
__device__ __forceinline__ Duo receive(const Mailbox& box, u32 number, int rank, int quad) {
  const Quad* from = box.inbox + place_of(box, number, rank, quad);
#pragma unroll 1
  for (u32 polls = 0; polls < kMostPolls; ++polls) {
    const Quad found = load_volatile(from);
    if (found.v[1] == number && found.v[3] == number) return Duo{{found.v[0], found.v[2]}};
  }
  return Duo{{0x7fc00000u, 0x7fc00000u}};
}

__device__ __forceinline__ u32 next_number(const Mailbox& box) {
  return static_cast<u32>(load_fresh(reinterpret_cast<const int*>(box.numbers) + blockIdx.x)) + 1;
}

// All threads of the block have read the number.
__device__ __forceinline__ void end_exchange(const Mailbox& box, u32 number) {
  sync_block();
  if (PHASE != kSend && thread() == 0) box.numbers[blockIdx.x] = number;
}

struct Sum {
  Mailbox box;
  const float* own;  // (n,): this rank's part
  float* y;          // (n,): y += or = the sum of all parts, in the order of the ranks, so that all get the same
  int n, is_added;
};

// Block i: two numbers a thread.
extern "C" __global__ void exchange_sum(const __grid_constant__ Sum p) {
  wait_for_kernel_before();
  let_next_kernel_in();
  const u32 number = next_number(p.box);
  const int quad = blockIdx.x * blockDim.x + thread();
  if (2 * quad < p.n) {
    const float own[2] = {load_fresh(p.own + 2 * quad), load_fresh(p.own + 2 * quad + 1)};
    if (PHASE != kReceive) send_to_others(p.box, number, quad, __float_as_uint(own[0]), __float_as_uint(own[1]));
    if (PHASE != kSend) {
      float before[2] = {}, sums[2] = {};
      if (p.is_added) before[0] = load_fresh(p.y + 2 * quad), before[1] = load_fresh(p.y + 2 * quad + 1);
#pragma unroll
      for (int rank = 0; rank < RANKS; ++rank) {
        const bool is_own = rank == p.box.rank;
        const Duo part = is_own ? Duo{} : receive(p.box, number, rank, quad);
#pragma unroll
        for (int i = 0; i < 2; ++i) sums[i] += is_own ? own[i] : __uint_as_float(part.v[i]);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) p.y[2 * quad + i] = before[i] + sums[i];
    }
  }
  end_exchange(p.box, number);
}

struct SharedChoice {
  Mailbox box;
  const float* best_values;  // (n_texts, n_blocks), of this rank's rows
  const int* best_indices;
  int* tokens;    // as `choose` has them
  int* made;
  int* position;
  int n_blocks, n_texts, first_row;  // the token that this rank's row 0 belongs to
};

// One block: the likeliest token of each text among all ranks' rows, the first of equals.
extern "C" __global__ void choose_together(const __grid_constant__ SharedChoice p) {
  __shared__ ChoiceRoom room;
  wait_for_kernel_before();
  let_next_kernel_in();
  const u32 number = next_number(p.box);
  const int position = load_fresh(p.position);
  for (int text = 0; text < p.n_texts; ++text) {
    Best own = best_of_block(p.best_values + text * p.n_blocks, p.best_indices + text * p.n_blocks, p.n_blocks, room);
    if (thread() != 0) continue;
    if (own.index != 0x7fffffff) own.index += p.first_row;
    if (PHASE != kReceive) send_to_others(p.box, number, text, __float_as_uint(own.value), static_cast<u32>(own.index));
    if (PHASE == kSend) continue;
    Best best{kLowest, 0x7fffffff};
    bool is_finite = true;
#pragma unroll
    for (int rank = 0; rank < RANKS; ++rank) {
      Best other = own;
      if (rank != p.box.rank) {
        const Duo words = receive(p.box, number, rank, text);
        other = Best{__uint_as_float(words.v[0]), static_cast<int>(words.v[1])};
      }
      is_finite = is_finite && is_a_choice(other);
      best.meet(other.value, other.index);
    }
    p.tokens[text] = is_finite ? best.index : 0;
    p.made[static_cast<i64>(position) * p.n_texts + text] = is_finite ? best.index : -1;
  }
  if (PHASE != kSend && thread() == 0) *p.position = position + 1;
  end_exchange(p.box, number);
}
