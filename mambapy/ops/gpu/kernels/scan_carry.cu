// What each segment of the length does to what passes through it: with nothing coming in, what goes out (`carried`,
// first half); and by what is multiplied what comes in (second half). So the scans can work on all segments at once.
//
// FORWARD, of the state:            h_t = a_t h_{t-1} + dt_t B_t x_t     from a segment's first step to its last
// else, of the state's gradient:    f_t = a_t (f_{t+1} + C_t r_t)        from its last step to its first
// The segment that hands on to nobody is left out: the last, or the first. Notation as in scan_forward.cu and
// scan_backward.cu.

struct Shared {
    alignas(16) float step[CHANNELS][PITCH], value[CHANNELS][PITCH];
    alignas(16) float weight[WARPS * PART][PITCH], keep[TILE];
    alignas(16) float bias[CHANNELS];
    Tile<DT_T, TILE, CHANNELS> dt[BUFFERS];
    Tile<Z_T, TILE, CHANNELS> z[BUFFERS];
    Tile<V_T, TILE, CHANNELS> value_raw[BUFFERS];
    Tile<W_T, TILE, WARPS * PART> weight_raw[BUFFERS];
};
static_assert(sizeof(Shared) <= SHARED);

// value: x or grad y; weight: B or C.
extern "C" __global__ void __launch_bounds__(THREADS) scan_carry(
    const DT_T* dt, long long dt_row, long long dt_step, const float* A, const W_T* weight, long long w_row,
    long long w_step, const Z_T* z, long long z_row, long long z_step, const float* bias, const long long* seq,
    long long seq_row, long long seq_step, const V_T* value, long long v_row, long long v_step, float* carried,
    long long segments, long long rows, long long length, long long channels, long long states) {
    extern __shared__ uint4 memory[];
    Shared& sm = *reinterpret_cast<Shared*>(memory);
    const Place my(length, channels, states, blockIdx.y + (FORWARD ? 0 : 1), segments);
    const int lane = my.lane, warp = my.warp, s = my.s, mine = my.mine, left = my.left;
    const long long row = my.row, first = my.first, first_tile = my.first_tile, end_tile = my.end_tile;
    const bool gated = z != nullptr;
    dt += row * dt_row + first, z += row * z_row + first, value += row * v_row + first;
    weight += row * w_row, seq += row * seq_row;

    float rate[S], flow[S], steps = 0.0f, whole = 1.0f;
    get_rates(rate, A, my);
#pragma unroll
    for (int i = 0; i < S; i++) flow[i] = 0.0f;
    for (int j = threadIdx.x; j < CHANNELS; j += THREADS) sm.bias[j] = bias && j < left ? bias[first + j] : 0.0f;

    auto fetch = [&](long long tile) {
        const int half = tile % BUFFERS;
        const long long t = tile * TILE;
        const int now = min(length - t, (long long)TILE);
        fetch_tile<DT_VEC, THREADS>(sm.dt[half], dt + t * dt_step, dt_step, now, left);
        if (gated) fetch_tile<Z_VEC, THREADS>(sm.z[half], z + t * z_step, z_step, now, left);
        fetch_tile<V_VEC, THREADS>(sm.value_raw[half], value + t * v_step, v_step, now, left);
        fetch_tile<W_VEC, THREADS>(sm.weight_raw[half], weight + t * w_step, w_step, now, states);
    };

    const long long count_tiles = end_tile - first_tile;
    auto nth = [&](long long k) { return FORWARD ? first_tile + k : end_tile - 1 - k; };
    if (BUFFERS == 2 && count_tiles > 0) fetch(nth(0));
    for (long long k = 0; k < count_tiles; k++) {
        const long long tile = nth(k);
        const int half = tile % BUFFERS;
        const long long t = tile * TILE + lane;
        if (BUFFERS == 1) {
            __syncthreads();
            fetch(tile);
        }
        copies_done();
        __syncthreads();
        if (BUFFERS == 2 && k + 1 < count_tiles) fetch(nth(k + 1));
        const auto dt_now = row_of<CPW>(&sm.dt[half].at[lane][warp * CPW]);
        const auto gates = row_of<CPW>(&sm.z[half].at[lane][warp * CPW]);
        const auto values = row_of<CPW>(&sm.value_raw[half].at[lane][warp * CPW]);
        const auto biases = row_of<CPW>(&sm.bias[warp * CPW]);
#pragma unroll
        for (int j = 0; j < CPW; j++) {
            float step = widen(dt_now.at[j]) + biases.at[j], one = widen(values.at[j]);
            if (SOFTPLUS) step = softplus(step);
            step = t < length ? step : 0.0f;
            if (gated) one *= widen(gates.at[j]) * sigmoid(widen(gates.at[j]));
            sm.step[warp * CPW + j][lane] = step;
            sm.value[warp * CPW + j][lane] = FORWARD ? step * one : one;
        }
        stage_states(sm.weight, sm.weight_raw[half], my);
        if (SEQ && warp == 0) sm.keep[lane] = passes(seq, seq_step, t, length);
        __syncthreads();

#pragma unroll 2
        for (int from = 0; from < TILE; from += 4) {
            const int at = FORWARD ? from : TILE - 4 - from;
            const quad step = load4(&sm.step[mine][at]), value4 = load4(&sm.value[mine][at]);
            quad keep;
            if (SEQ) keep = load4(&sm.keep[at]);
#pragma unroll
            for (int u = 0; u < 4; u++) {
                steps += step.at[u];
                if (SEQ) whole *= keep.at[u];
            }
#pragma unroll
            for (int i = 0; i < S; i++) {
                const quad weight4 = load4(&sm.weight[i * SL + s][at]);
#pragma unroll
                for (int k4 = 0; k4 < 4; k4++) {
                    const int u = FORWARD ? k4 : 3 - k4;
                    float decay = exp2_(step.at[u] * rate[i]);
                    if (SEQ) decay *= keep.at[u];
                    flow[i] = FORWARD ? fmaf(decay, flow[i], value4.at[u] * weight4.at[u])
                                      : decay * fmaf(value4.at[u], weight4.at[u], flow[i]);
                }
            }
        }
    }
    put_states<EXACT>(carried + my.in(my.segment * rows + row), flow, my.count);
#pragma unroll
    for (int i = 0; i < S; i++) flow[i] = whole * exp2_(steps * rate[i]);
    put_states<EXACT>(carried + my.in((segments + my.segment) * rows + row), flow, my.count);
}
