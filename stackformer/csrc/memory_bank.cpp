// Copyright 2026 The Stackformer authors. Licensed under the Apache License, Version 2.0.
//
// The chunk forms of banked linear attention and of the banked delta rule for CPUs. memory_bank.py and delta_bank.py
// compute them in batched matrix products; this file takes one chunk of one head at a time, which stays in the first
// levels of the cache. The mathematics and its names are those of these two files; this one only arranges them so that
// every product is one of small dense matrices, row by row.
//
// Plain C interface, no dependency but a C++17 compiler with GNU vector extensions: the library is loaded with ctypes
// and never sees torch. Tensors are described by a pointer and strides in elements; the last dimension is dense.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#define INLINE inline __attribute__((always_inline))

extern "C" {

// A tensor [B, T, H, F] or [B, H, ...]; `data` is null where it is not wanted. Queries, keys, values, output and their
// gradients may be bfloat16 where all else is float32. Products then take bfloat16 operands and add up in float32, if
// the processor has instructions for that, as they do on a GPU.
struct Tokens {
    void* data;
    int64_t batch, time, head;  // strides
};

// The delta rule has step sizes [B, T, H] and errors [B, T, H, V], linear attention normalizers and denominators; what an
// operator does not have is null.
struct Problem {
    int64_t batch, time, heads, key_size, value_size, memories, chunk;
    double eps;
    Tokens query, key, value, read, write, log_decay, step_size;
    // Dense: memory [B, H, R, K, V], normalizer [B, H, R, K].
    void *memory, *normalizer;
    // Dense, of every chunk's start: [B, H, chunks, R, K, V] and [B, H, chunks, R, K]; null in inference.
    void *start_memory, *start_normalizer;
    // Dense: output [B, T, H, V], denominator [B, T, H], errors [B, T, H, V] in the precision of the state.
    Tokens output, denominator, errors;
    // Forward writes these dense ones; backward reads the gradients in their place and overwrites them with the
    // gradients of the initial state.
    void *final_memory, *final_normalizer;
    // Backward only.
    Tokens grad_output, grad_query, grad_key, grad_value, grad_read, grad_write, grad_log_decay, grad_step_size;
};

// One token of a whole mixer, from the projections of its input to the input of its output projection: convolution,
// feature map, recurrence, normalisation, gate. All dense; F is the head size, N banks, S levels, R = S N. The state has
// `count` rows. The delta rule has step sizes, and no normalizer and `feature_map`.
struct Step {
    int64_t batch, count, heads, size, banks, levels, taps, feature_map;
    double eps, norm_eps;
    const void *projected, *conv_weight;             // queries, keys, values [B, 3 H F], their taps [3 H F, taps]
    const void *pointer, *read, *write, *log_decay;  // [B, S], [B, H, N]
    const void* step_size;                           // [B, H]
    const void *norm_weight, *gate;                  // [F], [B, H F]
    const void *past, *memory, *normalizer;          // [B, taps - 1, 3 H F], [B, H, R, F, F], [B, H, R, F]
    void *new_past, *new_memory, *new_normalizer, *output;  // output [B, H F]
    const int64_t* rows;  // [B], ascending, whose states these are, if not all; the new ones may be in place of the old
};

}  // extern "C"

namespace {

struct bfloat16 {
    uint16_t bits;
};

template <class to, class from>
INLINE to same_bits(from value) {
    static_assert(sizeof(to) == sizeof(from), "as many bits");
    to result;
    std::memcpy(&result, &value, sizeof result);
    return result;
}

INLINE double number(double value) { return value; }
INLINE float number(float value) { return value; }
INLINE float number(bfloat16 value) { return same_bits<float>(uint32_t(value.bits) << 16); }

INLINE void assign(double& to, double value) { to = value; }
INLINE void assign(float& to, float value) { to = value; }
// Rounds to the nearest, ties to even; a NaN stays a NaN.
INLINE void assign(bfloat16& to, float value) {
    const uint32_t bits = same_bits<uint32_t>(value);
    to.bits = value != value ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

template <class real>
INLINE real* at(const Tokens& tokens, int64_t b, int64_t t, int64_t h) {
    return static_cast<real*>(tokens.data) + b * tokens.batch + t * tokens.time + h * tokens.head;
}

INLINE int64_t round_up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

// The part that is zero in a product A B of square matrices, and is skipped.
enum Shape { FULL, LOWER_A, UPPER_A, LOWER_RESULT };

// One chunk of one head. `token` is the type of queries, keys, values and output, `real` that of all else; `BYTES` is the
// width of a vector, `ROWS` the rows of a register block of 2 vectors; `PAIRS`, whether products take bfloat16, which
// processors multiply in pairs.
template <class real, class token, int BYTES, int ROWS, bool PAIRS>
struct Chunk {
    static constexpr int LANES = BYTES / sizeof(real);
    // Sizes are padded to whole vectors, register blocks and tiles of a transposition.
    static constexpr int TILE = 8, PAD = LANES > TILE ? LANES : TILE;
    typedef typename std::conditional<sizeof(real) == 4, int32_t, int64_t>::type integer;
    typedef real vec __attribute__((vector_size(BYTES), aligned(sizeof(real)), may_alias));
    typedef integer lanes __attribute__((vector_size(BYTES)));

    static INLINE vec load(const real* from) { return *reinterpret_cast<const vec*>(from); }
    static INLINE vec load(const bfloat16* from) {
        lanes bits;
        for (int i = 0; i < LANES; i++) bits[i] = from[i].bits;
        return (vec)(bits << 16);
    }
    static INLINE void store(real* to, vec value) { *reinterpret_cast<vec*>(to) = value; }

    // Two vectors of float32 as one of bfloat16, and sums + a * b of two neighbours in each of its lanes.
    static INLINE vec rounded(vec first, vec second) {
        vec result;
        asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(result) : "v"(first), "v"(second));
        return result;
    }
    static INLINE vec add_pairs(vec sums, vec a, vec b) {
        asm("vdpbf16ps %1, %2, %0" : "+v"(sums) : "v"(a), "v"(b));
        return sums;
    }

    // A [rows, columns], whose rows are `stride` apart, with the columns in pairs: [rows, columns / 2].
    static INLINE void pair_columns(const real* A, int64_t rows, int64_t columns, int64_t stride, real* to) {
        for (int64_t i = 0; i < rows; i++)
            // What the last vector is too long by is overwritten by the next row, or by what comes behind the last.
            for (int64_t j = 0; j < columns; j += 2 * LANES) {
                const real* from = A + i * stride + j;
                const vec second = j + LANES < columns ? load(from + LANES) : vec{};
                store(to + (i * columns + j) / 2, rounded(load(from), second));
            }
    }

    // The same with the rows in pairs: [rows / 2, columns].
    static INLINE void pair_rows(const real* A, int64_t rows, int64_t columns, int64_t stride, real* to) {
        typedef int16_t halves __attribute__((vector_size(64)));  // PAIRS is for BYTES = 64 only
        halves order;
        for (int j = 0; j < LANES; j++) order[2 * j] = j, order[2 * j + 1] = LANES + j;
        for (int64_t i = 0; i < rows; i += 2)
            for (int64_t j = 0; j < columns; j += LANES) {
                const real* from = A + i * stride + j;
                const vec both = rounded(load(from), load(from + stride));
                store(to + i / 2 * columns + j, (vec)__builtin_shuffle((halves)both, order));
            }
    }

    // ROWS x (COLUMNS vectors) of C = beta C + A B, in registers. `PAIRED`: k counts pairs of bfloat16.
    template <int COLUMNS, bool PAIRED>
    static INLINE void block(int64_t k_begin, int64_t k_end, const real* A, int64_t a_row, int64_t a_column,
                             const real* B, int64_t b_row, real* C, int64_t c_row, real beta) {
        vec sums[ROWS][COLUMNS];
        for (int i = 0; i < ROWS; i++)
            for (int n = 0; n < COLUMNS; n++) sums[i][n] = vec{};
        for (int64_t k = k_begin; k < k_end; k++) {
            vec b[COLUMNS];
            for (int n = 0; n < COLUMNS; n++) b[n] = load(B + k * b_row + n * LANES);
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; i++) {
                if constexpr (PAIRED) {
                    const lanes a = lanes{} + same_bits<int32_t>(A[i * a_row + k * a_column]);
                    for (int n = 0; n < COLUMNS; n++) sums[i][n] = add_pairs(sums[i][n], (vec)a, b[n]);
                } else {
                    const real a = A[i * a_row + k * a_column];
                    for (int n = 0; n < COLUMNS; n++) sums[i][n] += a * b[n];
                }
            }
        }
        for (int i = 0; i < ROWS; i++)
            for (int n = 0; n < COLUMNS; n++) {
                real* c = C + i * c_row + n * LANES;
                store(c, beta == 0 ? sums[i][n] : beta * load(c) + sums[i][n]);
            }
    }

    // C [M, N] = beta C + A [M, inner] B [inner, N]; M is a multiple of ROWS, N of LANES, `inner` of PAD if PAIRED.
    // One of `a_row` and `a_column` is 1.
    template <Shape SHAPE, bool PAIRED = PAIRS>
    INLINE void product(int64_t M, int64_t N, int64_t inner, const real* A, int64_t a_row, int64_t a_column,
                        const real* B, int64_t b_row, real* C, int64_t c_row, real beta) {
        constexpr int64_t TOGETHER = PAIRED ? 2 : 1;
        if constexpr (PAIRED) {
            real *a = pairs, *b = pairs + M * inner / 2;
            a_column == 1 ? pair_columns(A, M, inner, a_row, a) : pair_rows(A, inner, M, a_column, a);
            a_column == 1 ? (void)(a_row = inner / 2) : (void)(a_column = M);
            pair_rows(B, inner, N, b_row, b);
            A = a, B = b, b_row = N;
        }
        for (int64_t m = 0; m < M; m += ROWS) {
            const int64_t k_begin = SHAPE == UPPER_A ? m / TOGETHER : 0;
            const int64_t k_end = (SHAPE == LOWER_A && m + ROWS < inner ? m + ROWS : inner) / TOGETHER;
            const int64_t columns = SHAPE == LOWER_RESULT ? round_up(m + ROWS, LANES) : N;
            const real* a = A + m * a_row;
            real* c = C + m * c_row;
            int64_t n = 0;
            for (; n + 2 * LANES <= columns; n += 2 * LANES)
                block<2, PAIRED>(k_begin, k_end, a, a_row, a_column, B + n, b_row, c + n, c_row, beta);
            if (n < columns) block<1, PAIRED>(k_begin, k_end, a, a_row, a_column, B + n, b_row, c + n, c_row, beta);
        }
    }

    static INLINE real sum(vec value) {
        real total = 0;
        for (int i = 0; i < LANES; i++) total += value[i];
        return total;
    }

    static INLINE real dot(const real* a, const real* b, int64_t size) {
        vec sums{};
        for (int64_t i = 0; i < size; i += LANES) sums += load(a + i) * load(b + i);
        return sum(sums);
    }

    // exp of it is 0: a memory that decays by it, or by more, is wiped. It stands for all logarithms below it, since
    // the difference of two infinite sums is no number.
    static constexpr real NOTHING = sizeof(real) == 4 ? -104 : -746;
    // Elements on the stack of a thread that takes one token of one head; more are on the heap.
    static constexpr int64_t LOCAL = 4096;

    static INLINE bool is_finite(real value) { return value - value == 0; }

    static INLINE bool are_finite(const real* values, int64_t size) {
        vec nothing{};
        for (int64_t i = 0; i < size; i += LANES) nothing += load(values + i) * 0;
        return is_finite(sum(nothing));
    }

    // Sizes, the padded ones a multiple of PAD; pads are zero wherever they could be seen.
    int64_t C, K, V, R, Cp, Kp, Vp, length;
    int64_t direction;  // of time: 1, or -1 in the backward pass
    bool wipes;         // whether a memory of the chunk may be wiped
    real *q, *k, *v, *qT, *kT, *vT;      // [Cp, Kp], [Cp, Vp] and transposed
    real *scores, *inside, *weights;     // [Cp, Cp]
    real *scaled;                        // [Cp, max(Kp, Vp)] or [Kp, Cp]
    real *sums, *denominators;           // [Cp, Vp], [Cp]
    real *from_start, *to_end, *from_center, *to_center;                  // [R, Cp]
    real *read_state, *write_state, *read_inside, *write_inside, *decay;  // [R, Cp], decay [R]
    real *memory, *normalizer;                                            // [R, Kp, Vp], [R, Kp]
    real* pairs;                                                          // operands of a product, as bfloat16
    // Backward only.
    real *g, *gT, *grad_denominator;           // [Cp, Vp], [Vp, Cp], [Cp]
    real *grad_weights, *grad_inside;          // [Cp, Cp]
    real *grad_q, *grad_k, *grad_v;            // [Cp, Kp], [Cp, Vp]
    real *grad_qT, *grad_kT;                   // [Kp, Cp]
    real *grad_read_state, *grad_write_state, *grad_read_inside, *grad_write_inside;  // [R, Cp]
    real *start_memory, *start_normalizer;     // [R, Kp, Vp], [R, Kp]
    // The delta rule only.
    real *hold_state, *hold_inside;            // [R, Cp], the weights of reads of what is held for a key
    real *system, *steps;                      // -A [Cp, Cp], [Cp]
    real *errors;                              // [Cp, Vp]; `v` has the changes, steps times errors
    // Backward only: gradients of the output and of what was missing, one below the other, and transposed.
    real *both, *bothT, *wide;                 // [2 Cp, Vp], [Vp, 2 Cp], [Kp, 2 Cp]
    real *key_scores, *holding;                // [Cp, Cp]
    real *grad_hold_state, *grad_hold_inside;  // [R, Cp]

    INLINE real* take(real*& free, int64_t size) {
        real* taken = free;
        free += round_up(size, 64 / sizeof(real));
        return taken;
    }

    // Lays the buffers out from `free` on; with null, only counts. Returns the number of elements.
    INLINE int64_t layout(const Problem& p, real* base, bool backward) {
        C = p.chunk, K = p.key_size, V = p.value_size, R = p.memories;
        Cp = round_up(C, PAD), Kp = round_up(K, PAD), Vp = round_up(V, PAD);
        direction = backward ? -1 : 1;
        const int64_t wide = Kp > Vp ? Kp : Vp;
        real* free = base;
        q = take(free, Cp * Kp), k = take(free, Cp * Kp), v = take(free, Cp * Vp);
        qT = take(free, Cp * Kp), kT = take(free, Cp * Kp);
        scores = take(free, Cp * Cp), inside = take(free, Cp * Cp), weights = take(free, Cp * Cp);
        scaled = take(free, Cp * wide), sums = take(free, Cp * wide), denominators = take(free, Cp);
        from_start = take(free, R * Cp), to_end = take(free, R * Cp);
        from_center = take(free, R * Cp), to_center = take(free, R * Cp);
        read_state = take(free, R * Cp), write_state = take(free, R * Cp);
        read_inside = take(free, R * Cp), write_inside = take(free, R * Cp), decay = take(free, R);
        memory = take(free, R * Kp * Vp), normalizer = take(free, R * Kp);
        const int64_t widest = Cp > wide ? Cp : wide;
        pairs = take(free, PAIRS ? 2 * widest * widest : 0);
        if (backward) {
            vT = take(free, Cp * Vp), g = take(free, Cp * Vp), gT = take(free, Cp * Vp);
            grad_denominator = take(free, Cp);
            grad_weights = take(free, Cp * Cp), grad_inside = take(free, Cp * Cp);
            grad_q = take(free, Cp * Kp), grad_k = take(free, Cp * Kp), grad_v = take(free, Cp * Vp);
            grad_qT = take(free, Cp * Kp), grad_kT = take(free, Cp * Kp);
            grad_read_state = take(free, R * Cp), grad_write_state = take(free, R * Cp);
            grad_read_inside = take(free, R * Cp), grad_write_inside = take(free, R * Cp);
            start_memory = take(free, R * Kp * Vp), start_normalizer = take(free, R * Kp);
        }
        if (p.step_size.data) {
            hold_state = take(free, R * Cp), hold_inside = take(free, R * Cp);
            system = take(free, Cp * Cp), steps = take(free, Cp), errors = take(free, Cp * Vp);
            if (backward) {
                both = take(free, 2 * Cp * Vp), bothT = take(free, 2 * Cp * Vp), this->wide = take(free, 2 * Cp * Kp);
                key_scores = take(free, Cp * Cp), holding = take(free, Cp * Cp);
                grad_hold_state = take(free, R * Cp), grad_hold_inside = take(free, R * Cp);
            }
        }
        return free - base;
    }

    // `size` numbers to a row of `padded`, zeros behind.
    template <class source>
    static INLINE void load_row(real* row, const source* from, int64_t size, int64_t padded) {
        int64_t j = 0;
        for (; j + LANES <= size; j += LANES) store(row + j, load(from + j));
        for (; j < size; j++) row[j] = number(from[j]);
        for (; j < padded; j++) row[j] = 0;
    }

    // Asks for the row that the next chunk will need: rows of one head are too far apart for the hardware to guess.
    INLINE void prefetch(const token* row, const Tokens& tokens, int64_t size) const {
        const token* next = row + direction * C * tokens.time;
        for (int64_t j = 0; j < size; j += 64 / sizeof(token)) __builtin_prefetch(next + j, 0, 2);
    }

    // Asks for the rows of this chunk that will be written.
    INLINE void prefetch_written(const Tokens& tokens, int64_t b, int64_t t, int64_t h, int64_t size) const {
        for (int64_t i = 0; i < length; i++) {
            const token* row = at<token>(tokens, b, t + i, h);
            for (int64_t j = 0; j < size; j += 64 / sizeof(token)) __builtin_prefetch(row + j, 1, 2);
        }
    }

    // Tokens [length, size] to a tile [Cp, padded], zeros around.
    INLINE void load_tile(real* tile, const Tokens& tokens, int64_t b, int64_t t, int64_t h, int64_t size,
                          int64_t padded) {
        for (int64_t i = 0; i < Cp; i++) {
            const token* row = i < length ? at<token>(tokens, b, t + i, h) : nullptr;
            load_row(tile + i * padded, row, row ? size : 0, padded);
            if (row) prefetch(row, tokens, size);
        }
    }

    // [rows, columns] to [columns, rows], whose rows are `stride` apart; both multiples of PAD. Tiles are transposed in registers: in step d, lanes
    // that differ in bit d change places with rows that do (Eklundh 1972).
    static INLINE void transpose(const real* from, int64_t rows, int64_t columns, real* to, int64_t stride = 0) {
        typedef real row __attribute__((vector_size(TILE * sizeof(real)), aligned(sizeof(real)), may_alias));
        typedef integer places __attribute__((vector_size(TILE * sizeof(real))));
        const places even[3] = {
            {0, 8, 2, 10, 4, 12, 6, 14}, {0, 1, 8, 9, 4, 5, 12, 13}, {0, 1, 2, 3, 8, 9, 10, 11}};
        const places odd[3] = {
            {1, 9, 3, 11, 5, 13, 7, 15}, {2, 3, 10, 11, 6, 7, 14, 15}, {4, 5, 6, 7, 12, 13, 14, 15}};
        for (int64_t i = 0; i < rows; i += TILE)
            for (int64_t j = 0; j < columns; j += TILE) {
                row x[TILE];
                for (int n = 0; n < TILE; n++) x[n] = *reinterpret_cast<const row*>(from + (i + n) * columns + j);
#pragma GCC unroll 3
                for (int step = 0; step < 3; step++)
#pragma GCC unroll 8
                    for (int n = 0; n < TILE; n++)
                        if (!(n >> step & 1)) {
                            const row a = x[n], b = x[n + (1 << step)];
                            x[n] = __builtin_shuffle(a, b, even[step]);
                            x[n + (1 << step)] = __builtin_shuffle(a, b, odd[step]);
                        }
                for (int n = 0; n < TILE; n++) *reinterpret_cast<row*>(to + (j + n) * (stride ? stride : rows) + i) = x[n];
            }
    }

    // A dense state [R, K, V], [R, K] to and from the padded one.
    INLINE void load_state(const real* from, const real* from_normalizer, real* to, real* to_normalizer) const {
        for (int64_t row = 0; row < R * Kp; row++) {
            const int64_t r = row / Kp, key = row % Kp;
            load_row(to + row * Vp, from + (r * K + key) * V, key < K ? V : 0, Vp);
            if (from_normalizer) to_normalizer[row] = key < K ? from_normalizer[r * K + key] : 0;
        }
    }

    INLINE void store_state(const real* from, const real* from_normalizer, real* to, real* to_normalizer) const {
        for (int64_t r = 0; r < R; r++) {
            for (int64_t key = 0; key < K; key++)
                std::memcpy(to + (r * K + key) * V, from + (r * Kp + key) * Vp, V * sizeof(real));
            if (to_normalizer) std::memcpy(to_normalizer + r * K, from_normalizer + r * Kp, K * sizeof(real));
        }
    }

    // The tiles of one chunk and the exponentials of its gates: `_Gates` of memory_bank.py.
    INLINE void begin(const Problem& p, int64_t b, int64_t t, int64_t h) {
        length = p.time - t < C ? p.time - t : C;
        load_tile(q, p.query, b, t, h, K, Kp);
        load_tile(k, p.key, b, t, h, K, Kp);
        wipes = false;
        for (int64_t r = 0; r < R; r++) {
            real first = 0, total = 0;
            for (int64_t i = 0; i < length; i++) {
                const real log_decay = at<real>(p.log_decay, b, t + i, h)[r];
                total += log_decay < NOTHING ? NOTHING : log_decay;
                if (i == 0) first = total;
                from_start[r * Cp + i] = total;  // for now its logarithm
            }
            wipes |= total <= NOTHING;
            real least = total;
            if (!(total <= first)) {  // where a later token is no number, the tokens before it are
                least = first;
                for (int64_t i = 0; i < length; i++)
                    if (from_start[r * Cp + i] < least) least = from_start[r * Cp + i];
            }
            const real center = (first + least) / 2;
            const real enter = std::exp(center), leave = std::exp(total - center);
            decay[r] = std::exp(total);
            for (int64_t i = 0; i < Cp; i++) {
                const int64_t n = r * Cp + i;
                if (i >= length) {
                    from_start[n] = to_end[n] = from_center[n] = to_center[n] = 0;
                    read_state[n] = write_state[n] = read_inside[n] = write_inside[n] = 0;
                    continue;
                }
                from_center[n] = std::exp(from_start[n] - center);
                to_center[n] = 1 / from_center[n];
                from_start[n] = from_center[n] * enter;
                to_end[n] = to_center[n] * leave;
                const real read = at<real>(p.read, b, t + i, h)[r], write = at<real>(p.write, b, t + i, h)[r];
                read_state[n] = read * from_start[n], write_state[n] = write * to_end[n];
                read_inside[n] = read * from_center[n], write_inside[n] = write * to_center[n];
            }
        }
        transpose(k, Cp, Kp, kT);
        product<LOWER_RESULT>(Cp, Cp, Kp, q, Kp, 1, kT, Cp, scores, Cp, 0);
        product<LOWER_RESULT, false>(Cp, Cp, R, read_inside, 1, Cp, write_inside, Cp, inside, Cp, 0);
        causal_weights(scores, inside, 0, weights);
    }

    // to = a * b, for the tokens up to `before` tokens before each; what is left out of `b` is 0, too. Rows go up to the end
    // of the diagonal's tile, where products that skip what is zero still look. Later tokens are set to 0, and not
    // multiplied with it: they may be no numbers.
    INLINE void causal_weights(const real* a, real* b, int64_t before, real* to) const {
        lanes number;
        for (int n = 0; n < LANES; n++) number[n] = n;
        for (int64_t i = 0; i < Cp; i++)
            for (int64_t j = 0; j < round_up(i + 1, PAD); j += LANES) {
                const int64_t n = i * Cp + j;
                const lanes kept = number <= static_cast<integer>(i - j - before);
                const vec part = load(b + n);
                store(b + n, (vec)((lanes)part & kept));
                store(to + n, (vec)((lanes)(part * load(a + n)) & kept));
            }
    }

    // Adds the reads of the chunk's own tokens to `sums`. A plain product multiplies later values by 0, which is NaN for
    // values that are not finite: such values are left out of it, and added to the tokens from their own on. The last
    // token tells whether there are any: its sums are of all values.
    template <class Restore>
    INLINE void read_chunk(Restore restore) {
        for (bool again = false;; again = true) {
            product<LOWER_A>(Cp, Vp, Cp, weights, Cp, 1, v, Vp, sums, Vp, 0);
            if (again) break;
            if (are_finite(sums + (length - 1) * Vp, Vp)) return;
            for (int64_t n = 0; n < Cp * Vp; n++) v[n] = is_finite(v[n]) ? v[n] : 0;
        }
        restore();
        for (int64_t j = 0; j < length; j++)
            for (int64_t n = 0; n < V; n++)
                if (!is_finite(v[j * Vp + n]))
                    for (int64_t i = j; i < length; i++) sums[i * Vp + n] += weights[i * Cp + j] * v[j * Vp + n];
    }

    // rows [count, width] = source times a factor for each row or for each column.
    static INLINE void scale_rows(const real* source, const real* factors, int64_t count, int64_t width, real* rows) {
        for (int64_t i = 0; i < count; i++)
            for (int64_t j = 0; j < width; j += LANES) store(rows + i * width + j, factors[i] * load(source + i * width + j));
    }
    static INLINE void scale_columns(const real* source, const real* factors, int64_t count, int64_t width,
                                     real* rows) {
        for (int64_t i = 0; i < count; i++)
            for (int64_t j = 0; j < width; j += LANES) store(rows + i * width + j, load(factors + j) * load(source + i * width + j));
    }

    // The state after the chunk, from that before it.
    INLINE void write_chunk() {
        for (int64_t r = 0; r < R; r++) {
            scale_columns(kT, write_state + r * Cp, Kp, Cp, scaled);
            product<FULL>(Kp, Vp, Cp, scaled, Cp, 1, v, Vp, memory + r * Kp * Vp, Vp, decay[r]);
            for (int64_t key = 0; key < Kp; key++) {
                vec total{};
                for (int64_t j = 0; j < Cp; j += LANES) total += load(scaled + key * Cp + j);
                normalizer[r * Kp + key] = decay[r] * normalizer[r * Kp + key] + sum(total);
            }
        }
    }

    // One token of one head: the recurrence itself, in one pass over the state [R, K, V], [R, K]. Returns the denominator
    // of the `sums` [V].
    static INLINE real recur(int64_t R, int64_t K, int64_t V, const real* query, const real* key, const real* value,
                             const real* read, const real* write, const real* log_decay, const real* memory,
                             const real* normalizer, real* new_memory, real* new_normalizer, real* __restrict sums) {
        real denominator = 0;
        for (int64_t j = 0; j < V; j++) sums[j] = 0;
        for (int64_t r = 0; r < R; r++) {
            const real decay = std::exp(log_decay[r]);
            for (int64_t row = r * K; row < (r + 1) * K; row++) {
                const real written = write[r] * key[row - r * K], weight = read[r] * query[row - r * K];
                const real key_sum = decay * normalizer[row] + written;
                new_normalizer[row] = key_sum;
                denominator += weight * key_sum;
                const real* from = memory + row * V;
                real* to = new_memory + row * V;
#pragma GCC ivdep
                for (int64_t j = 0; j < V; j++) {  // may be in place
                    const real kept = decay * from[j] + written * value[j];
                    to[j] = kept;
                    sums[j] += weight * kept;
                }
            }
        }
        return denominator;
    }

    // One token of one head of the delta rule: one pass over the state [R, K, V] reads it, and one corrects it.
    static INLINE void correct(int64_t R, int64_t K, int64_t V, const real* query, const real* key, const real* value,
                               const real* read, const real* write, const real* log_decay, real step_size,
                               const real* memory, real* new_memory, real* __restrict held, real* __restrict sums) {
        for (int64_t j = 0; j < V; j++) held[j] = sums[j] = 0;
        real along = 0;  // of the query on the key, over all memories
        for (int64_t r = 0; r < R; r++) {
            const real decay = std::exp(log_decay[r]);
            for (int64_t row = r * K; row < (r + 1) * K; row++) {
                const real weight = read[r] * query[row - r * K], written = write[r] * key[row - r * K];
                const real *from = memory + row * V, kept_weight = decay * weight, kept_written = decay * written;
                along += weight * written;
#pragma GCC ivdep
                for (int64_t j = 0; j < V; j++) {
                    sums[j] += kept_weight * from[j];
                    held[j] += kept_written * from[j];
                }
            }
        }
        for (int64_t j = 0; j < V; j++) {
            held[j] = step_size * (value[j] - held[j]);  // the change
            sums[j] += along * held[j];
        }
        for (int64_t r = 0; r < R; r++) {
            const real decay = std::exp(log_decay[r]);
            for (int64_t row = r * K; row < (r + 1) * K; row++) {
                const real written = write[r] * key[row - r * K];
                const real* from = memory + row * V;
                real* to = new_memory + row * V;
#pragma GCC ivdep
                for (int64_t j = 0; j < V; j++) to[j] = decay * from[j] + written * held[j];  // may be in place
            }
        }
    }

    static INLINE void step(const Problem& p, int64_t b, int64_t h) {
        const int64_t K = p.key_size, V = p.value_size, states = (b * p.heads + h) * p.memories * K;
        real query[K], key[K], value[V], sums[V], held[V];
        load_row(query, at<token>(p.query, b, 0, h), K, K);
        load_row(key, at<token>(p.key, b, 0, h), K, K);
        load_row(value, at<token>(p.value, b, 0, h), V, V);
        if (p.step_size.data) {
            correct(p.memories, K, V, query, key, value, at<real>(p.read, b, 0, h), at<real>(p.write, b, 0, h),
                    at<real>(p.log_decay, b, 0, h), *at<real>(p.step_size, b, 0, h),
                    static_cast<real*>(p.memory) + states * V, static_cast<real*>(p.final_memory) + states * V, held,
                    sums);
            token* output = at<token>(p.output, b, 0, h);
            for (int64_t j = 0; j < V; j++) assign(output[j], sums[j]);
            return;
        }
        real denominator = recur(
            p.memories, K, V, query, key, value, at<real>(p.read, b, 0, h), at<real>(p.write, b, 0, h),
            at<real>(p.log_decay, b, 0, h), static_cast<real*>(p.memory) + states * V,
            static_cast<real*>(p.normalizer) + states, static_cast<real*>(p.final_memory) + states * V,
            static_cast<real*>(p.final_normalizer) + states, sums);
        denominator += static_cast<real>(p.eps);
        *at<real>(p.denominator, b, 0, h) = denominator;
        token* output = at<token>(p.output, b, 0, h);
        for (int64_t j = 0; j < V; j++) assign(output[j], sums[j] / denominator);
    }

    // `Step` for one head of one row; false if there was no memory for it.
    static INLINE bool mix(const Step& p, int64_t head) {
        const int64_t F = p.size, R = p.levels * p.banks, count = 5 * F + 3 * R;
        if (count <= LOCAL) {
            real work[LOCAL];
            mix(p, head, work);
            return true;
        }
        real* work = static_cast<real*>(std::malloc(count * sizeof(real)));
        if (!work) return false;
        mix(p, head, work);
        std::free(work);
        return true;
    }

    // The same, with 5 F + 3 R elements of work space.
    static INLINE void mix(const Step& p, int64_t head, real* work) {
        const int64_t b = head / p.heads, h = head % p.heads, F = p.size, S = p.levels, N = p.banks, R = S * N;
        const int64_t row = p.rows ? p.rows[b] : b, states = (row * p.heads + h) * R * F;
        real *features = work, *sums = work + 3 * F, *held = sums + F;
        convolve(p, b, h, row, features);
        // The memories of each level have the pointer's weight there.
        real *read = held + F, *write = read + R, *log_decay = write + R;
        for (int64_t r = 0; r < R; r++) {
            const real weight = static_cast<const real*>(p.pointer)[b * S + r / N];
            const int64_t bank = head * N + r % N;
            read[r] = weight * static_cast<const real*>(p.read)[bank];
            write[r] = weight * static_cast<const real*>(p.write)[bank];
            log_decay[r] = weight * static_cast<const real*>(p.log_decay)[bank];
        }
        const real* memory = static_cast<const real*>(p.memory) + states * F;
        real *new_memory = static_cast<real*>(p.new_memory) + states * F, scale = 1;
        if (p.step_size) {
            for (int64_t j = 0; j < 3 * F; j++) features[j] /= 1 + std::exp(-features[j]);  // SiLU
            normalise(features, F), normalise(features + F, F);
            correct(R, F, F, features, features + F, features + 2 * F, read, write, log_decay,
                    static_cast<const real*>(p.step_size)[head], memory, new_memory, held, sums);
        } else {
            if (p.feature_map)
                for (int64_t j = 0; j < 2 * F; j++) features[j] = std::exp(features[j] > 20 ? 20 : features[j]);
            else  // elu + 1
                for (int64_t j = 0; j < 2 * F; j++) features[j] = features[j] > 0 ? features[j] + 1 : std::exp(features[j]);
            const real denominator =
                recur(R, F, F, features, features + F, features + 2 * F, read, write, log_decay, memory,
                      static_cast<const real*>(p.normalizer) + states, new_memory,
                      static_cast<real*>(p.new_normalizer) + states, sums);
            scale = 1 / (denominator + static_cast<real>(p.eps));
        }

        real square = 0;
        for (int64_t j = 0; j < F; j++) sums[j] *= scale, square += sums[j] * sums[j];
        const real norm = 1 / std::sqrt(square / F + static_cast<real>(p.norm_eps));
        const int64_t width = p.heads * F;
        for (int64_t j = 0; j < F; j++) {
            const real gate = number(static_cast<const token*>(p.gate)[b * width + h * F + j]);
            const real weight = number(static_cast<const token*>(p.norm_weight)[j]);
            assign(static_cast<token*>(p.output)[b * width + h * F + j],
                   sums[j] * norm * weight * gate / (1 + std::exp(-gate)));
        }
    }

    // The convolution of a head's query, key and value [3, F] with their past, which moves on by one.
    static INLINE void convolve(const Step& p, int64_t b, int64_t h, int64_t row, real* features) {
        const int64_t F = p.size, width = p.heads * F, channels = 3 * width, history = p.taps - 1;
        for (int64_t part = 0; part < 3; part++) {
            const int64_t first = part * width + h * F;
            const token* projected = static_cast<const token*>(p.projected) + b * channels + first;
            const token* taps = static_cast<const token*>(p.conv_weight) + first * p.taps;
            const real* past = static_cast<const real*>(p.past) + row * history * channels + first;
            real* new_past = static_cast<real*>(p.new_past) + row * history * channels + first;
            real* to = features + part * F;
            for (int64_t j = 0; j < F; j++) to[j] = number(projected[j]) * number(taps[j * p.taps + history]);
            for (int64_t t = 0; t < history; t++)
                for (int64_t j = 0; j < F; j++) {
                    to[j] += past[t * channels + j] * number(taps[j * p.taps + t]);
                    new_past[t * channels + j] =
                        t + 1 < history ? past[(t + 1) * channels + j] : real(number(projected[j]));
                }
        }
    }

    // Scales a vector to length 1, as torch's `normalize` does.
    static INLINE void normalise(real* vector, int64_t size) {
        real square = 0;
        for (int64_t j = 0; j < size; j++) square += vector[j] * vector[j];
        const real length = std::sqrt(square), least = static_cast<real>(1e-12);
        for (int64_t j = 0; j < size; j++) vector[j] /= length > least ? length : least;
    }

    INLINE void forward(const Problem& p, int64_t b, int64_t h) {
        const int64_t chunks = (p.time + C - 1) / C, head = b * p.heads + h;
        const int64_t size = R * K * V, keys = R * K;
        load_state(static_cast<real*>(p.memory) + head * size, static_cast<real*>(p.normalizer) + head * keys, memory,
                   normalizer);
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            const int64_t t = chunk * C;
            begin(p, b, t, h);
            load_tile(v, p.value, b, t, h, V, Vp);
            if (p.start_memory)
                store_state(memory, normalizer, static_cast<real*>(p.start_memory) + (head * chunks + chunk) * size,
                            static_cast<real*>(p.start_normalizer) + (head * chunks + chunk) * keys);
            prefetch_written(p.output, b, t, h, V);
            read_chunk([&] { load_tile(v, p.value, b, t, h, V, Vp); });
            for (int64_t i = 0; i < Cp; i++) {
                vec total{};
                for (int64_t j = 0; j <= i; j += LANES) total += load(weights + i * Cp + j);
                denominators[i] = sum(total) + static_cast<real>(p.eps);
            }
            for (int64_t r = 0; r < R; r++) {
                scale_rows(q, read_state + r * Cp, Cp, Kp, scaled);
                product<FULL>(Cp, Vp, Kp, scaled, Kp, 1, memory + r * Kp * Vp, Vp, sums, Vp, 1);
                for (int64_t i = 0; i < length; i++) denominators[i] += dot(scaled + i * Kp, normalizer + r * Kp, Kp);
            }
            for (int64_t i = 0; i < length; i++) {
                token* output = at<token>(p.output, b, t + i, h);
                const real scale = 1 / denominators[i];
                for (int64_t j = 0; j < V; j++) assign(output[j], sums[i * Vp + j] * scale);
                *at<real>(p.denominator, b, t + i, h) = denominators[i];
            }
            write_chunk();
        }
        store_state(memory, normalizer, static_cast<real*>(p.final_memory) + head * size,
                    static_cast<real*>(p.final_normalizer) + head * keys);
    }

    // grad += transposed, over the tokens of a [Cp, Kp] and a [Kp, Cp].
    INLINE void store_gradient(const Tokens& tokens, int64_t b, int64_t t, int64_t h, const real* gradient,
                               const real* transposed, int64_t size, int64_t padded) {
        if (transposed) transpose(transposed, padded, Cp, scaled);
        for (int64_t i = 0; i < length; i++) {
            token* to = at<token>(tokens, b, t + i, h);
            for (int64_t j = 0; j < size; j++)
                assign(to[j], gradient[i * padded + j] + (transposed ? scaled[i * padded + j] : 0));
        }
    }

    // `memory` and `normalizer` hold the gradients of the state after the chunk, then of that before it.
    INLINE void backward_chunk(const Problem& p, int64_t b, int64_t t, int64_t h) {
        begin(p, b, t, h);
        load_tile(v, p.value, b, t, h, V, Vp);
        transpose(q, Cp, Kp, qT);
        transpose(v, Cp, Vp, vT);
        load_tile(g, p.grad_output, b, t, h, V, Vp);
        for (int64_t i = 0; i < Cp; i++) {
            real along = 0;
            if (i < length) {
                const real scale = 1 / *at<real>(p.denominator, b, t + i, h);
                const token* output = at<token>(p.output, b, t + i, h);
                prefetch(output, p.output, V);
                load_row(sums, output, V, Vp);
                for (int64_t j = 0; j < Vp; j += LANES) store(g + i * Vp + j, scale * load(g + i * Vp + j));
                along = -dot(g + i * Vp, sums, Vp);
            }
            grad_denominator[i] = along;
        }
        transpose(g, Cp, Vp, gT);

        // Inside the chunk.
        product<LOWER_RESULT>(Cp, Cp, Vp, g, Vp, 1, vT, Cp, grad_weights, Cp, 0);
        for (int64_t i = 0; i < Cp; i++) {
            const int64_t row = i * Cp;
            for (int64_t j = 0; j < round_up(i + 1, PAD); j++) {
                const real gradient = j <= i ? grad_weights[row + j] + grad_denominator[i] : 0;
                grad_inside[row + j] = gradient * scores[row + j];
                scores[row + j] = gradient * inside[row + j];  // the gradient of the scores from here on
            }
        }
        product<LOWER_A>(Cp, Kp, Cp, scores, Cp, 1, k, Kp, grad_q, Kp, 0);
        product<UPPER_A>(Cp, Kp, Cp, scores, 1, Cp, q, Kp, grad_k, Kp, 0);
        product<UPPER_A>(Cp, Vp, Cp, weights, 1, Cp, g, Vp, grad_v, Vp, 0);
        std::memset(grad_write_inside, 0, R * Cp * sizeof(real));
        through_gates(grad_inside, read_inside, grad_read_inside);

        // Through the states.
        prefetch_written(p.grad_query, b, t, h, K);
        prefetch_written(p.grad_key, b, t, h, K);
        prefetch_written(p.grad_value, b, t, h, V);
        std::memset(grad_qT, 0, Cp * Kp * sizeof(real));
        std::memset(grad_kT, 0, Cp * Kp * sizeof(real));
        for (int64_t r = 0; r < R; r++) {
            const real *start = start_memory + r * Kp * Vp, *start_keys = start_normalizer + r * Kp;
            real *grad_memory = memory + r * Kp * Vp, *grad_keys = normalizer + r * Kp;
            product<FULL>(Kp, Cp, Vp, start, Vp, 1, gT, Cp, scaled, Cp, 0);
            through_state(scaled, Cp, start_keys, grad_denominator, read_state + r * Cp, qT, grad_qT,
                          grad_read_state + r * Cp);
            product<FULL>(Kp, Cp, Vp, grad_memory, Vp, 1, vT, Cp, scaled, Cp, 0);
            through_state(scaled, Cp, grad_keys, nullptr, write_state + r * Cp, kT, grad_kT, grad_write_state + r * Cp);
            scale_rows(k, write_state + r * Cp, Cp, Kp, scaled);
            product<FULL>(Cp, Vp, Kp, scaled, Kp, 1, grad_memory, Vp, grad_v, Vp, 1);

            const real grad_decay =
                decay[r] * (dot(start, grad_memory, Kp * Vp) + dot(start_keys, grad_keys, Kp));
            scale_columns(qT, read_state + r * Cp, Kp, Cp, scaled);
            product<FULL>(Kp, Vp, Cp, scaled, Cp, 1, g, Vp, grad_memory, Vp, decay[r]);
            for (int64_t key = 0; key < Kp; key++)
                grad_keys[key] = decay[r] * grad_keys[key] + dot(scaled + key * Cp, grad_denominator, Cp);

            // Every exponential is its own derivative; the midpoint cancels.
            real leaving = 0, later = 0;
            for (int64_t i = 0; i < length; i++) leaving += grad_write_state[r * Cp + i] * write_state[r * Cp + i];
            for (int64_t i = length - 1; i >= 0; i--) {
                const int64_t n = r * Cp + i;
                at<real>(p.grad_read, b, t + i, h)[r] =
                    grad_read_inside[n] * from_center[n] + grad_read_state[n] * from_start[n];
                at<real>(p.grad_write, b, t + i, h)[r] =
                    grad_write_inside[n] * to_center[n] + grad_write_state[n] * to_end[n];
                if (i == length - 1) later += leaving + grad_decay;
                later += grad_read_inside[n] * read_inside[n] + grad_read_state[n] * read_state[n] -
                         grad_write_inside[n] * write_inside[n] - grad_write_state[n] * write_state[n];
                // No gradient passes a wiped memory; the sum has the rounding errors of terms that cancel.
                if (wipes && at<real>(p.log_decay, b, t + i, h)[r] <= NOTHING) later = 0;
                at<real>(p.grad_log_decay, b, t + i, h)[r] = later;
            }
        }
        store_gradient(p.grad_query, b, t, h, grad_q, grad_qT, K, Kp);
        store_gradient(p.grad_key, b, t, h, grad_k, grad_kT, K, Kp);
        store_gradient(p.grad_value, b, t, h, grad_v, nullptr, V, Vp);
    }

    // Gradients of the products of rank R of `reads` and `write_inside`, from that of their sum [Cp, Cp].
    INLINE void through_gates(const real* gradients, const real* reads, real* grad_reads) {
        for (int64_t r = 0; r < R; r++) {
            real *to_read = grad_reads + r * Cp, *to_write = grad_write_inside + r * Cp;
            for (int64_t i = 0; i < length; i++) {
                const real read = reads[r * Cp + i];
                vec total{};
                for (int64_t j = 0; j <= i; j += LANES) {
                    const vec gradient = load(gradients + i * Cp + j);
                    total += gradient * load(write_inside + r * Cp + j);
                    store(to_write + j, load(to_write + j) + read * gradient);
                }
                to_read[i] = sum(total);
            }
        }
    }

    // Gradients of factor[j] * features[., j] that met a state's column, `met` [Kp, Cp] with rows `stride` apart, and its key
    // sums, if there are any.
    INLINE void through_state(const real* met, int64_t stride, const real* keys, const real* scale, const real* factor,
                              const real* features, real* grad_features, real* grad_factor) {
        for (int64_t j = 0; j < Cp; j += LANES) {
            const vec by = load(factor + j), weight = scale ? load(scale + j) : vec{} + 1;
            vec total{};
            for (int64_t key = 0; key < Kp; key++) {
                const int64_t n = key * Cp + j;
                vec gradient = load(met + key * stride + j);
                if (keys) gradient += keys[key] * weight;
                store(grad_features + n, load(grad_features + n) + gradient * by);
                total += gradient * load(features + n);
            }
            store(grad_factor + j, total);
        }
    }

    INLINE void backward(const Problem& p, int64_t b, int64_t h) {
        const int64_t chunks = (p.time + C - 1) / C, head = b * p.heads + h;
        const int64_t size = R * K * V, keys = R * K;
        real* grad_memory = static_cast<real*>(p.final_memory) + head * size;
        real* grad_normalizer = static_cast<real*>(p.final_normalizer) + head * keys;
        load_state(grad_memory, grad_normalizer, memory, normalizer);
        for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
            load_state(static_cast<real*>(p.start_memory) + (head * chunks + chunk) * size,
                       static_cast<real*>(p.start_normalizer) + (head * chunks + chunk) * keys, start_memory,
                       start_normalizer);
            backward_chunk(p, b, chunk * C, h);
        }
        store_state(memory, normalizer, grad_memory, grad_normalizer);
    }

    // The delta rule, with `system` = -A, and in `v` what the tokens write.

    // What begin() does not know of: step sizes, reads of what is held for a key, and the triangular system.
    INLINE void begin_delta(const Problem& p, int64_t b, int64_t t, int64_t h, real* key_scores, real* holding) {
        begin(p, b, t, h);
        for (int64_t i = 0; i < Cp; i++) steps[i] = i < length ? *at<real>(p.step_size, b, t + i, h) : 0;
        for (int64_t r = 0; r < R; r++)
            for (int64_t i = 0; i < Cp; i++) {
                const real write = i < length ? at<real>(p.write, b, t + i, h)[r] : 0;
                hold_state[r * Cp + i] = -write * from_start[r * Cp + i];
                hold_inside[r * Cp + i] = -write * from_center[r * Cp + i];
            }
        product<LOWER_RESULT>(Cp, Cp, Kp, k, Kp, 1, kT, Cp, key_scores, Cp, 0);
        product<LOWER_RESULT, false>(Cp, Cp, R, hold_inside, 1, Cp, write_inside, Cp, holding, Cp, 0);
        causal_weights(key_scores, holding, 1, system);
    }

    // rows [ROWS, Vp] from `first` on += the rows [begin, end) of `solved`, weighted by the system, or by its transpose.
    template <bool TRANSPOSED>
    INLINE void add_solved(int64_t first, int64_t begin, int64_t end, const real* solved, real* rows) {
        if (begin == end) return;
        const real* A = TRANSPOSED ? system + begin * Cp + first : system + first * Cp + begin;
        product<FULL, false>(ROWS, Vp, end - begin, A, TRANSPOSED ? 1 : Cp, TRANSPOSED ? Cp : 1, solved + begin * Vp, Vp,
                             rows + first * Vp, Vp, 1);
    }

    // `errors` from what the state does not hold, which they have at first, and `v` from them: each row needs those before.
    INLINE void solve() {
        for (int64_t first = 0; first < Cp; first += ROWS) {
            add_solved<false>(first, 0, first, v, errors);
            for (int64_t i = first; i < first + ROWS; i++)
                for (int64_t n = 0; n < Vp; n += LANES) {
                    vec error = load(errors + i * Vp + n);
                    for (int64_t j = first; j < i; j++) error += system[i * Cp + j] * load(v + j * Vp + n);
                    store(errors + i * Vp + n, error);
                    store(v + i * Vp + n, steps[i] * error);
                }
        }
    }

    // The gradient of what was missing, to `to`, from that of what the tokens write, in `changes`, which becomes that of
    // the products of step size and error alone: each row needs those behind.
    INLINE void solve_backwards(real* changes, real* to) {
        for (int64_t first = Cp - ROWS; first >= 0; first -= ROWS) {
            add_solved<true>(first, first + ROWS, Cp, to, changes);
            for (int64_t i = first + ROWS - 1; i >= first; i--)
                for (int64_t n = 0; n < Vp; n += LANES) {
                    vec change = load(changes + i * Vp + n);
                    for (int64_t j = i + 1; j < first + ROWS; j++) change += system[j * Cp + i] * load(to + j * Vp + n);
                    store(changes + i * Vp + n, change);
                    store(to + i * Vp + n, steps[i] * change);
                }
        }
    }

    INLINE void forward_delta(const Problem& p, int64_t b, int64_t h) {
        const int64_t chunks = (p.time + C - 1) / C, head = b * p.heads + h, size = R * K * V;
        load_state(static_cast<real*>(p.memory) + head * size, nullptr, memory, nullptr);
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            const int64_t t = chunk * C;
            begin_delta(p, b, t, h, scores, inside);
            load_tile(errors, p.value, b, t, h, V, Vp);
            if (p.start_memory)
                store_state(memory, nullptr, static_cast<real*>(p.start_memory) + (head * chunks + chunk) * size, nullptr);
            prefetch_written(p.output, b, t, h, V);
            for (int64_t r = 0; r < R; r++) {
                scale_rows(k, hold_state + r * Cp, Cp, Kp, scaled);
                product<FULL>(Cp, Vp, Kp, scaled, Kp, 1, memory + r * Kp * Vp, Vp, errors, Vp, 1);
            }
            solve();
            read_chunk([&] {
                for (int64_t i = 0; i < Cp; i++)
                    for (int64_t j = 0; j < Vp; j++) v[i * Vp + j] = steps[i] * errors[i * Vp + j];
            });
            for (int64_t r = 0; r < R; r++) {
                scale_rows(q, read_state + r * Cp, Cp, Kp, scaled);
                product<FULL>(Cp, Vp, Kp, scaled, Kp, 1, memory + r * Kp * Vp, Vp, sums, Vp, 1);
            }
            for (int64_t i = 0; i < length; i++) {
                token* output = at<token>(p.output, b, t + i, h);
                for (int64_t j = 0; j < V; j++) assign(output[j], sums[i * Vp + j]);
                if (p.start_memory) std::memcpy(at<real>(p.errors, b, t + i, h), errors + i * Vp, V * sizeof(real));
            }
            for (int64_t r = 0; r < R; r++) {
                scale_columns(kT, write_state + r * Cp, Kp, Cp, scaled);
                product<FULL>(Kp, Vp, Cp, scaled, Cp, 1, v, Vp, memory + r * Kp * Vp, Vp, decay[r]);
            }
        }
        store_state(memory, nullptr, static_cast<real*>(p.final_memory) + head * size, nullptr);
    }

    // `memory` holds the gradient of the state after the chunk, then of that before it.
    INLINE void backward_delta(const Problem& p, int64_t b, int64_t t, int64_t h) {
        begin_delta(p, b, t, h, key_scores, holding);
        real *gradient = both, *missing = both + Cp * Vp;
        load_tile(gradient, p.grad_output, b, t, h, V, Vp);
        for (int64_t i = 0; i < Cp; i++) {
            load_row(errors + i * Vp, at<real>(p.errors, b, t + (i < length ? i : 0), h), i < length ? V : 0, Vp);
            for (int64_t n = 0; n < Vp; n += LANES) store(v + i * Vp + n, steps[i] * load(errors + i * Vp + n));
        }
        transpose(q, Cp, Kp, qT);
        transpose(v, Cp, Vp, vT);

        // Of what the tokens write, and of what was missing.
        product<UPPER_A>(Cp, Vp, Cp, weights, 1, Cp, gradient, Vp, g, Vp, 0);
        for (int64_t r = 0; r < R; r++) {
            scale_rows(k, write_state + r * Cp, Cp, Kp, scaled);
            product<FULL>(Cp, Vp, Kp, scaled, Kp, 1, memory + r * Kp * Vp, Vp, g, Vp, 1);
        }
        solve_backwards(g, missing);
        transpose_both();
        for (int64_t i = 0; i < length; i++) {
            *at<real>(p.grad_step_size, b, t + i, h) = dot(g + i * Vp, errors + i * Vp, Vp);
            token* to = at<token>(p.grad_value, b, t + i, h);
            for (int64_t j = 0; j < V; j++) assign(to[j], missing[i * Vp + j]);
        }

        // Inside the chunk: first the reads of the output, then those of what is held.
        product<LOWER_RESULT>(Cp, Cp, Vp, gradient, Vp, 1, vT, Cp, grad_weights, Cp, 0);
        causal_gradients(grad_weights, 0, scores, inside);
        std::memset(grad_write_inside, 0, R * Cp * sizeof(real));
        through_gates(grad_inside, read_inside, grad_read_inside);
        product<LOWER_A>(Cp, Kp, Cp, scores, Cp, 1, k, Kp, grad_q, Kp, 0);
        product<UPPER_A>(Cp, Kp, Cp, scores, 1, Cp, q, Kp, grad_k, Kp, 0);
        product<LOWER_RESULT>(Cp, Cp, Vp, missing, Vp, 1, vT, Cp, grad_weights, Cp, 0);
        causal_gradients(grad_weights, 1, key_scores, holding);
        through_gates(grad_inside, hold_inside, grad_hold_inside);
        product<LOWER_A>(Cp, Kp, Cp, key_scores, Cp, 1, k, Kp, grad_k, Kp, 1);
        product<UPPER_A>(Cp, Kp, Cp, key_scores, 1, Cp, k, Kp, grad_k, Kp, 1);

        // Through the states.
        prefetch_written(p.grad_query, b, t, h, K);
        prefetch_written(p.grad_key, b, t, h, K);
        std::memset(grad_qT, 0, Cp * Kp * sizeof(real));
        std::memset(grad_kT, 0, Cp * Kp * sizeof(real));
        for (int64_t r = 0; r < R; r++) {
            const real* start = start_memory + r * Kp * Vp;
            real *grad_memory = memory + r * Kp * Vp;
            product<FULL>(Kp, 2 * Cp, Vp, start, Vp, 1, bothT, 2 * Cp, wide, 2 * Cp, 0);
            through_state(wide, 2 * Cp, nullptr, nullptr, read_state + r * Cp, qT, grad_qT, grad_read_state + r * Cp);
            through_state(wide + Cp, 2 * Cp, nullptr, nullptr, hold_state + r * Cp, kT, grad_kT, grad_hold_state + r * Cp);
            product<FULL>(Kp, Cp, Vp, grad_memory, Vp, 1, vT, Cp, scaled, Cp, 0);
            through_state(scaled, Cp, nullptr, nullptr, write_state + r * Cp, kT, grad_kT, grad_write_state + r * Cp);
            const real grad_decay = decay[r] * dot(start, grad_memory, Kp * Vp);
            for (int64_t key = 0; key < Kp; key++)
                for (int64_t j = 0; j < Cp; j += LANES) {
                    real* to = wide + key * 2 * Cp + j;
                    store(to, load(read_state + r * Cp + j) * load(qT + key * Cp + j));
                    store(to + Cp, load(hold_state + r * Cp + j) * load(kT + key * Cp + j));
                }
            product<FULL>(Kp, Vp, 2 * Cp, wide, 2 * Cp, 1, both, Vp, grad_memory, Vp, decay[r]);

            // Every exponential is its own derivative; the midpoint cancels.
            real leaving = 0, later = 0;
            for (int64_t i = 0; i < length; i++) leaving += grad_write_state[r * Cp + i] * write_state[r * Cp + i];
            for (int64_t i = length - 1; i >= 0; i--) {
                const int64_t n = r * Cp + i;
                at<real>(p.grad_read, b, t + i, h)[r] =
                    grad_read_inside[n] * from_center[n] + grad_read_state[n] * from_start[n];
                at<real>(p.grad_write, b, t + i, h)[r] =
                    grad_write_inside[n] * to_center[n] + grad_write_state[n] * to_end[n] -
                    grad_hold_inside[n] * from_center[n] - grad_hold_state[n] * from_start[n];
                if (i == length - 1) later += leaving + grad_decay;
                later += grad_read_inside[n] * read_inside[n] + grad_read_state[n] * read_state[n] +
                         grad_hold_inside[n] * hold_inside[n] + grad_hold_state[n] * hold_state[n] -
                         grad_write_inside[n] * write_inside[n] - grad_write_state[n] * write_state[n];
                if (wipes && at<real>(p.log_decay, b, t + i, h)[r] <= NOTHING) later = 0;
                at<real>(p.grad_log_decay, b, t + i, h)[r] = later;
            }
        }
        store_gradient(p.grad_query, b, t, h, grad_q, grad_qT, K, Kp);
        store_gradient(p.grad_key, b, t, h, grad_k, grad_kT, K, Kp);
    }

    // `products` becomes the gradient of scores * inside's factor `scores`, and `grad_inside` that of the other one.
    INLINE void causal_gradients(const real* gradients, int64_t before, real* products, const real* gates) {
        for (int64_t i = 0; i < Cp; i++)
            for (int64_t j = 0; j < round_up(i + 1, PAD); j++) {
                const int64_t n = i * Cp + j;
                const real gradient = j <= i - before ? gradients[n] : 0;
                grad_inside[n] = gradient * products[n];
                products[n] = gradient * gates[n];
            }
    }

    INLINE void transpose_both() {
        // [Cp, Vp] twice to [Vp, 2 Cp]
        transpose(both, Cp, Vp, bothT, 2 * Cp);
        transpose(both + Cp * Vp, Cp, Vp, bothT + Cp, 2 * Cp);
    }

    INLINE void backward_delta(const Problem& p, int64_t b, int64_t h) {
        const int64_t chunks = (p.time + C - 1) / C, head = b * p.heads + h, size = R * K * V;
        real* grad_memory = static_cast<real*>(p.final_memory) + head * size;
        load_state(grad_memory, nullptr, memory, nullptr);
        for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
            load_state(static_cast<real*>(p.start_memory) + (head * chunks + chunk) * size, nullptr, start_memory,
                       nullptr);
            backward_delta(p, b, chunk * C, h);
        }
        store_state(memory, nullptr, grad_memory, nullptr);
    }

    INLINE bool run(const Problem& p, int64_t head, bool backwards) {
        const int64_t b = head / p.heads, h = head % p.heads;
        if (p.time == 1 && !backwards && !p.start_memory && 2 * p.key_size + 3 * p.value_size <= LOCAL) {
            step(p, b, h);
            return true;
        }
        if (p.chunk > 1 << 20) return false;  // its work space may be more bytes than an integer counts
        const int64_t bytes = layout(p, nullptr, backwards) * sizeof(real) + 64;
        void* workspace = std::malloc(bytes);
        if (!workspace) return false;
        layout(p, reinterpret_cast<real*>(round_up(reinterpret_cast<int64_t>(workspace), 64)), backwards);
        if (p.step_size.data)
            backwards ? backward_delta(p, b, h) : forward_delta(p, b, h);
        else
            backwards ? backward(p, b, h) : forward(p, b, h);
        std::free(workspace);
        return true;
    }
};

struct Functions {
    bool (*run)(const Problem&, int64_t head, bool backwards);
    bool (*mix)(const Step&, int64_t head);
};

// The same code for several instruction sets; the processor's best is taken when the library runs.
#define FUNCTIONS(name, target, ...)                                                     \
    template <class real, class token>                                                   \
    struct name {                                                                        \
        typedef __VA_ARGS__ Code;                                                        \
        target static bool run(const Problem& p, int64_t head, bool backwards) {         \
            return Code().run(p, head, backwards);                                       \
        }                                                                                \
        target static bool mix(const Step& p, int64_t head) { return Code::mix(p, head); } \
        static Functions get() { return {run, mix}; }                                    \
    };
FUNCTIONS(Portable, , Chunk<real, token, 16, 8, false>)
#ifdef __x86_64__
#define AVX512 __attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")))
FUNCTIONS(Avx2, __attribute__((target("avx2,fma"))), Chunk<real, token, 32, 4, false>)
FUNCTIONS(Avx512, AVX512, Chunk<real, token, 64, 8, false>)
#if __GNUC__ >= 11  // that know these instructions
#define HAS_PAIRS
FUNCTIONS(Avx512Bf16, AVX512, Chunk<real, token, 64, 8, true>)
#endif
#endif

template <class real, class token>
Functions choose() {
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw")) {
#ifdef HAS_PAIRS
        if constexpr (sizeof(token) == 2)
            if (__builtin_cpu_supports("avx512bf16")) return Avx512Bf16<real, token>::get();
#endif
        return Avx512<real, token>::get();
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Avx2<real, token>::get();
#endif
    return Portable<real, token>::get();
}

enum Precision { FLOAT32, FLOAT64, BFLOAT16 };

Functions choose(int precision) {
    return precision == FLOAT64    ? choose<double, double>()
           : precision == BFLOAT16 ? choose<float, bfloat16>()
                                   : choose<float, float>();
}

// A single token is too little work to wake other threads, unless it has many heads.
bool is_much(int64_t heads) { return heads >= 16; }

}  // namespace

// The number that caller and library must agree on, since the caller hands over structs. Change it, here and in
// memory_bank_cpu.py, with what the functions do and with the fields of `Problem` and `Step`, whose sizes are part of it.
extern "C" int64_t stackformer_abi() { return (3 * 10000 + int64_t(sizeof(Problem))) * 10000 + int64_t(sizeof(Step)); }

// Runs all heads on `threads` threads. Returns 0, or 1 if there was no memory for the work space.
extern "C" int stackformer_memory_bank(const Problem* problem, int precision, int backwards, int threads) {
    const Functions functions = choose(precision);
    const int64_t heads = problem->batch * problem->heads;
    int failed = 0;
#pragma omp parallel for if (problem->time > 1 || is_much(heads)) num_threads(threads) reduction(| : failed) \
    schedule(dynamic)
    for (int64_t head = 0; head < heads; head++) failed |= !functions.run(*problem, head, backwards != 0);
    return failed;
}

// One token of a mixer, all heads on `threads` threads. Returns 0, 1 if there was no memory for the work space, or 2 if
// the rows are not ascending numbers of the state's: each one once, since heads write at the same time.
extern "C" int stackformer_step(const Step* step, int precision, int threads) {
    int64_t last = -1;
    for (int64_t b = 0; step->rows && b < step->batch; b++) {
        if (step->rows[b] <= last || step->rows[b] >= step->count) return 2;
        last = step->rows[b];
    }
    const Functions functions = choose(precision);
    const int64_t heads = step->batch * step->heads;
    int failed = 0;
#pragma omp parallel for if (is_much(heads)) num_threads(threads) reduction(| : failed)
    for (int64_t head = 0; head < heads; head++) failed |= !functions.mix(*step, head);
    return failed;
}
