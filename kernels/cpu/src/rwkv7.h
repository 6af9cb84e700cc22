// An RWKV-7 model in two functions, so that nothing but arithmetic lies between two operators.

#pragma once

#include "rows.h"
#include "team.h"

namespace sostenuto {

// Activations of a batch of tokens. Every layer uses the same memory.
struct Rwkv7Buffers {
    Rows x;                                                  // [T, C] float32, the residual stream
    Rows h;                                                  // [T, C] float32
    Rows mixes[6];                                           // [T, C]: r, w, k, v, a, g
    Rows r, k, v, v_first, decay, a, gate, value_mix;        // [T, A] float32
    Rows decay_hidden, a_hidden, gate_hidden, value_hidden;  // [T, D]
    Rows y, ffn_mix, ffn_hidden;                             // [T, A], [T, C], [T, F]
    Rows quantised[3];  // room for what int8 weights read: as many as there are products in a phase

    static Rwkv7Buffers lay_out(Arena& arena, const sostenuto_rwkv7_model& model, int64_t num_tokens);
};

// One call: a model, the tokens it consumes, the states it advances, the rows it is asked for, and room to work in.
struct Rwkv7Call {
    const sostenuto_rwkv7_model& model;
    const sostenuto_batch& batch;
    const int64_t* token_ids;
    const sostenuto_states &wkv, &shift;
    int64_t num_outputs;
    const int64_t* output_rows;
    Rows hidden;
    Rwkv7Buffers buffers;
};

void rwkv7_forward(Member& me, const Rwkv7Call& call);

// Rows that the head reads.
struct Rwkv7HeadBuffers {
    Rows normal;     // [R, C]
    Rows quantised;  // for int8 weights

    static Rwkv7HeadBuffers lay_out(Arena& arena, const sostenuto_rwkv7_model& model, int64_t num_rows);
};

void rwkv7_logits(Member& me, const sostenuto_rwkv7_model& model, int64_t num_rows, const Rows& hidden,
                  const Rwkv7HeadBuffers& buffers, const Rows& logits);

}  // namespace sostenuto
