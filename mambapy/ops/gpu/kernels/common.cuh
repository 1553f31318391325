// What the kernels share: functions of one number, tiles of shared memory, sums over lanes.
// Nothing is included, so that NVRTC alone compiles it, behind machine.cuh.

constexpr int WARP = 32;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.0f + exp2_(-LOG2E * x)); }

// log(1 + e^x) = max(x, 0) + log(1 + u), u = e^-|x|; log(1 + u) = 2 artanh(u / (2 + u)) by its series, as the
// hardware's logarithm is not exact near 1, where steps are small. Also its slope, sigmoid(x).
__device__ __forceinline__ float softplus(float x, float& slope) {
    float u = exp2_(-LOG2E * fabsf(x));
    float r = u * reciprocal(2.0f + u), q = r * r;
    float series = fmaf(q, 1.0f / 13, 1.0f / 11);
    series = fmaf(series, q, 1.0f / 9);
    series = fmaf(series, q, 1.0f / 7);
    series = fmaf(series, q, 1.0f / 5);
    series = fmaf(series, q, 1.0f / 3);
    series = fmaf(series, q, 1.0f);
    float s = reciprocal(1.0f + u);
    slope = x >= 0.0f ? s : u * s;
    return fmaxf(x, 0.0f) + 2.0f * r * series;
}
__device__ __forceinline__ float softplus(float x) {
    float slope;
    return softplus(x, slope);
}

// COUNT neighbours, moved 16 bytes at a time where there are as many.
template <class T, int COUNT>
struct alignas(COUNT * sizeof(T) % 16 ? (COUNT * sizeof(T) & -(COUNT * sizeof(T))) : 16) Row {
    T at[COUNT];
};
template <int COUNT, class T>
__device__ __forceinline__ const Row<T, COUNT>& row_of(const T* from) {
    return *reinterpret_cast<const Row<T, COUNT>*>(from);
}
using quad = Row<float, 4>;
__device__ __forceinline__ quad load4(const float* from) { return row_of<4>(from); }

// A thread's S states from neighbouring places, `count` of them real; all or none where EXACT.
template <bool EXACT, int S>
__device__ __forceinline__ void get_states(float (&to)[S], const float* from, int count) {
#pragma unroll
    for (int i = 0; i < S; i++) to[i] = 0.0f;
    if (EXACT && count) {
        const auto row = row_of<S>(from);
#pragma unroll
        for (int i = 0; i < S; i++) to[i] = row.at[i];
    } else if (!EXACT) {
#pragma unroll
        for (int i = 0; i < S; i++)
            if (i < count) to[i] = from[i];
    }
}
template <bool EXACT, int S>
__device__ __forceinline__ void put_states(float* to, const float (&from)[S], int count) {
    if (EXACT && count) {
        Row<float, S> row;
#pragma unroll
        for (int i = 0; i < S; i++) row.at[i] = from[i];
        *reinterpret_cast<Row<float, S>*>(to) = row;
    } else if (!EXACT) {
#pragma unroll
        for (int i = 0; i < S; i++)
            if (i < count) to[i] = from[i];
    }
}

// A tile of ROWS steps in shared memory; the padding keeps lanes that read a row each from the same banks.
template <class T, int ROWS, int COLUMNS>
struct alignas(16) Tile {
    alignas(16) T at[ROWS][COLUMNS + 16 / sizeof(T)];
};

// The block's threads copy a tile, VEC numbers at a time, those of a row together; what is beyond `rows` and `columns`
// is zero.
template <int VEC, int THREADS, class T, int ROWS, int COLUMNS>
__device__ __forceinline__ void fetch_tile(Tile<T, ROWS, COLUMNS>& to, const T* from, long long step, int rows,
                                           int columns) {
#pragma unroll
    for (int k = 0; k < ROWS * COLUMNS / VEC; k += THREADS) {
        const int piece = k + threadIdx.x, row = piece / (COLUMNS / VEC), column = piece % (COLUMNS / VEC) * VEC;
        if (ROWS * COLUMNS / VEC % THREADS && piece >= ROWS * COLUMNS / VEC) break;
        const bool real = row < rows && column < columns;
        const T* source = from + (real ? row * step + column : 0);
        if constexpr (VEC * sizeof(T) >= 4) {
            copy_async<VEC * sizeof(T)>(&to.at[row][column], source, real);
        } else {
            T value{};
            if (real) value = *source;
            to.at[row][column] = value;
        }
    }
}

// The same way back.
template <int VEC, int THREADS, class T, int ROWS, int COLUMNS>
__device__ __forceinline__ void store_tile(T* to, const Tile<T, ROWS, COLUMNS>& from, long long step, int rows,
                                           int columns) {
#pragma unroll
    for (int k = 0; k < ROWS * COLUMNS / VEC; k += THREADS) {
        const int piece = k + threadIdx.x, row = piece / (COLUMNS / VEC), column = piece % (COLUMNS / VEC) * VEC;
        if (row < rows && column < columns)
            *reinterpret_cast<Row<T, VEC>*>(to + row * step + column) = row_of<VEC>(&from.at[row][column]);
    }
}

// Sums of V values over the LANES lanes that are STRIDE apart, `at` being this lane's place among them. Where V >=
// LANES, lane `at` ends with the V / LANES sums from at * (V / LANES) on; else with sum at / (LANES / V).
template <int V, int LANES, int STRIDE>
__device__ __forceinline__ void sum_lanes(float (&v)[V], int at) {
    int width = V;
#pragma unroll
    for (int m = LANES / 2; m >= 1; m /= 2) {
        if (width > 1) {
            width /= 2;
            bool upper = at & m;
#pragma unroll
            for (int i = 0; i < V / 2; i++)
                if (i < width) {
                    float gives = upper ? v[i] : v[i + width], keeps = upper ? v[i + width] : v[i];
                    v[i] = keeps + __shfl_xor_sync(~0u, gives, m * STRIDE);
                }
        } else {
            v[0] += __shfl_xor_sync(~0u, v[0], m * STRIDE);
        }
    }
}
