// Per head, with the state S [N value, N key] (formulas and sources: kernels/reference.py):
//
//   v  = v + (v_first - v) value_mix         kk = k k_k / max(|k k_k|, 1e-12)
//   w  = exp(-exp(-1/2) sigmoid(decay))      k  = k (1 + (a - 1) k_a)
//   S  = S diag(w) - (S kk)(kk a)^T + v k^T
//   y  = (GroupNorm(S r) + (sum r k r_k) v) gate
//
// The rows of S do not know each other: row i needs v[i] and what all rows share. So a few rows at a time stay in
// registers while time passes, and a step of decoding runs the same instructions as a prompt of any length.

#include "wkv7.h"

#include <algorithm>
#include <cmath>

namespace sostenuto {

namespace {

constexpr int64_t kSteps = 16;  // tokens prepared at a time: they stay in L1
constexpr int kRows = 4;        // rows of S in registers

// How a state that is kept in float16 is rounded is decided by the bits of what the token removes and adds: they are as
// good as random, the same wherever the token is read, and need no counter.
constexpr uint32_t kColumnHash = 0x9e3779b1, kRowHash = 0x85ebca6b;

// One head's inputs for one token, zero-padded to whole vectors.
enum Input { kKk, kDecay, kRemoval, kKey, kReceptance, kValue, kNumInputs };

struct Head {
    const sostenuto_wkv7_parameters& p;
    const sostenuto_wkv7_rows& rows;
    int64_t size, padded, first;  // N, N in whole vectors, the head's first channel
    float* inputs;                // [kSteps, kNumInputs, padded]
    float* y;                     // [kSteps, padded]
    float* held;                  // [padded] what the rows hold under the first token's kk
    float* bonus;                 // [kSteps]

    float* input(int64_t step, Input which) const { return inputs + (step * kNumInputs + which) * padded; }
};

__attribute__((always_inline)) inline void fetch_inputs(const Head& head, int64_t token) {
    const sostenuto_wkv7_rows& all = head.rows;
    for (const Rows* rows : {&all.r, &all.k, &all.v, &all.decay, &all.a, &all.gate, &all.v_first, &all.value_mix})
        if (rows->data != nullptr) fetch<kToRead>(*rows, token, head.first, head.first + head.size);
}

void prepare(const Head& head, int64_t token, int64_t step) {
    const sostenuto_wkv7_rows& rows = head.rows;
    vec squares{}, bonus{};
    for (int64_t i = 0; i < head.size; i += W) {
        const int64_t n = head.size - i, c = head.first + i;
        const vec raw = get(rows.k, token, c, n) * load_first(head.p.k_k + c, n);
        squares = fma(raw, raw, squares);
        store(head.input(step, kKk) + i, raw);
    }
    const vec to_unit = broadcast(1.0f / std::max(std::sqrt(sum(squares)), 1e-12f));
    for (int64_t i = 0; i < head.size; i += W) {
        const int64_t n = head.size - i, c = head.first + i;
        const vec a = get(rows.a, token, c, n), r = get(rows.r, token, c, n), k = get(rows.k, token, c, n);
        const vec kk = load(head.input(step, kKk) + i) * to_unit;
        const vec key = k * fma(a - 1.0f, load_first(head.p.k_a + c, n), broadcast(1.0f));
        vec v = get(rows.v, token, c, n);
        if (rows.v_first.data != nullptr)
            v = fma(get(rows.v_first, token, c, n) - v, get(rows.value_mix, token, c, n), v);
        store(head.input(step, kKk) + i, kk);
        store(head.input(step, kDecay) + i, exp(sigmoid(get(rows.decay, token, c, n)) * -0.60653065971263342f));
        store(head.input(step, kRemoval) + i, -(kk * a));
        store(head.input(step, kKey) + i, key);
        store(head.input(step, kReceptance) + i, r);
        store(head.input(step, kValue) + i, v);
        bonus = fma(r * key, load_first(head.p.r_k + c, n), bonus);
    }
    head.bonus[step] = sum(bonus);
}

// Rows of the state times x, lane by lane.
template <int V>
inline void dot(const vec (&s)[kRows][V], const float* x, vec (&sums)[kRows]) {
    for (int i = 0; i < kRows; ++i) sums[i] = vec{};
    for (int j = 0; j < V; ++j) {
        const vec each = in_register(load(x + j * W));
        for (int i = 0; i < kRows; ++i) sums[i] = fma(s[i][j], each, sums[i]);
    }
}

// Row `row` on, vector by vector. `whole`: rows fill their vectors, and all kRows exist; others are read as zeros.
template <int V, bool whole, typename Value>
inline void load_rows(const Value* state, int64_t row, int64_t size, vec (&s)[kRows][V]) {
    for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < V; ++j) {
            const Value* at = state + (row + i) * size + j * W;
            s[i][j] = whole ? load(at) : load_first(at, row + i < size ? size - j * W : 0);
        }
}

template <int V, bool whole, typename Value>
inline void store_rows(Value* state, int64_t row, int64_t size, const vec (&s)[kRows][V]) {
    for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < V; ++j) {
            Value* at = state + (row + i) * size + j * W;
            if (whole) {
                store(at, s[i][j]);
            } else {
                store_first(at, s[i][j], row + i < size ? size - j * W : 0);
            }
        }
}

// One head's state through `steps` tokens, a few rows after the other. What the state holds under the first token's kk
// is read for all rows beforehand: that way a decode step, which has no second token, waits for no sum. Every token
// leaves what the pool can keep, so that nobody can tell whether the state was there in between.
template <typename Value, int V, bool whole>
void scan(const Head& head, void* memory, int64_t steps) {
    constexpr int64_t padded = V * W;
    Value* state = static_cast<Value*>(memory);
    const int64_t size = whole ? padded : head.size;
    vec s[kRows][V], sums[kRows];
    for (int64_t row = 0; row < size; row += kRows) {
        load_rows<V, whole>(state, row, size, s);
        dot<V>(s, head.input(0, kKk), sums);
        store4(head.held + row, sum4(sums));
    }
    for (int64_t row = 0; row < size; row += kRows) {
        load_rows<V, whole>(state, row, size, s);
        constexpr int kValues = kLine / sizeof(Value);
        for (int line = 0; line < kRows * V * W; line += kValues)  // the next head's rows, next in memory
            __builtin_prefetch(state + size * size + row * size + line, 0, 2);
        vec z[kRows];
        for (int i = 0; i < kRows; ++i) z[i] = broadcast(head.held[row + i]);
        for (int64_t t = 0; t < steps; ++t) {
            const float *in = head.inputs + t * kNumInputs * padded, *v = in + kValue * padded + row;
            uvec of_row[kRows];
            for (int i = 0; i < kRows; ++i) of_row[i] = ((uvec)z[i] + (uvec)broadcast(v[i])) * kRowHash;
            for (int j = 0; j < V; ++j) {
                const vec w = in_register(load(in + kDecay * padded + j * W));
                const vec b = in_register(load(in + kRemoval * padded + j * W));
                const vec k = in_register(load(in + kKey * padded + j * W));
                const uvec of_column = ((uvec)b + (uvec)k) * kColumnHash;
                for (int i = 0; i < kRows; ++i)
                    s[i][j] = kept_as<Value>(fma(broadcast(v[i]), k, fma(z[i], b, s[i][j] * w)),
                                             (ivec)(of_column + of_row[i]));
            }
            // What the next step waits for comes before this step's result: their latencies overlap.
            if (t + 1 < steps) {
                dot<V>(s, in + (kNumInputs + kKk) * padded, sums);
                spread4(sum4(sums), z);
            }
            dot<V>(s, in + kReceptance * padded, sums);
            store4(head.y + t * padded + row, sum4(sums));
        }
        store_rows<V, whole>(state, row, size, s);
    }
}

using Scan = decltype(&scan<float, 1, true>);

template <typename Value>
Scan choose_scan(int64_t size) {
    constexpr Scan whole[] = {scan<Value, 1, true>, scan<Value, 2, true>, scan<Value, 3, true>, scan<Value, 4, true>,
                              scan<Value, 5, true>, scan<Value, 6, true>, scan<Value, 7, true>, scan<Value, 8, true>};
    constexpr Scan partial[] = {scan<Value, 1, false>, scan<Value, 2, false>, scan<Value, 3, false>,
                                scan<Value, 4, false>, scan<Value, 5, false>, scan<Value, 6, false>,
                                scan<Value, 7, false>, scan<Value, 8, false>};
    return size % W == 0 ? whole[size / W - 1] : partial[size / W];
}

void finish(const Head& head, int64_t token, int64_t step) {
    const float* y = head.y + step * head.padded;
    const float size = static_cast<float>(head.size);
    vec sums{}, squares{};
    for (int64_t i = 0; i < head.size; i += W) sums = sums + load_first(y + i, head.size - i);
    const vec mean = broadcast(sum(sums) / size);
    for (int64_t i = 0; i < head.size; i += W) {
        const vec d = first_lanes(load_first(y + i, head.size - i) - mean, head.size - i);
        squares = fma(d, d, squares);
    }
    const vec scale = broadcast(1.0f / std::sqrt(sum(squares) / size + head.p.norm.eps));
    const vec bonus = broadcast(head.bonus[step]);
    for (int64_t i = 0; i < head.size; i += W) {
        const int64_t n = head.size - i, c = head.first + i;
        const vec normal = (load_first(y + i, n) - mean) * scale;
        vec out = fma(normal, load_first(head.p.norm.weight + c, n), load_first(head.p.norm.bias + c, n));
        out = fma(bonus, load(head.input(step, kValue) + i), out);
        put(head.rows.y, token, c, out * get(head.rows.gate, token, c, n), n);
    }
}

void advance(const Head& head, Scan scan_head, void* state, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t += kSteps) {
        const int64_t steps = std::min(kSteps, end - t);
        for (int64_t i = 0; i < steps; ++i) {
            fetch_inputs(head, t + i + kAhead);
            prepare(head, t + i, i);
        }
        scan_head(head, state, steps);
        for (int64_t i = 0; i < steps; ++i) finish(head, t + i, i);
    }
}

}  // namespace

void wkv7(Member& me, const sostenuto_batch& batch, const sostenuto_wkv7_parameters& p, const sostenuto_wkv7_rows& rows,
          const LayerStates& states) {
    const int64_t H = p.num_heads, N = p.head_size, padded = round_up(N, W);
    const int64_t head_bytes = N * N * item_bytes(states.format);
    const Scan scan_head = states.format == SOSTENUTO_FLOAT16 ? choose_scan<half>(N) : choose_scan<float>(N);
    me.share(batch.num_sequences * H, [&](int64_t task) {
        const int64_t b = task / H, h = task % H;
        const int64_t floats = kSteps * (kNumInputs + 1) * padded + padded + kSteps;
        float* memory = static_cast<float*>(me.scratch(floats * sizeof(float)));
        float *y = memory + kSteps * kNumInputs * padded, *held = y + kSteps * padded;
        const Head head{p, rows, N, padded, h * N, memory, y, held, held + padded};
        char* state = static_cast<char*>(states.slot(batch.slots[b])) + h * head_bytes;
        advance(head, scan_head, state, batch.starts[b], batch.starts[b + 1]);
    });
}

}  // namespace sostenuto
