// CUDA's threads on one thread of a CPU, for kernels of ggtool/kernels/cuda: each is a coroutine that runs until it meets
// the others of its warp or block. Slow and exact: float16 is rounded as a GPU rounds it, products are summed in float32.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time

struct Index {
  unsigned x = 1, y = 1, z = 1;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

struct Meeting {
  int arrived = 0, turn = 0;
};
struct Warp {
  Meeting meeting;
  u64 values[kWarp];
  u32 a[kWarp][4], b[kWarp][2];
};
struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(128 << 10);
  bool is_done = false;
};

inline ucontext_t scheduler;
inline std::vector<std::unique_ptr<Thread>> threads;
inline std::vector<Warp> warps;
inline Meeting block;
inline std::vector<Quad> shared;
inline std::function<void()> body;

inline void others() {
  const unsigned mine = threadIdx.x;
  swapcontext(&threads[mine]->context, &scheduler);
  threadIdx.x = mine;
}
inline void meet(Meeting& meeting, int n) {
  const int turn = meeting.turn;
  if (++meeting.arrived == n) {
    meeting.arrived = 0;
    ++meeting.turn;
  }
  while (meeting.turn == turn) others();
}
inline Warp& my_warp() { return warps[threadIdx.x / kWarp]; }
inline void meet_warp() { meet(my_warp().meeting, kWarp); }

inline void enter() {
  body();
  threads[threadIdx.x]->is_done = true;
}

// Run every block of a grid, one after the other.
template <class Kernel>
void launch(Index grid, unsigned n_threads, unsigned shared_bytes, Kernel kernel) {
  gridDim = grid;
  blockDim.x = n_threads;
  body = kernel;
  shared.assign(shared_bytes / sizeof(Quad) + 1, Quad{{0x7fc07fc0u, 0x7fc07fc0u, 0x7fc07fc0u, 0x7fc07fc0u}});  // NaNs
  while (threads.size() < n_threads) threads.push_back(std::make_unique<Thread>());
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        warps.assign(n_threads / kWarp, Warp{});
        block = {};
        for (unsigned i = 0; i < n_threads; ++i) {
          Thread& t = *threads[i];
          t.is_done = false;
          getcontext(&t.context);
          t.context.uc_stack = {t.stack.data(), 0, t.stack.size()};
          t.context.uc_link = &scheduler;
          makecontext(&t.context, enter, 0);
        }
        for (bool is_running = true; is_running;) {
          is_running = false;
          for (unsigned i = 0; i < n_threads; ++i)
            if (!threads[i]->is_done) {
              is_running = true;
              threadIdx.x = i;
              swapcontext(&scheduler, &threads[i]->context);
            }
        }
      }
}

}  // namespace emulated

#define SHARED_BYTES(name) u8* name = reinterpret_cast<u8*>(emulated::shared.data())

inline float __uint_as_float(u32 bits) {
  float r;
  std::memcpy(&r, &bits, sizeof r);
  return r;
}
inline u32 __float_as_uint(float value) {
  u32 r;
  std::memcpy(&r, &value, sizeof r);
  return r;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }

template <class T>
T read(const void* from) {
  if (reinterpret_cast<std::uintptr_t>(from) % sizeof(T)) {
    std::fprintf(stderr, "unaligned read of %zu bytes\n", sizeof(T));
    std::abort();
  }
  T r;
  std::memcpy(&r, from, sizeof r);
  return r;
}
inline Quad load_stream(const void* from) { return read<Quad>(from); }
inline Duo load_stream_duo(const void* from) { return read<Duo>(from); }
inline u16 load_half(const void* from) { return read<u16>(from); }
inline Quad load_shared_lines(const void* from) { return read<Quad>(from); }
inline float load_fresh(const float* from) { return *from; }
inline int load_fresh(const int* from) { return *from; }
inline Quad load_fresh(const Quad* from) { return read<Quad>(from); }
inline Floats load_fresh(const Floats* from) { return read<Floats>(from); }

inline void store_far(Quad* to, const Quad& what) { *to = what; }
inline Quad load_volatile(const Quad* from) { return read<Quad>(from); }

inline _Float16 as_half(u16 bits) {
  _Float16 r;
  std::memcpy(&r, &bits, sizeof r);
  return r;
}
inline u16 bits_of(_Float16 value) {
  u16 r;
  std::memcpy(&r, &value, sizeof r);
  return r;
}
inline float widen_half(u16 half) { return static_cast<float>(as_half(half)); }
inline u16 narrow_half(float value) { return bits_of(static_cast<_Float16>(value)); }
inline u16 narrow_bfloat(float value) {
  u32 bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
template <class Operation>
u32 by_halves(Operation operation) {
  return bits_of(operation(0)) | static_cast<u32>(bits_of(operation(16))) << 16;
}
inline _Float16 half_at(u32 pair, int shift) { return as_half(static_cast<u16>(pair >> shift)); }
inline u32 sub_halves(u32 a, u32 b) {
  return by_halves([=](int at) { return static_cast<_Float16>(half_at(a, at) - half_at(b, at)); });
}
inline u32 mul_halves(u32 a, u32 b) {
  return by_halves([=](int at) { return static_cast<_Float16>(half_at(a, at) * half_at(b, at)); });
}
inline u32 fma_halves(u32 a, u32 b, u32 c) {
  return by_halves([=](int at) {
    return static_cast<_Float16>(std::fma(double(half_at(a, at)), double(half_at(b, at)), double(half_at(c, at))));
  });
}
inline u32 masked_with(u32 a, u32 mask, u32 more) { return (a & mask) | more; }
inline u32 pick_bytes(u32 a, u32 b, u32 selector) {
  const u64 both = a | static_cast<u64>(b) << 32;
  u32 r = 0;
  for (int i = 0; i < 4; ++i) r |= static_cast<u32>(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return r;
}

inline float number(u32 pair, int which) {
  const u16 bits = static_cast<u16>(pair >> 16 * which);
#ifdef IS_BFLOAT16
  return __uint_as_float(static_cast<u32>(bits) << 16);
#else
  return widen_half(bits);
#endif
}
inline void product_on(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&before)[4]) {
  emulated::Warp& warp = emulated::my_warp();
  const int me = threadIdx.x % kWarp;
  std::memcpy(warp.a[me], a, sizeof a);
  warp.b[me][0] = b0, warp.b[me][1] = b1;
  emulated::meet_warp();
  for (int i = 0; i < 4; ++i) {
    const int row = me / 4 + i / 2 * 8, column = me % 4 * 2 + i % 2;
    sums[i] = before[i];
    for (int k = 0; k < 16; ++k)
      sums[i] += number(warp.a[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2) *
                 number(warp.b[column * 4 + k % 8 / 2][k / 8], k % 2);
  }
  emulated::meet_warp();
}
template <class T>
T swap_lanes(T value, int mask) {
  emulated::Warp& warp = emulated::my_warp();
  const int me = threadIdx.x % kWarp;
  std::memcpy(&warp.values[me], &value, sizeof value);
  emulated::meet_warp();
  T r;
  std::memcpy(&r, &warp.values[me ^ mask], sizeof r);
  emulated::meet_warp();
  return r;
}
typedef std::uintptr_t SharedAddress;
inline SharedAddress shared_address(const void* at) { return reinterpret_cast<SharedAddress>(at); }
inline u32 load_shared(SharedAddress at) { return read<u32>(reinterpret_cast<const void*>(at)); }
inline Quad load_shared_quad(SharedAddress at) { return read<Quad>(reinterpret_cast<const void*>(at)); }
inline void copy_stream(SharedAddress to, const void* from) { *reinterpret_cast<Quad*>(to) = read<Quad>(from); }
inline void copy_stream_or_zeros(SharedAddress to, const void* from, bool is_there) {
  *reinterpret_cast<Quad*>(to) = is_there ? read<Quad>(from) : Quad{};
}
template <int kBytes>
void copy_few(SharedAddress to, const void* from) {
  struct alignas(kBytes) Few {
    u8 bytes[kBytes];
  };
  *reinterpret_cast<Few*>(to) = read<Few>(from);
}
inline void end_copies() {}
template <int n>
void keep_copies_under_way() {}
inline void sync_warp() { emulated::meet_warp(); }
inline void sync_block() { emulated::meet(emulated::block, static_cast<int>(blockDim.x)); }
inline void wait_for_kernel_before() {}
inline void let_next_kernel_in() {}
inline bool is_last_block(u32* counter, u32 n) {
  const bool last = (*counter)++ == n - 1;
  if (last) *counter = 0;
  return last;
}
