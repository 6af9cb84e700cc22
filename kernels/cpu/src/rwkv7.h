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

void rwkv7(Member& me, const sostenuto_batch& batch, const sostenuto_rwkv7_layer* layers, int64_t num_layers,
           int64_t width, const Rows& x, const sostenuto_states& wkv, const sostenuto_states& shift,
           const Rwkv7Buffers& buffers);

}  // namespace sostenuto
