// The backward selective scan, from the states that the forward pass has kept at the start of each tile of 32 steps.
//
// With g_t the gradient of h_t, r_t that of C_t h_t + D x_t, and a_t = exp(dt_t A):
//     g_t = C_t r_t + a_{t+1} g_{t+1}
//     grad C_t = sum_e r_t h_t        grad B_t = sum_e g_t dt_t x_t      grad A = sum_t dt_t a_t g_t h_{t-1}
//     grad dt_t = sum_n A a_t g_t h_{t-1} + x_t sum_n g_t B_t            grad x_t = D r_t + dt_t sum_n g_t B_t
// Tiles are taken from the last to the first, and in a tile runs of RUN steps likewise: the states and decays of a run
// are computed again into registers. The sums over channels (B, C)
// are added across the channels of a warp, then across warps, then to global memory.
//
// The grid's second dimension cuts the length into segments; a segment learns what gradient reaches its last state
// from `carried`: what scan_carry.cu has found for the segments after it.
//
// Set by the host: as scan.cuh says, and RUN, R_T (of grad y), DETERMINISTIC.

constexpr int RUNS = TILE / RUN;
constexpr int GROUP = SL < 4 ? 4 : SL < RUN ? SL : RUN;     // steps whose sums over states are added together
constexpr int KEPT = GROUP > SL ? GROUP / SL : 1;           // of these, how many a lane gets
constexpr int COLUMNS = 2 * S > CPW ? 2 * S / CPW : 1;      // sums over channels that a lane gets
constexpr int SHARERS = CPW > 2 * S ? CPW / (2 * S) : 1;    // lanes that get the same one
constexpr int TAILS = 2 * CPW > WARP ? 2 * CPW / WARP : 1;  // of D's and the bias' gradients
constexpr int TAIL_SHARERS = WARP > 2 * CPW ? WARP / (2 * CPW) : 1;

struct Shared {
    alignas(16) float step[CHANNELS][PITCH], drive[CHANNELS][PITCH], grad[CHANNELS][PITCH];  // dt, dt x, r
    alignas(16) float b[WARPS * PART][PITCH], c[WARPS * PART][PITCH], keep[TILE];
    alignas(16) float bias[CHANNELS], skip[CHANNELS];
    // Of each step and channel, from a tile's beginning to its end: dt, its slope, silu(z), its slope.
    float step_kept[CHANNELS][TILE], slope[CHANNELS][TILE], gate[CHANNELS][TILE], gate_slope[CHANNELS][TILE];
    float start[RUNS - 1][S][THREADS];  // h before each run but the first
    float sums[2][WARPS][RUN][2 * STATES];
    Tile<X_T, TILE, CHANNELS> x[BUFFERS];
    Tile<DT_T, TILE, CHANNELS> dt[BUFFERS];
    Tile<Z_T, TILE, CHANNELS> z[BUFFERS];
    Tile<R_T, TILE, CHANNELS> grad_y[BUFFERS];
    Tile<B_T, TILE, WARPS * PART> b_raw[BUFFERS];
    Tile<C_T, TILE, WARPS * PART> c_raw[BUFFERS];
};
static_assert(sizeof(Shared) <= SHARED);

// Take h through the RUN steps from `from` on; on request, note each step's state before it and its decay.
template <bool NOTE>
__device__ __forceinline__ void run_on(const Shared& sm, int channel, int s, int from, const float (&rate)[S],
                                       float (&h)[S], float (&before)[RUN][S], float (&decays)[RUN][S]) {
#pragma unroll
    for (int k = 0; k < RUN; k += 4) {
        const quad step = load4(&sm.step[channel][from + k]), drive = load4(&sm.drive[channel][from + k]);
        quad keep;
        if (SEQ) keep = load4(&sm.keep[from + k]);
#pragma unroll
        for (int i = 0; i < S; i++) {
            const quad b = load4(&sm.b[i * SL + s][from + k]);
#pragma unroll
            for (int u = 0; u < 4; u++) {
                float decay = exp2_(step.at[u] * rate[i]);
                if (SEQ) decay *= keep.at[u];
                if (NOTE) before[k + u][i] = h[i], decays[k + u][i] = decay;
                h[i] = fmaf(decay, h[i], drive.at[u] * b.at[u]);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(WARPS* WARP) scan_backward(
    const X_T* x, long long x_row, long long x_step, const DT_T* dt, long long dt_row, long long dt_step,
    const float* A, const B_T* B, long long b_row, long long b_step, const C_T* C, long long c_row, long long c_step,
    const float* D, const Z_T* z, long long z_row, long long z_step, const float* bias,
    const long long* seq, long long seq_row, long long seq_step, const R_T* grad_y, long long r_row, long long r_step,
    const float* starts, const float* grad_last, const float* carried, X_T* grad_x, DT_T* grad_dt, Z_T* grad_z,
    long long g_row, long long g_step, float* grad_B, float* grad_C, long long n_row, long long n_step,
    float* grad_A, float* grad_D, float* grad_bias, float* grad_state, long long rows, long long length,
    long long channels, long long states) {
    extern __shared__ uint4 memory[];
    Shared& sm = *reinterpret_cast<Shared*>(memory);
    const Place my(length, channels, states, blockIdx.y, gridDim.y);
    const int lane = my.lane, warp = my.warp, s = my.s, c = my.c, mine = my.mine, left = my.left;
    const long long row = my.row, first = my.first, first_tile = my.first_tile, end_tile = my.end_tile;
    const bool gated = z != nullptr;
    x += row * x_row + first, dt += row * dt_row + first, z += row * z_row + first, grad_y += row * r_row + first;
    grad_x += row * g_row + first, grad_dt += row * g_row + first, grad_z += row * g_row + first;
    B += row * b_row, C += row * c_row, seq += row * seq_row;
    // Blocks add to one sum, or each has its own.
    grad_B += (DETERMINISTIC ? my.block * rows + row : row) * n_row;
    grad_C += (DETERMINISTIC ? my.block * rows + row : row) * n_row;

    float rate[S], flow[S], grad_rate[S];  // flow: a_{t+1} g_{t+1}
    get_rates(rate, A, my);
    get_states<EXACT>(flow, grad_last + my.in(row), grad_last ? my.count : 0);
#pragma unroll
    for (int i = 0; i < S; i++) grad_rate[i] = 0.0f;
#pragma unroll 1
    for (long long k = gridDim.y - 1; k > my.segment; k--) pass_segment(flow, carried, k, gridDim.y, rows, my);
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
        fetch_tile<R_VEC, THREADS>(sm.grad_y[half], grad_y + t * r_step, r_step, rows_now, left);
        fetch_tile<B_VEC, THREADS>(sm.b_raw[half], B + t * b_step, b_step, rows_now, states);
        fetch_tile<C_VEC, THREADS>(sm.c_raw[half], C + t * c_step, c_step, rows_now, states);
    };
    // The gradients stand where what they belong to stood.
    auto store = [&](long long tile) {
        const int half = tile % BUFFERS;
        const long long t = tile * TILE;
        const int rows_now = min(length - t, (long long)TILE);
        store_tile<G_VEC, THREADS>(grad_x + t * g_step, sm.x[half], g_step, rows_now, left);
        store_tile<G_VEC, THREADS>(grad_dt + t * g_step, sm.dt[half], g_step, rows_now, left);
        if (gated) store_tile<G_VEC, THREADS>(grad_z + t * g_step, sm.z[half], g_step, rows_now, left);
    };

    float tail[TAILS];
#pragma unroll
    for (int k = 0; k < TAILS; k++) tail[k] = 0.0f;
    int turn = 0;
    if (BUFFERS == 2 && first_tile < end_tile) fetch(end_tile - 1);
    for (long long tile = end_tile - 1; tile >= first_tile; tile--) {
        const int half = tile % BUFFERS;
        const long long t = tile * TILE + lane;
        if (BUFFERS == 1) fetch(tile);
        copies_done();
        __syncthreads();
        {
            const auto x_now = row_of<CPW>(&sm.x[half].at[lane][warp * CPW]);
            const auto dt_now = row_of<CPW>(&sm.dt[half].at[lane][warp * CPW]);
            const auto gates = row_of<CPW>(&sm.z[half].at[lane][warp * CPW]);
            const auto grads = row_of<CPW>(&sm.grad_y[half].at[lane][warp * CPW]);
            const auto biases = row_of<CPW>(&sm.bias[warp * CPW]);
#pragma unroll
            for (int j = 0; j < CPW; j++) {
                const int at = warp * CPW + j;
                float step = widen(dt_now.at[j]) + biases.at[j], slope = 1.0f, grad = widen(grads.at[j]);
                if (SOFTPLUS) step = softplus(step, slope);
                step = t < length ? step : 0.0f;
                sm.step_kept[at][lane] = step;
                sm.slope[at][lane] = t < length ? slope : 0.0f;
                if (gated) {
                    const float z_at = widen(gates.at[j]), open = sigmoid(z_at), gate = z_at * open;
                    sm.gate[at][lane] = gate;
                    sm.gate_slope[at][lane] = fmaf(gate, 1.0f - open, open);
                    grad *= gate;
                }
                sm.step[at][lane] = step;
                sm.drive[at][lane] = step * widen(x_now.at[j]);
                sm.grad[at][lane] = grad;
            }
            stage_states(sm.b, sm.b_raw[half], my);
            stage_states(sm.c, sm.c_raw[half], my);
        }
        if (SEQ && warp == 0) sm.keep[lane] = passes(seq, seq_step, t, length);
        float h[S], before[RUN][S], decays[RUN][S];
        get_states<EXACT>(h, starts + my.in(row * my.tiles + tile), my.count);
        __syncthreads();
        if (BUFFERS == 2 && tile + 1 < end_tile) store(tile + 1);
        if (BUFFERS == 2 && tile > first_tile) {
            __syncthreads();
            fetch(tile - 1);
        }

#pragma unroll 1
        for (int run = 1; run < RUNS; run++) {
            run_on<false>(sm, mine, s, (run - 1) * RUN, rate, h, before, decays);
#pragma unroll
            for (int i = 0; i < S; i++) sm.start[run - 1][i][threadIdx.x] = h[i];
        }

#pragma unroll 1
        for (int run = RUNS - 1; run >= 0; run--, turn ^= 1) {
            const int from = run * RUN;
            if (run > 0) {
#pragma unroll
                for (int i = 0; i < S; i++) h[i] = sm.start[run - 1][i][threadIdx.x];
            } else {
                get_states<EXACT>(h, starts + my.in(row * my.tiles + tile), my.count);
            }
            run_on<true>(sm, mine, s, from, rate, h, before, decays);

#pragma unroll
            for (int high = RUN - GROUP; high >= 0; high -= GROUP) {
                // Of each step, summed over this thread's states: g B, a g h A, C h.
                float into_drive[GROUP], into_step[GROUP], out[GROUP];
#pragma unroll
                for (int k = GROUP - 4; k >= 0; k -= 4) {
                    const int at = from + high + k;
                    const quad step = load4(&sm.step[mine][at]), drive = load4(&sm.drive[mine][at]);
                    const quad grad = load4(&sm.grad[mine][at]);
                    quad b[S], c4[S];
#pragma unroll
                    for (int i = 0; i < S; i++) {
                        b[i] = load4(&sm.b[i * SL + s][at]);
                        c4[i] = load4(&sm.c[i * SL + s][at]);
                    }
#pragma unroll
                    for (int u = 3; u >= 0; u--) {
                        float into_bc[2 * S];
                        into_drive[k + u] = into_step[k + u] = out[k + u] = 0.0f;
#pragma unroll
                        for (int i = 0; i < S; i++) {
                            float g = fmaf(grad.at[u], c4[i].at[u], flow[i]);
                            into_bc[i] = g * drive.at[u];
                            into_bc[S + i] = grad.at[u] * h[i];
                            out[k + u] = fmaf(c4[i].at[u], h[i], out[k + u]);
                            into_drive[k + u] = fmaf(g, b[i].at[u], into_drive[k + u]);
                            flow[i] = g * decays[high + k + u][i];
                            h[i] = before[high + k + u][i];
                            float through = flow[i] * h[i];
                            into_step[k + u] = fmaf(through, rate[i], into_step[k + u]);
                            grad_rate[i] = fmaf(through, step.at[u], grad_rate[i]);
                        }
                        sum_lanes<2 * S, CPW, 1>(into_bc, c);
                        if (c % SHARERS == 0)
#pragma unroll
                            for (int k2 = 0; k2 < COLUMNS; k2++) {
                                const int value = c / SHARERS * COLUMNS + k2;
                                const int column = value / S * STATES + s * S + value % S;
                                sm.sums[turn][warp][high + k + u][column] = into_bc[k2];
                            }
                    }
                }
                sum_lanes<GROUP, SL, CPW>(into_drive, s);
                sum_lanes<GROUP, SL, CPW>(into_step, s);
                sum_lanes<GROUP, SL, CPW>(out, s);
                // The inputs of these steps are no longer needed.
                __syncwarp();
#pragma unroll
                for (int k = 0; k < KEPT; k++) {
                    const int at = from + high + s * GROUP / SL + k;
                    sm.step[mine][at] = into_step[k];
                    sm.drive[mine][at] = into_drive[k];
                    sm.grad[mine][at] = out[k];
                }
            }
            __syncthreads();
            for (int cell = threadIdx.x; cell < RUN * 2 * STATES; cell += WARPS * WARP) {
                const int k = cell / (2 * STATES), column = cell % (2 * STATES), n = column % STATES;
                const long long now = tile * TILE + from + k;
                float sum = 0.0f;
#pragma unroll
                for (int w = 0; w < WARPS; w++) sum += sm.sums[turn][w][k][column];
                if (now < length && n < states) {
                    float* to = (column < STATES ? grad_B : grad_C) + now * n_step + n;
                    if (DETERMINISTIC) *to = sum;
                    else atomicAdd(to, sum);
                }
            }
        }

        const auto x_now = row_of<CPW>(&sm.x[half].at[lane][warp * CPW]);
        const auto grads = row_of<CPW>(&sm.grad_y[half].at[lane][warp * CPW]);
        const auto skips = row_of<CPW>(&sm.skip[warp * CPW]);
        Row<X_T, CPW> into_x;
        Row<DT_T, CPW> into_dt;
        Row<Z_T, CPW> into_z;
        float parts[2 * CPW];  // of the gradients of D and of the bias
#pragma unroll
        for (int j = 0; j < CPW; j++) {
            const int at = warp * CPW + j;
            const float x_at = widen(x_now.at[j]), drive = sm.drive[at][lane];
            float grad = widen(grads.at[j]);
            if (gated) {
                const float y_at = fmaf(skips.at[j], x_at, sm.grad[at][lane]);
                narrow(into_z.at[j], grad * sm.gate_slope[at][lane] * y_at);
                grad *= sm.gate[at][lane];
            }
            const float change = fmaf(drive, x_at, LN2 * sm.step[at][lane]) * sm.slope[at][lane];
            narrow(into_x.at[j], fmaf(drive, sm.step_kept[at][lane], grad * skips.at[j]));
            narrow(into_dt.at[j], change);
            parts[j] = grad * x_at;
            parts[CPW + j] = change;
        }
        *reinterpret_cast<Row<X_T, CPW>*>(&sm.x[half].at[lane][warp * CPW]) = into_x;
        *reinterpret_cast<Row<DT_T, CPW>*>(&sm.dt[half].at[lane][warp * CPW]) = into_dt;
        if (gated) *reinterpret_cast<Row<Z_T, CPW>*>(&sm.z[half].at[lane][warp * CPW]) = into_z;
        if (BUFFERS == 1) {
            __syncthreads();
            store(tile);
            __syncthreads();
        }
        sum_lanes<2 * CPW, WARP, 1>(parts, lane);
#pragma unroll
        for (int k = 0; k < TAILS; k++) tail[k] += parts[k];
    }

    if (BUFFERS == 2 && first_tile < end_tile) {
        __syncthreads();
        store(first_tile);
    }
    const long long part = my.segment * rows + row;
    put_states<EXACT>(grad_A + my.in(part), grad_rate, my.count);
    if (my.segment == 0 && grad_state) put_states<EXACT>(grad_state + my.in(row), flow, my.count);
    if (lane % TAIL_SHARERS == 0)
#pragma unroll
        for (int k = 0; k < TAILS; k++) {
            const int value = lane / TAIL_SHARERS * TAILS + k, j = warp * CPW + value % CPW;
            float* to = value < CPW ? grad_D : grad_bias;
            if (to && j < left) to[part * channels + first + j] = tail[k];
        }
}
