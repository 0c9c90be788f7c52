// A fiber: a function with its own stack that may leave and be entered again. Fourteen instructions on x86-64, where a
// kernel's rendezvous make millions of switches; ucontext elsewhere.
#pragma once
#include <functional>
#include <memory>

namespace emulator {

constexpr size_t STACK_BYTES = 256 << 10;

#if defined(__x86_64__)
extern "C" void switch_stack(void** save, void* load);
asm(R"(
.text
.type switch_stack,@function
switch_stack:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
)");

struct Context {
    void* stack_pointer = nullptr;
    void prepare(char* stack, void (*entry)()) {
        void** top = (void**)((uintptr_t)(stack + STACK_BYTES) & ~(uintptr_t)15);
        *--top = nullptr;         // the entry never returns
        *--top = (void*)entry;    // where `ret` goes: the stack is then as after a call
        for (int i = 0; i < 6; ++i) *--top = nullptr;
        stack_pointer = top;
    }
    static void change(Context& from, Context& to) { switch_stack(&from.stack_pointer, to.stack_pointer); }
};
#else
#include <ucontext.h>
struct Context {
    ucontext_t context;
    void prepare(char* stack, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = STACK_BYTES;
        makecontext(&context, entry, 0);
    }
    static void change(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

struct Fiber {
    Context own;
    std::unique_ptr<char[]> stack;
    std::function<void()> body;
    bool done = false;

    inline static Context scheduler;
    inline static Fiber* running = nullptr;

    void start(std::function<void()> function) {
        body = std::move(function);
        stack.reset(new char[STACK_BYTES]);
        own.prepare(stack.get(), &Fiber::run);
    }
    void enter() {
        running = this;
        Context::change(scheduler, own);
    }
    void leave() { Context::change(own, scheduler); }
    static void run() {
        running->body();
        running->done = true;
        running->leave();
    }
};

}  // namespace emulator
