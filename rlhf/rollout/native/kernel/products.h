// Products of a few rows with a matrix of weights, which is read once, as it lies in the model.
#pragma once
#include "numbers.h"

#include <initializer_list>
#if defined(__AMX_BF16__) && defined(__linux__)
#define TILES 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

struct Matrix {  // [outputs, inputs], row by row, in the model's format; the bias may be null.
    const void *weight, *bias;
    int64_t outputs, inputs;
};

struct Team {  // Which of how many threads this one is.
    int me, all;
    int64_t from(int64_t count) const { return count * me / all; }
    int64_t to(int64_t count) const { return count * (me + 1) / all; }
};

// Results of one or two matrices for some rows and outputs: values[part][i * row_step + j * output_step].
struct Block {
    float* values[2];
    int64_t row, rows, output, outputs, row_step, output_step;
    int count;  // Numbers in each part, all of which may be changed.
    float& at(int part, int64_t i, int64_t j) const { return values[part][i * row_step + j * output_step]; }
};

// Rows of fp32 numbers against four rows of weights at a time, on any CPU.
template <class T>
struct Vectors {
    using Value = T;
    using Packed = float;  // How a product's input is kept: widened, in the order in which weights are read.
    static constexpr int SIDE = 1;  // Rows that are kept together.
    static constexpr int OUTPUTS = 4, ROWS = LANES == 16 ? 6 : 2;  // As many sums as registers hold.

    static int64_t size(int64_t n, int64_t inputs) { return n * padded(inputs); }

    // Numbers of row i from k on.
    static void put(Packed* x, int64_t inputs, int64_t i, int64_t k, int64_t count, const float* values) {
        x += i * padded(inputs);
        for (int64_t c = 0; c < count; c++) x[Chunk<T>::place(k + c)] = values[c];
    }

    static void put(Packed* x, int64_t inputs, const Block& block) {
        for (int64_t i = 0; i < block.rows; i++)
            put(x, inputs, block.row + i, block.output, block.outputs, &block.at(0, i, 0));
    }

    static void begin() {}
    static void end() {}

    template <int M>
    static inline void step(const T* const* w, const float* x, int64_t stride, Lanes sums[M][OUTPUTS]) {
        Lanes v[OUTPUTS];
        for (int half = 0; half < 2; half++) {
#pragma GCC unroll 4
            for (int j = 0; j < OUTPUTS; j++) v[j] = half ? Chunk<T>::second(w[j]) : Chunk<T>::first(w[j]);
#pragma GCC unroll 8
            for (int i = 0; i < M; i++) {
                Lanes y = lanes(x + i * stride + half * LANES);
#pragma GCC unroll 4
                for (int j = 0; j < OUTPUTS; j++) sums[i][j] += v[j] * y;
            }
        }
    }

    template <int M>
    static void rows(const T* const* w, const float* x, int64_t inputs, float* out) {
        const int64_t stride = padded(inputs), whole = inputs / CHUNK * CHUNK;
        Lanes sums[M][OUTPUTS] = {};
        const T* at[OUTPUTS];
        for (int64_t k = 0; k < whole; k += CHUNK) {
#pragma GCC unroll 4
            for (int j = 0; j < OUTPUTS; j++) {
                at[j] = w[j] + k;
                __builtin_prefetch(at[j] + OUTPUTS * inputs, 0, 2);  // The next four rows.
            }
            step<M>(at, x + k, stride, sums);
        }
        if (whole < inputs) {
            T rest[OUTPUTS][CHUNK] = {};
            for (int j = 0; j < OUTPUTS; j++) {
                memcpy(rest[j], w[j] + whole, (inputs - whole) * sizeof(T));
                at[j] = rest[j];
            }
            step<M>(at, x + whole, stride, sums);
        }
        for (int i = 0; i < M; i++)
            for (int j = 0; j < OUTPUTS; j++) out[i * OUTPUTS + j] = total(sums[i][j]);
    }

    static void some_rows(int64_t count, const T* const* w, const float* x, int64_t inputs, float* out) {
        if (count == 1) return rows<1>(w, x, inputs, out);
        if (count == 2) return rows<2>(w, x, inputs, out);
        if constexpr (ROWS > 2) {
            if (count == 3) return rows<3>(w, x, inputs, out);
            if (count == 4) return rows<4>(w, x, inputs, out);
            if (count == 5) return rows<5>(w, x, inputs, out);
            return rows<6>(w, x, inputs, out);
        }
    }

    // Calls store(block) for this thread's outputs of x W^T + b, rounded; x has n rows, and the matrices equal shapes.
    template <class Store>
    static void multiply(std::initializer_list<const Matrix*> matrices, const Packed* x, int64_t n, Team team,
                         Store store) {
        const Matrix& one = **matrices.begin();
        const int64_t units = (one.outputs + OUTPUTS - 1) / OUTPUTS, blocks = (n + ROWS - 1) / ROWS;
        for (int64_t unit = team.from(units); unit < team.to(units); unit++) {
            const int64_t output = unit * OUTPUTS, left = one.outputs - output;
            for (int64_t block = 0; block < blocks; block++) {
                const int64_t row = n * block / blocks, count = n * (block + 1) / blocks - row;
                float values[2][padded(ROWS * OUTPUTS)] = {};
                int part = 0;
                for (const Matrix* matrix : matrices) {
                    const T *w[OUTPUTS], *bias = (const T*)matrix->bias;
                    float added[OUTPUTS];
                    for (int j = 0; j < OUTPUTS; j++) {
                        int64_t at = output + (j < left ? j : left - 1);
                        w[j] = (const T*)matrix->weight + at * one.inputs;
                        added[j] = bias ? wide(bias[at]) : 0.f;
                    }
                    float* own = values[part++];
                    some_rows(count, w, x + row * padded(one.inputs), one.inputs, own);
                    for (int i = 0; i < count * OUTPUTS; i++) own[i] = rounded<T>(own[i] + added[i % OUTPUTS]);
                }
                store(Block{{values[0], values[1]}, row, count, output, left < OUTPUTS ? left : OUTPUTS, OUTPUTS, 1,
                            int(count) * OUTPUTS});
            }
        }
    }
};

#if TILES
// Intel's matrix unit (AMX): sixteen rows of weights against sixteen rows of the input, 32 numbers of each at a time.
struct Tiles {
    using Value = BFloat16;
    using Packed = BFloat16;  // [rows / 16, inputs / 2, 16, 2], as the unit wants its second factor.
    static constexpr int SIDE = 16, DEPTH = 32;

    static bool fits(const Matrix& matrix) {
        return !matrix.weight || (matrix.inputs % DEPTH == 0 && matrix.outputs >= SIDE);
    }

    // Asks Linux for the unit's registers; false: this machine has none to give.
    static bool available() { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0; }

    static int64_t size(int64_t n, int64_t inputs) { return (n + SIDE - 1) / SIDE * SIDE * inputs; }

    static void put(Packed* x, int64_t inputs, int64_t i, int64_t k, int64_t count, const float* values) {
        x += i / SIDE * SIDE * inputs + i % SIDE * 2;
        for (int64_t c = 0; c < count; c += 2)  // Heads and models have even widths.
            for (int both = 0; both < 2; both++) narrow(values[c + both], x[(k + c) * SIDE + both]);
    }

    static void put(Packed* x, int64_t inputs, const Block& block) {
        x += block.row * inputs + block.output * SIDE;
        for (int64_t j = 0; j < block.outputs; j++)
            for (int64_t i = 0; i < SIDE; i++) narrow(block.at(0, i, j), x[j / 2 * 2 * SIDE + i * 2 + j % 2]);
    }

    static void begin() {
        // Palette 1, then at 16 the bytes of each register's rows, at 48 how many rows it has. GCC sees only eight of
        // the 64 bytes being read: what is written here at run time it may leave out.
        alignas(64) static const uint8_t registers[64] = {
            1,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0,
            0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 16, 16, 16, 16, 16, 16, 16, 16};
        _tile_loadconfig(registers);
    }
    static void end() { _tile_release(); }

    // 16 or 32 rows of weights (HIGH: 1 or 2) and of the input (BROAD) into out[BROAD][HIGH * 16][16].
    template <int HIGH, int BROAD>
    static inline void tiles(const Value* w, const Packed* x, int64_t inputs, float* out) {
        const int64_t next = inputs * SIDE;
        _tile_zero(0);
        if (HIGH > 1) _tile_zero(1);
        if (BROAD > 1) _tile_zero(2);
        if (HIGH > 1 && BROAD > 1) _tile_zero(3);
        for (int64_t k = 0; k < inputs; k += DEPTH) {
            // What the next call reads, into the second level of the cache.
            for (int row = 0; row < HIGH * SIDE; row++) __builtin_prefetch(w + (HIGH * SIDE + row) * inputs + k, 0, 2);
            _tile_loadd(4, w + k, inputs * sizeof(Value));
            if (HIGH > 1) _tile_loadd(5, w + next + k, inputs * sizeof(Value));
            _tile_loadd(6, x + k * SIDE, 64);
            _tile_dpbf16ps(0, 4, 6);
            if (HIGH > 1) _tile_dpbf16ps(1, 5, 6);
            if (BROAD > 1) {
                _tile_loadd(7, x + next + k * SIDE, 64);
                _tile_dpbf16ps(2, 4, 7);
                if (HIGH > 1) _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, out, 64);
        if (HIGH > 1) _tile_stored(1, out + 256, 64);
        if (BROAD > 1) _tile_stored(2, out + HIGH * 256, 64);
        if (HIGH > 1 && BROAD > 1) _tile_stored(3, out + HIGH * 256 + 256, 64);
    }

    static void product(bool high, bool broad, const Value* w, const Packed* x, int64_t inputs, float* out) {
        if (high && broad) return tiles<2, 2>(w, x, inputs, out);
        if (high) return tiles<2, 1>(w, x, inputs, out);
        if (broad) return tiles<1, 2>(w, x, inputs, out);
        return tiles<1, 1>(w, x, inputs, out);
    }

    // As Vectors::multiply.
    template <class Store>
    static void multiply(std::initializer_list<const Matrix*> matrices, const Packed* x, int64_t n, Team team,
                         Store store) {
        const Matrix& one = **matrices.begin();
        const int64_t units = (one.outputs + SIDE - 1) / SIDE, last = team.to(units);
        for (int64_t unit = team.from(units), high; unit < last; unit += high) {
            high = unit + 2 <= last && (unit + 2) * SIDE <= one.outputs ? 2 : 1;
            // The last rows are computed again where they do not fill a tile: none behind them is read.
            const int64_t output = unit * SIDE, most = one.outputs - high * SIDE, start = output < most ? output : most;
            for (int64_t row = 0, broad; row < n; row += broad * SIDE) {
                broad = n - row > SIDE ? 2 : 1;
                alignas(64) float values[2][4 * SIDE * SIDE];
                int part = 0;
                for (const Matrix* matrix : matrices) {
                    float* own = values[part++];
                    const Value* bias = (const Value*)matrix->bias;
                    product(high == 2, broad == 2, (const Value*)matrix->weight + start * one.inputs,
                            x + row * one.inputs, one.inputs, own);
                    for (int64_t line = 0; line < broad * high * SIDE; line++) {
                        float added = bias ? wide(bias[start + line % (high * SIDE)]) : 0.f;
                        for (int i = 0; i < SIDE; i++)
                            own[line * SIDE + i] = rounded<Value>(own[line * SIDE + i] + added);
                    }
                }
                const int size = int(high) * SIDE * SIDE;
                for (int64_t b = 0; b < broad; b++) {
                    const int64_t first = row + b * SIDE, skip = b * size + (output - start) * SIDE;
                    store(Block{{values[0] + skip, values[1] + skip}, first, n - first < SIDE ? n - first : SIDE,
                                output, start + high * SIDE - output, 1, SIDE, size - int(output - start) * SIDE});
                }
            }
        }
    }
};
#endif
