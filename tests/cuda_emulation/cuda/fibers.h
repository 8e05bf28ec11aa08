// Threads of a block as fibers of one thread of the host, which sanitizers are told of.
#pragma once

#include <setjmp.h>
#include <stddef.h>
#include <ucontext.h>

#include <memory>

#define BGK_UNSEEN __attribute__((no_sanitize("thread")))  // bookkeeping of the emulator

#if defined(__SANITIZE_THREAD__)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif
#if defined(__SANITIZE_ADDRESS__)
extern "C" {
void __sanitizer_start_switch_fiber(void** fake, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake, const void** bottom, size_t* size);
}
#endif
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define BGK_SANITIZED  // whose interceptors do not follow a jump to another stack
#endif

namespace bgk::cuda {

constexpr size_t kStack = 128 * 1024;

struct Fiber {
  ucontext_t context;
  jmp_buf here;
  std::unique_ptr<char[]> stack;
  const void* bottom = nullptr;  // of its stack, with `size` bytes
  size_t size = kStack;
  void *known = nullptr, *fake = nullptr;  // as sanitizers know it
  bool started = false, finished = false;

  // The fiber begins anew.
  BGK_UNSEEN void restart(void (*body)()) {
    if (!stack) bottom = (stack.reset(new char[kStack]), stack.get());
    getcontext(&context);
    context.uc_stack.ss_sp = stack.get(), context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, body, 0);
    started = finished = false;
#if defined(__SANITIZE_THREAD__)
    if (!known) known = __tsan_create_fiber(0);
#endif
  }
  BGK_UNSEEN void is_this_thread() {
    started = true;
#if defined(__SANITIZE_THREAD__)
    known = __tsan_get_current_fiber();
#endif
  }
};

// Goes on in another fiber, until somebody goes on in this one.
BGK_UNSEEN inline void change(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.known, 1);  // which orders nothing
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake, to.bottom, to.size);
#endif
#if defined(BGK_SANITIZED)
  swapcontext(&from.context, &to.context);
#else
  if (_setjmp(from.here) == 0) {  // without the system calls of swapcontext
    if (to.started) _longjmp(to.here, 1);
    to.started = true;
    setcontext(&to.context);
  }
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
#endif
}

// The first words of a fiber, which came from another.
BGK_UNSEEN inline void entered(Fiber& from) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &from.bottom, &from.size);
#else
  (void)from;
#endif
}

BGK_UNSEEN inline void before_barrier(void* barrier) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(barrier);
#else
  (void)barrier;
#endif
}
BGK_UNSEEN inline void after_barrier(void* barrier) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(barrier);
#else
  (void)barrier;
#endif
}

}  // namespace bgk::cuda
