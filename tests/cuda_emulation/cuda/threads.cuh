// Stands in for csrc/cuda/threads.cuh: blocks run one after another on the host, and the threads of
// a block are fibers of one thread that change places where they would wait for each other. So the
// kernels' arithmetic, indices and order of synchronisation can be tested where there is no GPU.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <memory>

#include "row_args.h"

#define BGK_DEVICE inline
#define __global__
#define __device__
#define __shared__ static  // of the one block that runs
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace bgk::cuda {

constexpr size_t kStack = 128 * 1024;

// Few warps, so that each takes several steps of a short row.
constexpr int kWarpSize = 32, kWarps = 2, kThreads = kWarps * kWarpSize;
typedef uintptr_t Stream;

// Fibers that wait for each other.
struct Barrier {
  int size = 0, arrived = 0;
  unsigned generation = 0;
};

struct Fiber {
  ucontext_t context;
  jmp_buf here;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool started = false, finished = false;
};

constexpr int kShared = 256 * 1024;

// One block.
struct Machine {
  Fiber fibers[kThreads];
  Barrier all, warps[kWarps];
  alignas(16) char dynamic[kShared];
  uint64_t slots[kThreads];  // what lanes show each other
  dim3 block, blocks;
  jmp_buf scheduler;
  int current = 0;
  bool backwards = false;  // the order in which fibers run: another one shows missing barriers
  void (*body)() = nullptr;
  int error = 0;  // what the device answers
};

inline Machine& machine() {
  static Machine& one = *new Machine;
  return one;
}

inline int thread() { return machine().current; }
inline int lane() { return thread() % kWarpSize; }
inline int warp() { return thread() / kWarpSize; }
inline dim3 block() { return machine().block; }
inline dim3 blocks() { return machine().blocks; }

inline void pause() {
  Machine& m = machine();
  if (_setjmp(m.fibers[m.current].here) == 0) _longjmp(m.scheduler, 1);
}

inline void release(Barrier& b) { b.arrived = 0, ++b.generation; }

inline void wait(Barrier& b) {
  const unsigned generation = b.generation;
  if (++b.arrived == b.size) return release(b);
  while (b.generation == generation) pause();
}

inline void sync_block() { wait(machine().all); }
inline void sync_warp() { wait(machine().warps[warp()]); }

template <class T>
inline T of_lane(T x, int from) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a word");
  Machine& m = machine();
  memcpy(&m.slots[m.current], &x, sizeof(T));
  sync_warp();
  memcpy(&x, &m.slots[m.current - lane() + (from & (kWarpSize - 1))], sizeof(T));
  sync_warp();
  return x;
}

template <class T>
inline T exchanged(T x, int lanes_apart) {
  return of_lane(x, lane() ^ lanes_apart);
}

inline bool any_lane(bool x) {
  int found = x;
  for (int apart = kWarpSize / 2; apart; apart /= 2) found |= exchanged(found, apart);
  return found;
}

inline char* dynamic_shared() { return machine().dynamic; }

// As the device's: subnormal results are flushed.
constexpr float kLog2E = 1.44269504f;
inline float fast_exp2(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
}
inline float fast_exp(float x) { return fast_exp2(x * kLog2E); }

inline uint32_t high_product(uint32_t a, uint32_t b) { return (uint32_t)((uint64_t)a * b >> 32); }

template <int kWords>
inline void load_words(const void* from, uint32_t* to) {
  if ((uintptr_t)from % (4 * kWords)) __builtin_trap();  // as the device would
  memcpy(to, from, 4 * kWords);
}

template <int kWords>
inline void store_words(void* to, const uint32_t* from) {
  if ((uintptr_t)to % (4 * kWords)) __builtin_trap();
  memcpy(to, from, 4 * kWords);
}

template <class To, class From>
inline To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To y;
  memcpy(&y, &x, sizeof(y));
  return y;
}

inline float as_float(uint32_t bits) { return bit_cast<float>(bits); }
inline uint32_t as_bits(float x) { return bit_cast<uint32_t>(x); }
inline float from_f16(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float size = exponent == 31  ? (mantissa ? NAN : INFINITY)
                     : exponent == 0 ? ldexpf((float)mantissa, -24)
                                     : ldexpf((float)(mantissa + 1024), exponent - 25);
  return bits >> 15 ? -size : size;
}
inline uint16_t to_f16(float x) {
  const uint16_t sign = signbit(x) ? 0x8000 : 0;
  if (x != x) return 0x7e00;
  if (fabsf(x) >= 65520.0f) return sign | 0x7c00;
  if (x == 0.0f) return sign;
  const int exponent = ilogbf(x) < -14 ? -14 : ilogbf(x);
  const int steps =
      (int)nearbyintf(ldexpf(fabsf(x), 10 - exponent));  // a carry raises the exponent
  return (uint16_t)(sign | (((exponent + 14) << 10) + steps));
}
inline uint16_t to_bf16(float x) {
  const uint32_t bits = as_bits(x);
  return x != x ? 0x7fff : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline int use(int) { return machine().error ? kCudaFailed + machine().error : kOk; }
inline const char* error_text(int) { return "an emulated error"; }

template <class Args>
int try_load(void (*)(Args)) {
  return kOk;
}

// Threads that have returned are waited for no longer.
inline void leave(Barrier& b) {
  if (--b.size > 0 && b.arrived == b.size) release(b);
}

// Lets a fiber run until it waits or returns.
inline void resume(int i) {
  Machine& m = machine();
  m.current = i;
  if (_setjmp(m.scheduler) == 0) {
    Fiber& f = m.fibers[i];
    if (f.started) _longjmp(f.here, 1);
    f.started = true;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get(), f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, m.body, 0);
    setcontext(&f.context);
  }
  if (!machine().fibers[machine().current].finished) return;
  leave(machine().all), leave(machine().warps[warp()]);
}

// Runs `body` in every thread of a block.
inline void run_block() {
  Machine& m = machine();
  memset(m.dynamic, 0xff, kShared);  // NaN
  m.all = {kThreads};
  for (Barrier& w : m.warps) w = {kWarpSize};
  for (Fiber& f : m.fibers) f.started = f.finished = false;
  for (int left = kThreads; left > 0;) {
    left = 0;
    for (int k = 0; k < kThreads; ++k) {
      const int i = m.backwards ? kThreads - 1 - k : k;
      if (!m.fibers[i].finished) resume(i);
      left += !m.fibers[i].finished;
    }
  }
}

template <class Args>
struct Call {
  static inline void (*kernel)(Args);
  static inline const Args* args;
  static void body() {
    kernel(*args);
    Machine& m = machine();
    m.fibers[m.current].finished = true;
    _longjmp(m.scheduler, 1);
  }
};

template <class Args>
int start(void (*kernel)(Args), dim3 grid, size_t shared_bytes, Stream, Args args) {
  Machine& m = machine();
  if (shared_bytes > kShared) return kCudaFailed + 1;
  Call<Args>::kernel = kernel, Call<Args>::args = &args;
  m.body = Call<Args>::body, m.blocks = grid;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        m.block = dim3(x, y, z);
        run_block();
      }
  return kOk;
}

}  // namespace bgk::cuda
