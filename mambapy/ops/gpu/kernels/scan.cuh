// What the three scans share: who has which channels and states, and what a block stages of each tile of steps.
//
// A warp has CPW channels, SL lanes each; lane s of a channel keeps the S states from s S on in registers. Steps come
// in tiles. For what is one number a step and channel, lane t of a warp takes step t of its channels; for the recurrence
// the lanes of a channel take all steps one after the other, four of them a load: in shared memory, the steps of a
// channel or state are neighbours.
//
// Set by the host: S, SL, WARPS, SOFTPLUS, SEQ (there are documents), EXACT (n = S SL); X_T and X_VEC (numbers in one
// access) and so on for each tensor of rows; SHARED, the bytes of shared memory; BUFFERS, 2 where a tile is fetched
// ahead, else 1.

constexpr int TILE = 32, PITCH = TILE + 4, CPW = WARP / SL, CHANNELS = WARPS * CPW, STATES = S * SL;
constexpr int THREADS = WARPS * WARP;
constexpr int PART = (STATES + WARPS - 1) / WARPS;  // of B and C, what a warp stages

// A thread's share of the work; the grid is (rows and blocks of channels, segments of the length).
struct Place {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, s = lane / CPW, c = lane % CPW;
    const int mine = warp * CPW + c;  // of the block's channels
    const long long channels, states, blocks = (channels + CHANNELS - 1) / CHANNELS, block = blockIdx.x % blocks;
    const long long row = blockIdx.x / blocks, first = block * CHANNELS, channel = first + mine;
    const long long tiles, segment, each, first_tile = segment * each, end_tile = min(tiles, first_tile + each);
    const int left = min(channels - first, (long long)CHANNELS);
    // Of my states, those that exist.
    const int count = channel >= channels ? 0 : EXACT ? S : int(min(states - s * S, (long long)S));

    __device__ __forceinline__ Place(long long length, long long channels, long long states, long long segment,
                                     long long segments)
        : channels(channels), states(states), tiles((length + TILE - 1) / TILE), segment(segment),
          each((tiles + segments - 1) / segments) {}

    // My states in a tensor (outer, channels, states).
    __device__ __forceinline__ long long in(long long outer) const {
        return (outer * channels + channel) * states + s * S;
    }
};

// log2 of the decay in a step of length 1.
__device__ __forceinline__ void get_rates(float (&rate)[S], const float* A, const Place& my) {
    get_states<EXACT>(rate, A + my.in(0), my.count);
#pragma unroll
    for (int i = 0; i < S; i++) rate[i] *= LOG2E;
}

// Take what flows into the row past segment `k`, as scan_carry.cu has left it in `carried` (2, segments, rows, ...).
__device__ __forceinline__ void pass_segment(float (&flow)[S], const float* carried, long long k, long long segments,
                                             long long rows, const Place& my) {
    float add[S], times[S];
    get_states<EXACT>(add, carried + my.in(k * rows + my.row), my.count);
    get_states<EXACT>(times, carried + my.in((segments + k) * rows + my.row), my.count);
#pragma unroll
    for (int i = 0; i < S; i++) flow[i] = fmaf(times[i], flow[i], add[i]);
}

// This warp's part of a tile of B or C, so that a lane finds its own states in rows s, SL + s, 2 SL + s ...
template <class T, int ROWS, int COLUMNS>
__device__ __forceinline__ void stage_states(float (*to)[PITCH], const Tile<T, ROWS, COLUMNS>& from, const Place& my) {
    const auto now = row_of<PART>(&from.at[my.lane][my.warp * PART]);
#pragma unroll
    for (int j = 0; j < PART; j++) {
        const int n = my.warp * PART + j;
        if (STATES % WARPS && n >= STATES) break;
        to[n % S * SL + n / S][my.lane] = widen(now.at[j]);
    }
}

// 0 where a document starts at this lane's step, which lets nothing pass from before; else 1.
__device__ __forceinline__ float passes(const long long* seq, long long seq_step, long long t, long long length) {
    return 0 < t && t < length && seq[t * seq_step] != seq[(t - 1) * seq_step] ? 0.0f : 1.0f;
}
