// Stands in for csrc/cuda/threads.cuh: blocks run one after another on the host, and the threads of
// a block are fibers of one thread that change places where they would wait for each other. So the
// kernels' arithmetic, indices and order of synchronisation can be tested where there is no GPU.
// Under ThreadSanitizer, each fiber is a thread to it: barriers order what threads do, and shuffles
// do not. One block runs at a time, so that races between blocks are not seen.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <memory>

#include "fibers.h"
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

// Few warps, so that each takes several steps of a short row.
#ifndef BGK_WARPS
#define BGK_WARPS 2
#endif
constexpr int kWarpSize = 32, kWarps = BGK_WARPS, kThreads = kWarps * kWarpSize;
typedef uintptr_t Stream;
constexpr size_t kMostShared = 227 * 1024;  // of an H100

// Fibers that wait for each other.
struct Barrier {
  int size = 0, arrived = 0;
  unsigned generation = 0;
  char orders[2];  // what ThreadSanitizer knows a generation by
};

// A line of the kernels' text.
struct Site {
  const char* file = nullptr;
  int line = 0;

  // By hand, since sanitizers watch what the library does.
  BGK_UNSEEN bool operator==(const Site& x) const {
    if (line != x.line || !file != !x.file) return false;
    for (int i = 0; file && (file[i] || x.file[i]); ++i)
      if (file[i] != x.file[i]) return false;
    return true;
  }
};

// One block.
struct Machine {
  Fiber fibers[kThreads], scheduler;
  Barrier all, warps[kWarps];
  std::unique_ptr<char[]> dynamic;
  size_t dynamic_bytes = 0;
  uint64_t slots[kThreads];  // what lanes show each other
  dim3 block, blocks;
  int current = 0;
  bool backwards = false;  // the order in which fibers run: another one shows missing barriers
  void (*body)() = nullptr;
  int error = 0;          // what the device answers
  Site sites[16], muted;  // of the barriers that were met; of one that is left out
  int site_count = 0;
  char begin, end;  // of a block: what ThreadSanitizer knows them by
};

BGK_UNSEEN inline Machine& machine() {
  static Machine& one = *new Machine;
  return one;
}

BGK_UNSEEN inline int thread() { return machine().current; }
inline int lane() { return thread() % kWarpSize; }
inline int warp() { return thread() / kWarpSize; }
BGK_UNSEEN inline dim3 block() { return machine().block; }
BGK_UNSEEN inline dim3 blocks() { return machine().blocks; }

BGK_UNSEEN inline void release(Barrier& b) { b.arrived = 0, ++b.generation; }

BGK_UNSEEN inline void wait(Barrier& b) {
  Machine& m = machine();
  const unsigned generation = b.generation;
  if (++b.arrived == b.size) return release(b);
  while (b.generation == generation) change(m.fibers[m.current], m.scheduler);
}

// A barrier of the kernels, at a line of theirs.
BGK_UNSEEN inline void meet(Barrier& b, const char* file, int line) {
  Machine& m = machine();
  const Site site = {file, line};
  int i = 0;
  while (i < m.site_count && !(m.sites[i] == site)) ++i;
  if (i == m.site_count) m.sites[m.site_count++] = site;
  if (site == m.muted) return;
  char* orders = &b.orders[b.generation & 1];
  before_barrier(orders);
  wait(b);
  after_barrier(orders);
}

inline void sync_block(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  meet(machine().all, file, line);
}
inline void sync_warp(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  meet(machine().warps[warp()], file, line);
}

template <class T>
BGK_UNSEEN inline T of_lane(T x, int from) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a word");
  Machine& m = machine();
  const int first = m.current - lane();
  memcpy(&m.slots[m.current], &x, sizeof(T));
  wait(m.warps[warp()]);
  memcpy(&x, &m.slots[first + (from & (kWarpSize - 1))], sizeof(T));
  wait(m.warps[warp()]);
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

BGK_UNSEEN inline char* dynamic_shared() { return machine().dynamic.get(); }

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
BGK_UNSEEN inline void leave(Barrier& b) {
  if (--b.size > 0 && b.arrived == b.size) release(b);
}

// Lets a fiber run until it waits or returns.
BGK_UNSEEN inline void resume(int i) {
  Machine& m = machine();
  m.current = i;
  change(m.scheduler, m.fibers[i]);
  if (!m.fibers[i].finished) return;
  leave(m.all), leave(m.warps[i / kWarpSize]);
}

// Runs `body` in every thread of a block.
BGK_UNSEEN inline void run_block() {
  Machine& m = machine();
  memset(m.dynamic.get(), 0xff, m.dynamic_bytes);  // NaN
  m.all = {kThreads};
  for (Barrier& w : m.warps) w = {kWarpSize};
  m.scheduler.is_this_thread();
  for (Fiber& f : m.fibers) f.restart(m.body);
  before_barrier(&m.begin);
  for (int left = kThreads; left > 0;) {
    left = 0;
    for (int k = 0; k < kThreads; ++k) {
      const int i = m.backwards ? kThreads - 1 - k : k;
      if (!m.fibers[i].finished) resume(i);
      left += !m.fibers[i].finished;
    }
  }
  after_barrier(&m.end);
}

template <class Args>
struct Call {
  static inline void (*kernel)(Args);
  static inline const Args* args;
  BGK_UNSEEN static void body() {
    Machine& m = machine();
    entered(m.scheduler);
    after_barrier(&m.begin);
    kernel(*args);
    before_barrier(&m.end);
    m.fibers[m.current].finished = true;
    change(m.fibers[m.current], m.scheduler);
  }
};

template <class Args>
int start(void (*kernel)(Args), dim3 grid, size_t shared_bytes, Stream, Args args) {
  Machine& m = machine();
  if (shared_bytes > kMostShared) return kCudaFailed + 1;
  m.dynamic.reset(new char[shared_bytes]), m.dynamic_bytes = shared_bytes;
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
