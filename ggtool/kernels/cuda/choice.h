// The likeliest of a text's candidates, by all threads of a block.
#pragma once

#include "device.h"

struct ChoiceRoom {
  float values[kWarp];
  int indices[kWarp];
};

// Thread 0 is given the best of n candidates, the first of equals; the others what their warp found.
__device__ __forceinline__ Best best_of_block(const float* values, const int* indices, int n, ChoiceRoom& room) {
  Best best{kLowest, 0x7fffffff};
#pragma unroll 4
  for (int i = thread(); i < n; i += blockDim.x) best.meet(load_fresh(values + i), load_fresh(indices + i));
  best = best_of_warp(best);
  sync_block();
  if (lane() == 0) room.values[warp()] = best.value, room.indices[warp()] = best.index;
  sync_block();
  if (thread() == 0)
    for (int i = 1; i < static_cast<int>(blockDim.x) / kWarp; ++i) best.meet(room.values[i], room.indices[i]);
  return best;
}

// Where nothing is a number, or one is infinite, there is no likeliest token, and what follows is of no use.
__device__ __forceinline__ bool is_a_choice(const Best& best) { return best.index != 0x7fffffff && best.value <= -kLowest; }
