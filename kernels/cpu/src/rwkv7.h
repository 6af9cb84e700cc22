// All layers of an RWKV-7 model as one call, so that nothing but arithmetic lies between two operators.

#pragma once

#include "rows.h"
#include "team.h"

namespace sostenuto {

// Activations between two projections of a layer, for a batch of tokens. Every layer uses the same memory.
struct Rwkv7Buffers {
    Rows h;                                                  // [T, C] float32
    Rows mixes[6];                                           // [T, C]: r, w, k, v, a, g
    Rows r, k, v, v_first, decay, a, gate, value_mix;        // [T, A] float32
    Rows decay_hidden, a_hidden, gate_hidden, value_hidden;  // [T, D]
    Rows y, ffn_hidden;                                      // [T, A], [T, F]

    static Rwkv7Buffers lay_out(Arena& arena, const sostenuto_rwkv7_layer* layers, int64_t num_layers, int64_t width,
                                int64_t num_tokens);
};

// One call: a model, the tokens it consumes, the states it advances, and room to work in.
struct Rwkv7Call {
    const sostenuto_rwkv7_layer* layers;
    int64_t num_layers, width;
    sostenuto_batch batch;
    Rows x;  // [T, C] float32, the residual stream
    sostenuto_states wkv, shift;
    Rwkv7Buffers buffers;
};

void rwkv7(Member& me, const Rwkv7Call& call);

}  // namespace sostenuto
