#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#include "sanitizer.h"

// The hand-written switch saves what the ABI says a callee keeps, and nothing else; swapcontext also saves the signal
// mask, a system call that costs a hundred times more.
#if defined(__ELF__) && (defined(__x86_64__) || defined(__aarch64__)) && !defined(SUBQUAD_SIMT_UCONTEXT)
#define SIMT_ASM_SWITCH 1
#else
#define SIMT_ASM_SWITCH 0
#include <ucontext.h>
#endif

namespace simt::detail {
namespace {

#ifdef SIMT_ASAN
constexpr std::size_t kStackBytes = 256 * 1024;  // instrumented frames are several times larger
#else
constexpr std::size_t kStackBytes = 64 * 1024;
#endif

std::size_t page_bytes() {
  static const auto bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

}  // namespace

#if SIMT_ASM_SWITCH

// void* simt_switch_stack(void** save_sp, void* load_sp, void* argument): suspends the caller at *save_sp and continues
// at load_sp, where the argument is the result of the pending call or, on a fresh stack, the parameter of its entry.
extern "C" void simt_switch_stack(void** save_sp, void* load_sp, void* argument) __attribute__((visibility("hidden")));

#if defined(__x86_64__)

asm(R"(
.text
.p2align 4
.globl simt_switch_stack
.hidden simt_switch_stack
.type simt_switch_stack, @function
simt_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  movq %rdx, %rdi
  ret
.size simt_switch_stack, . - simt_switch_stack
)");

namespace {
// Six saved registers, the address `ret` jumps to, and a null return address that ends every stack trace.
void* fresh_stack(char* top, void (*entry)(Fiber*)) {
  auto* sp = reinterpret_cast<std::uintptr_t*>(top) - 8;
  for (int i = 0; i < 8; ++i) sp[i] = 0;
  sp[6] = reinterpret_cast<std::uintptr_t>(entry);
  return sp;
}
}  // namespace

#else

asm(R"(
.text
.p2align 4
.globl simt_switch_stack
.hidden simt_switch_stack
.type simt_switch_stack, %function
simt_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  mov x0, x2
  ret
.size simt_switch_stack, . - simt_switch_stack
)");

namespace {
// Twenty saved registers; the twelfth is the link register, which `ret` jumps to.
void* fresh_stack(char* top, void (*entry)(Fiber*)) {
  auto* sp = reinterpret_cast<std::uintptr_t*>(top) - 20;
  for (int i = 0; i < 20; ++i) sp[i] = 0;
  sp[11] = reinterpret_cast<std::uintptr_t>(entry);
  return sp;
}
}  // namespace

#endif

#else  // ucontext

namespace {
thread_local Fiber* starting = nullptr;  // makecontext passes no pointers
}

#endif

Fiber::Fiber(Entry entry, void* argument) : entry_(entry), argument_(argument) {
  const std::size_t guard = page_bytes();
  void* mapping = mmap(nullptr, guard + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  mprotect(mapping, guard, PROT_NONE);
  mapping_ = static_cast<char*>(mapping);
#if SIMT_ASM_SWITCH
  context_ = fresh_stack(mapping_ + guard + kStackBytes, &Fiber::start);
  resumer_ = nullptr;
#else
  auto* context = new ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = mapping_ + guard;
  context->uc_stack.ss_size = kStackBytes;
  context->uc_link = nullptr;
  makecontext(context, [] { start(starting); }, 0);
  context_ = context;
  resumer_ = new ucontext_t;
#endif
}

Fiber::~Fiber() {
  const std::size_t bytes = page_bytes() + kStackBytes;
  asan_unpoison(mapping_, bytes);  // frames that were dropped, before the address range serves something else
  munmap(mapping_, bytes);
#if !SIMT_ASM_SWITCH
  delete static_cast<ucontext_t*>(context_);
  delete static_cast<ucontext_t*>(resumer_);
#endif
}

void Fiber::start(Fiber* fiber) {
  asan_finish_switch(nullptr, &fiber->resumer_stack_, &fiber->resumer_stack_bytes_);
  fiber->entry_(fiber->argument_);
  __builtin_unreachable();
}

void Fiber::resume() {
  void* fake_stack = nullptr;
  asan_start_switch(&fake_stack, mapping_ + page_bytes(), kStackBytes);
#if SIMT_ASM_SWITCH
  simt_switch_stack(&resumer_, context_, this);
#else
  starting = this;
  swapcontext(static_cast<ucontext_t*>(resumer_), static_cast<ucontext_t*>(context_));
#endif
  asan_finish_switch(fake_stack, nullptr, nullptr);
}

void Fiber::suspend() {
  asan_start_switch(&fake_stack_, resumer_stack_, resumer_stack_bytes_);
#if SIMT_ASM_SWITCH
  simt_switch_stack(&context_, resumer_, nullptr);
#else
  swapcontext(static_cast<ucontext_t*>(context_), static_cast<ucontext_t*>(resumer_));
#endif
  asan_finish_switch(fake_stack_, &resumer_stack_, &resumer_stack_bytes_);
}

}  // namespace simt::detail
