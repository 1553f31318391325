// The forward selective scan: h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = (C_t h_t + D x_t) silu(z_t).
//
// A block fetches a tile while it works on the one before. The sums over the states of several steps are added across
// the SL lanes of a channel together, which leaves each lane with one.
//
// The grid's second dimension cuts the length into segments; a segment learns what state it starts from from
// `carried`: what scan_carry.cu has found for the segments before it.

constexpr int GROUP = SL > 4 ? SL : 4;  // steps whose sums are added together

struct Shared {
    alignas(16) float step[CHANNELS][PITCH], drive[CHANNELS][PITCH];  // dt, dt * x; then C h in place of dt
    alignas(16) float b[WARPS * PART][PITCH], c[WARPS * PART][PITCH], keep[TILE];
    alignas(16) float bias[CHANNELS], skip[CHANNELS];
    Tile<X_T, TILE, CHANNELS> x[BUFFERS], y;
    Tile<DT_T, TILE, CHANNELS> dt[BUFFERS];
    Tile<Z_T, TILE, CHANNELS> z[BUFFERS];
    Tile<B_T, TILE, WARPS * PART> b_raw[BUFFERS];
    Tile<C_T, TILE, WARPS * PART> c_raw[BUFFERS];
};
static_assert(sizeof(Shared) <= SHARED);

extern "C" __global__ void __launch_bounds__(THREADS) scan_forward(
    const X_T* x, long long x_row, long long x_step, const DT_T* dt, long long dt_row, long long dt_step,
    const float* A, const B_T* B, long long b_row, long long b_step, const C_T* C, long long c_row, long long c_step,
    const float* D, const Z_T* z, long long z_row, long long z_step, const float* bias, const float* state,
    const long long* seq, long long seq_row, long long seq_step, X_T* y, long long y_row, long long y_step,
    const float* carried, float* starts, float* last, long long rows, long long length, long long channels,
    long long states) {
    extern __shared__ uint4 memory[];
    Shared& sm = *reinterpret_cast<Shared*>(memory);
    const Place my(length, channels, states, blockIdx.y, gridDim.y);
    const int lane = my.lane, warp = my.warp, s = my.s, mine = my.mine, left = my.left;
    const long long row = my.row, first = my.first, first_tile = my.first_tile, end_tile = my.end_tile;
    const bool gated = z != nullptr;
    x += row * x_row + first, dt += row * dt_row + first, z += row * z_row + first, y += row * y_row + first;
    B += row * b_row, C += row * c_row, seq += row * seq_row;

    float rate[S], h[S];
    get_rates(rate, A, my);
    get_states<EXACT>(h, state + my.in(row), state ? my.count : 0);
#pragma unroll 1
    for (long long k = 0; k < my.segment; k++) pass_segment(h, carried, k, gridDim.y, rows, my);
    for (int j = threadIdx.x; j < CHANNELS; j += THREADS) {
        sm.bias[j] = bias && j < left ? bias[first + j] : 0.0f;
        sm.skip[j] = D && j < left ? D[first + j] : 0.0f;
    }

    auto fetch = [&](long long tile) {
        const int half = tile % BUFFERS;
        const long long t = tile * TILE;
        const int rows_now = min(length - t, (long long)TILE);
        fetch_tile<X_VEC, THREADS>(sm.x[half], x + t * x_step, x_step, rows_now, left);
        fetch_tile<DT_VEC, THREADS>(sm.dt[half], dt + t * dt_step, dt_step, rows_now, left);
        if (gated) fetch_tile<Z_VEC, THREADS>(sm.z[half], z + t * z_step, z_step, rows_now, left);
        fetch_tile<B_VEC, THREADS>(sm.b_raw[half], B + t * b_step, b_step, rows_now, states);
        fetch_tile<C_VEC, THREADS>(sm.c_raw[half], C + t * c_step, c_step, rows_now, states);
    };
    auto store = [&](long long tile) {
        const int rows_now = min(length - tile * TILE, (long long)TILE);
        store_tile<Y_VEC, THREADS>(y + tile * TILE * y_step, sm.y, y_step, rows_now, left);
    };

    if (BUFFERS == 2 && first_tile < end_tile) fetch(first_tile);
    for (long long tile = first_tile; tile < end_tile; tile++) {
        const int half = tile % BUFFERS;
        const long long t = tile * TILE + lane;
        if (BUFFERS == 1) {
            __syncthreads();
            fetch(tile);
        }
        copies_done();
        __syncthreads();
        if (tile > first_tile) store(tile - 1);
        if (BUFFERS == 2 && tile + 1 < end_tile) fetch(tile + 1);
        {
            const auto x_now = row_of<CPW>(&sm.x[half].at[lane][warp * CPW]);
            const auto dt_now = row_of<CPW>(&sm.dt[half].at[lane][warp * CPW]);
            const auto biases = row_of<CPW>(&sm.bias[warp * CPW]);
#pragma unroll
            for (int j = 0; j < CPW; j++) {
                float step = widen(dt_now.at[j]) + biases.at[j];
                if (SOFTPLUS) step = softplus(step);
                // A step of 0 changes nothing.
                step = t < length ? step : 0.0f;
                sm.step[warp * CPW + j][lane] = step;
                sm.drive[warp * CPW + j][lane] = step * widen(x_now.at[j]);
            }
            stage_states(sm.b, sm.b_raw[half], my);
            stage_states(sm.c, sm.c_raw[half], my);
        }
        if (SEQ && warp == 0) sm.keep[lane] = passes(seq, seq_step, t, length);
        if (starts) put_states<EXACT>(starts + my.in(row * my.tiles + tile), h, my.count);
        __syncthreads();

#pragma unroll UNROLL
        for (int from = 0; from < TILE; from += GROUP) {
            float sum[GROUP];
#pragma unroll
            for (int k = 0; k < GROUP; k += 4) {
                const quad step = load4(&sm.step[mine][from + k]), drive = load4(&sm.drive[mine][from + k]);
                quad keep;
                if (SEQ) keep = load4(&sm.keep[from + k]);
#pragma unroll
                for (int u = 0; u < 4; u++) sum[k + u] = 0.0f;
#pragma unroll
                for (int i = 0; i < S; i++) {
                    const quad b = load4(&sm.b[i * SL + s][from + k]), c = load4(&sm.c[i * SL + s][from + k]);
#pragma unroll
                    for (int u = 0; u < 4; u++) {
                        float decay = exp2_(step.at[u] * rate[i]);
                        if (SEQ) decay *= keep.at[u];
                        h[i] = fmaf(decay, h[i], drive.at[u] * b.at[u]);
                        sum[k + u] = fmaf(h[i], c.at[u], sum[k + u]);
                    }
                }
            }
            sum_lanes<GROUP, SL, CPW>(sum, s);
            __syncwarp();
#pragma unroll
            for (int k = 0; k < GROUP / SL; k++) sm.step[mine][from + s * (GROUP / SL) + k] = sum[k];
        }
        __syncwarp();

        const auto x_now = row_of<CPW>(&sm.x[half].at[lane][warp * CPW]);
        const auto gates = row_of<CPW>(&sm.z[half].at[lane][warp * CPW]);
        const auto skips = row_of<CPW>(&sm.skip[warp * CPW]);
        Row<X_T, CPW> out;
#pragma unroll
        for (int j = 0; j < CPW; j++) {
            float value = fmaf(skips.at[j], widen(x_now.at[j]), sm.step[warp * CPW + j][lane]);
            if (gated) value *= widen(gates.at[j]) * sigmoid(widen(gates.at[j]));
            narrow(out.at[j], value);
        }
        *reinterpret_cast<Row<X_T, CPW>*>(&sm.y.at[lane][warp * CPW]) = out;
    }
    __syncthreads();
    if (first_tile < end_tile) store(end_tile - 1);
    if (my.segment + 1 == gridDim.y) put_states<EXACT>(last + my.in(row), h, my.count);
}
