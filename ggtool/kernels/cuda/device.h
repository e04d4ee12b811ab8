// What the decode kernels need of a GPU: integers, float16 pairs in 32 bits, a 16 x 8 x 16 product of a warp, and the
// order between kernels of one stream. No header of CUDA is needed, so NVRTC compiles it wherever torch runs.
//
// With GGTOOL_EMULATED the same kernels run on a CPU, thread after thread: tests/emulated.h.
#pragma once

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct alignas(16) Quad {
  u32 v[4];
};
struct alignas(8) Duo {
  u32 v[2];
};
struct alignas(16) Floats {
  float v[4];
};

constexpr int kWarp = 32;
constexpr float kLowest = -3.402823466e38f;

#ifdef GGTOOL_EMULATED
#include "emulated.h"
#else

#define SHARED_BYTES(name) extern __shared__ Quad shared_quads[]; u8* name = reinterpret_cast<u8*>(shared_quads)

// Weights are read once a token: past the first-level cache, a neighbour fetched along.
__device__ __forceinline__ Quad load_stream(const void* from) {
  Quad r;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(r.v[0]), "=r"(r.v[1]), "=r"(r.v[2]), "=r"(r.v[3]) : "l"(from));
  return r;
}
__device__ __forceinline__ Duo load_stream_duo(const void* from) {
  Duo r;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v2.u32 {%0,%1}, [%2];" : "=r"(r.v[0]), "=r"(r.v[1]) : "l"(from));
  return r;
}
// Scales, which neighbours read too.
__device__ __forceinline__ u16 load_half(const void* from) {
  u16 r;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(r) : "l"(from));
  return r;
}
__device__ __forceinline__ Quad load_shared_lines(const void* from) {
  Quad r;
  asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(r.v[0]), "=r"(r.v[1]), "=r"(r.v[2]), "=r"(r.v[3]) : "l"(from));
  return r;
}
// What another kernel wrote: from the second-level cache, never a stale line of the first. Volatile, so that none is
// read before the wait; and no more than that, so that several are under way at once.
__device__ __forceinline__ float load_fresh(const float* from) {
  float r;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(r) : "l"(from));
  return r;
}
__device__ __forceinline__ int load_fresh(const int* from) {
  int r;
  asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(r) : "l"(from));
  return r;
}
__device__ __forceinline__ Floats load_fresh(const Floats* from) {
  Floats r;
  asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(r.v[0]), "=f"(r.v[1]), "=f"(r.v[2]), "=f"(r.v[3]) : "l"(from));
  return r;
}
__device__ __forceinline__ Quad load_fresh(const Quad* from) {
  Quad r;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(r.v[0]), "=r"(r.v[1]), "=r"(r.v[2]), "=r"(r.v[3]) : "l"(from));
  return r;
}

// Into another GPU's memory, and from where another GPU writes: eight bytes of the sixteen are seen together.
__device__ __forceinline__ void store_far(Quad* to, const Quad& what) {
  asm volatile("st.volatile.global.v4.u32 [%0], {%1,%2,%3,%4};"
               :: "l"(to), "r"(what.v[0]), "r"(what.v[1]), "r"(what.v[2]), "r"(what.v[3]) : "memory");
}
__device__ __forceinline__ Quad load_volatile(const Quad* from) {
  Quad r;
  asm volatile("ld.volatile.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(r.v[0]), "=r"(r.v[1]), "=r"(r.v[2]), "=r"(r.v[3]) : "l"(from) : "memory");
  return r;
}

// Shared memory by its address, to which the compiler would add more than one instruction.
typedef u32 SharedAddress;
__device__ __forceinline__ SharedAddress shared_address(const void* at) {
  return static_cast<u32>(__cvta_generic_to_shared(at));
}
__device__ __forceinline__ u32 load_shared(SharedAddress at) {
  u32 r;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(r) : "r"(at));
  return r;
}
__device__ __forceinline__ Quad load_shared_quad(SharedAddress at) {
  Quad r;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(r.v[0]), "=r"(r.v[1]), "=r"(r.v[2]), "=r"(r.v[3]) : "r"(at));
  return r;
}
// Sixteen, eight or four bytes on their way into shared memory while the thread goes on, or sixteen zeros; `keep_copies_under_way` waits for
// all but the last n groups of this thread's copies, each group ended by `end_copies`.
__device__ __forceinline__ void copy_stream(SharedAddress to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(to), "l"(from));
}
__device__ __forceinline__ void copy_stream_or_zeros(SharedAddress to, const void* from, bool is_there) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(is_there ? 16 : 0));
}
template <int kBytes>
__device__ __forceinline__ void copy_few(SharedAddress to, const void* from) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "what cp.async has");
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(kBytes));
}
__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;"); }
template <int n>
__device__ __forceinline__ void keep_copies_under_way() {
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}

__device__ __forceinline__ float widen_half(u16 half) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(half));
  return r;
}
__device__ __forceinline__ u16 narrow_half(float value) {
  u16 r;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(value));
  return r;
}
__device__ __forceinline__ u16 narrow_bfloat(float value) {
  u16 r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(value));
  return r;
}
__device__ __forceinline__ u32 sub_halves(u32 a, u32 b) {
  u32 r;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
__device__ __forceinline__ u32 mul_halves(u32 a, u32 b) {
  u32 r;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
__device__ __forceinline__ u32 fma_halves(u32 a, u32 b, u32 c) {
  u32 r;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
// What `mask` leaves of a, and the bits of `more`: one instruction, of which the compiler makes two.
__device__ __forceinline__ u32 masked_with(u32 a, u32 mask, u32 more) {
  u32 r;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(a), "r"(mask), "r"(more));
  return r;
}
// Bytes of a (0 to 3) and b (4 to 7) by the selector's four hexadecimal digits, the lowest byte first.
__device__ __forceinline__ u32 pick_bytes(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }

// sums (16 x 8) = a (16 x 16) * b (16 x 8) + before (16 x 8), spread over a warp as PTX's mma.m16n8k16 has it.
__device__ __forceinline__ void product_on(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&before)[4]) {
#ifdef IS_BFLOAT16
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
#endif
      : "=f"(sums[0]), "=f"(sums[1]), "=f"(sums[2]), "=f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(before[0]), "f"(before[1]), "f"(before[2]),
        "f"(before[3]));
}

__device__ __forceinline__ float swap_lanes(float value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
__device__ __forceinline__ int swap_lanes(int value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
__device__ __forceinline__ void sync_block() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
// Wait until the kernel before this one is done and what it wrote can be seen.
__device__ __forceinline__ void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Let the next kernel start as far as its own wait. Called before this kernel's wait, it may start while the kernel before
// this one still runs: then it must read nothing but weights ahead of its wait, and what was written before that kernel.
__device__ __forceinline__ void let_next_kernel_in() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// One more block has come this far; whether it is the last of n. The counter is back at zero then.
__device__ __forceinline__ bool is_last_block(u32* counter, u32 n) {
  __threadfence();
  const bool last = atomicAdd(counter, 1u) == n - 1;
  if (last) *counter = 0;
  __threadfence();
  return last;
}
#endif

__device__ __forceinline__ float widen_bfloat(u16 upper) { return __uint_as_float(static_cast<u32>(upper) << 16); }

// The type of activations, of the KV cache and of two-byte weights.
#ifdef IS_BFLOAT16
__device__ __forceinline__ u16 narrow(float value) { return narrow_bfloat(value); }
__device__ __forceinline__ float widen(u16 value) { return widen_bfloat(value); }
#else
__device__ __forceinline__ u16 narrow(float value) { return narrow_half(value); }
__device__ __forceinline__ float widen(u16 value) { return widen_half(value); }
#endif

// sums += a * b, as above.
__device__ __forceinline__ void add_product(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  product_on(sums, a, b0, b1, sums);
}

__device__ __forceinline__ u32 both(u16 first, u16 second) { return first | static_cast<u32>(second) << 16; }
__device__ __forceinline__ u32 twice(u16 half) { return half | static_cast<u32>(half) << 16; }
__device__ __forceinline__ float low(u32 pair) { return widen(static_cast<u16>(pair)); }
__device__ __forceinline__ float high(u32 pair) { return widen(static_cast<u16>(pair >> 16)); }

__device__ __forceinline__ int thread() { return threadIdx.x; }
__device__ __forceinline__ int lane() { return threadIdx.x % kWarp; }
__device__ __forceinline__ int warp() { return threadIdx.x / kWarp; }
__device__ __forceinline__ int divide_up(int a, int b) { return (a + b - 1) / b; }

__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
  for (int mask = kWarp / 2; mask; mask /= 2) value += swap_lanes(value, mask);
  return value;
}

struct Best {
  float value;
  int index;
  // The larger one, the first of equals.
  __device__ __forceinline__ void meet(float other, int at) {
    if (other > value || (other == value && at < index)) value = other, index = at;
  }
};
__device__ __forceinline__ Best best_of_warp(Best best) {
#pragma unroll
  for (int mask = kWarp / 2; mask; mask /= 2) {
    const float value = swap_lanes(best.value, mask);
    const int index = swap_lanes(best.index, mask);
    best.meet(value, index);
  }
  return best;
}
