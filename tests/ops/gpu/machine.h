// The CPU's twin of kernels/machine.cuh, and what CUDA brings by itself: enough to run a kernel's threads as fibers.
// A fiber runs until a barrier or a shuffle; then the next one does. emulator.py writes what follows this file.
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct Index { unsigned x, y; };
static Index threadIdx, blockIdx, gridDim;
static uint4 memory[1 << 14];

enum Wait { NONE, WARP_BARRIER, BLOCK_BARRIER, END };
struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    Wait waits;
};
static std::vector<Fiber> fibers;
static int current;
static ucontext_t scheduler;
static float shuffled[32][32];

inline void wait_at(Wait barrier) {
    fibers[current].waits = barrier;
    swapcontext(&fibers[current].context, &scheduler);
}
inline void __syncthreads() { wait_at(BLOCK_BARRIER); }
inline void __syncwarp() { wait_at(WARP_BARRIER); }
inline float __shfl_xor_sync(unsigned, float value, int mask) {
    const int warp = current / 32, lane = current % 32;
    shuffled[warp][lane] = value;
    wait_at(WARP_BARRIER);
    const float other = shuffled[warp][lane ^ mask];
    wait_at(WARP_BARRIER);
    return other;
}
inline void atomicAdd(float* to, float value) { *to += value; }
inline long long min(long long a, long long b) { return a < b ? a : b; }

template <class To, class From>
inline To bits_of(From value) {
    To to;
    static_assert(sizeof(To) == sizeof(From));
    memcpy(&to, &value, sizeof(To));
    return to;
}

using f32 = float;
struct bf16 { unsigned short bits; };
struct f16 { unsigned short bits; };
inline float widen(float value) { return value; }
inline float widen(bf16 value) { return bits_of<float>(unsigned(value.bits) << 16); }
inline float widen(f16 value) { return bits_of<_Float16>(value.bits); }
inline void narrow(float& to, float value) { to = value; }
inline void narrow(bf16& to, float value) {
    const unsigned bits = bits_of<unsigned>(value);
    to.bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline void narrow(f16& to, float value) { to.bits = bits_of<unsigned short>(_Float16(value)); }
inline float exp2_(float x) { return exp2f(x); }
inline float reciprocal(float x) { return 1.0f / x; }

template <int BYTES>
inline void copy_async(void* to, const void* from, bool real) {
    if (real)
        memcpy(to, from, BYTES);
    else
        memset(to, 0, BYTES);
}
inline void copies_done() {}

static void fail(const char* why) {
    fprintf(stderr, "%s\n", why);
    abort();
}

// Run the threads of one block. All threads of a warp must reach the same barrier, and all of a block likewise.
static void run_block(int threads, void (*thread)()) {
    memset(memory, 0xff, sizeof(memory));  // NaN: what is read must have been written
    fibers.resize(threads);
    for (Fiber& fiber : fibers) {
        fiber.stack.resize(1 << 17);
        fiber.waits = NONE;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        makecontext(&fiber.context, thread, 0);
    }
    for (bool ended = false; !ended;) {
        for (int warp = 0; warp < threads; warp += 32)
            do {
                for (current = warp; current < warp + 32; current++) {
                    threadIdx.x = current;
                    swapcontext(&scheduler, &fibers[current].context);
                }
                for (int k = warp; k < warp + 32; k++)
                    if (fibers[k].waits != fibers[warp].waits) fail("threads of a warp wait at different barriers");
            } while (fibers[warp].waits == WARP_BARRIER);
        ended = fibers[0].waits == END;
        for (Fiber& fiber : fibers)
            if (fiber.waits != fibers[0].waits) fail("some threads of a block are at its end, some at a barrier");
    }
}
