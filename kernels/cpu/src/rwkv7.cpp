#include "rwkv7.h"

#include <algorithm>
#include <cstring>

#include "layer_norm.h"
#include "linear.h"
#include "shift_mix.h"
#include "wkv7.h"

namespace sostenuto {

namespace {

// Logits of many rows are more than a cache holds, and rows of a vocabulary lie where its lines displace each other.
constexpr int64_t kStreamedLogits = 2 << 20;

bool is_in_lines(const Rows& rows) {
    return reinterpret_cast<uintptr_t>(rows.data) % kLine == 0 && rows.stride * item_bytes(rows.format) % kLine == 0;
}

// Products read whole steps: what lies beyond a row's width must be finite, for its weights are zero. Only rows of odd
// width have such a place, and it keeps whatever it is given here, or what a wider layer left.
void clear(Member& me, int64_t num_tokens, const Rwkv7Buffers& to) {
    const Rows* read[] = {&to.decay_hidden, &to.a_hidden, &to.gate_hidden, &to.value_hidden, &to.y, &to.ffn_mix, &to.ffn_hidden};
    const auto clear_row = [&](const Rows& rows, int64_t row) {
        const int64_t bytes = rows.stride * item_bytes(rows.format);
        memset(static_cast<char*>(rows.data) + row * bytes, 0, bytes);
    };
    me.share(num_tokens, [&](int64_t row) {
        for (const Rows& mix : to.mixes) clear_row(mix, row);
        for (const Rows* rows : read) clear_row(*rows, row);
    });
}

float* shift_of(const Rwkv7Call& call, int64_t index) {
    return static_cast<float*>(call.shift.data) + index * call.shift.layer_stride;
}

// x += output(wkv7(projections of the mixes))
void time_mixing(Member& me, const Rwkv7Call& call, int64_t index) {
    const sostenuto_rwkv7_layer& layer = call.model.layers[index];
    const Rwkv7Buffers& to = call.buffers;
    const int64_t num_tokens = call.batch.num_tokens, width = call.model.width;
    const auto& [m_r, m_w, m_k, m_v, m_a, m_g] = to.mixes;
    const bool mixes_value = index > 0;
    const Rows v = mixes_value ? to.v : to.v_first;

    shift_mix(me, call.batch, to.x, width, layer.ln1, shift_of(call, index), call.shift.slot_stride,
              layer.att_mix, 6, to.mixes, to.h);

    // Small products first: what is large fills the end evenly.
    const Product down[] = {
        {m_w, layer.decay.down, {to.decay_hidden, nullptr, layer.decay.activation}},
        {m_a, layer.rate.down, {to.a_hidden, nullptr, layer.rate.activation}},
        {m_g, layer.gate.down, {to.gate_hidden, nullptr, layer.gate.activation}},
        {m_r, layer.receptance, {to.r}, to.quantised[0]},
        {m_k, layer.key, {to.k}, to.quantised[1]},
        {m_v, layer.value, {v}, to.quantised[2]},
        {m_v, layer.value_mix.down, {to.value_hidden, nullptr, layer.value_mix.activation}},
    };
    multiply(me, down, mixes_value ? 7 : 6, num_tokens);

    const Product up[] = {
        {to.decay_hidden, layer.decay.up, {to.decay, layer.decay.bias, layer.decay.output_activation}},
        {to.a_hidden, layer.rate.up, {to.a, layer.rate.bias, layer.rate.output_activation}},
        {to.gate_hidden, layer.gate.up, {to.gate, layer.gate.bias, layer.gate.output_activation}},
        {to.value_hidden, layer.value_mix.up, {to.value_mix, layer.value_mix.bias, layer.value_mix.output_activation}},
    };
    multiply(me, up, mixes_value ? 4 : 3, num_tokens);

    const Rows absent{};
    const sostenuto_wkv7_rows rows{to.r, to.k, v, to.decay, to.a, to.gate, mixes_value ? to.v_first : absent,
                                   mixes_value ? to.value_mix : absent, to.y};
    wkv7(me, call.batch, layer.wkv, rows, LayerStates(call.wkv, index));

    const Product output{to.y, layer.output, {to.x, nullptr, SOSTENUTO_NONE, true}, to.quantised[0]};
    multiply(me, &output, 1, num_tokens);
}

// x += value(relu(key(mix))^2)
void channel_mixing(Member& me, const Rwkv7Call& call, int64_t index) {
    const sostenuto_rwkv7_layer& layer = call.model.layers[index];
    const Rwkv7Buffers& to = call.buffers;
    const Rows& mixed = to.ffn_mix;
    const int64_t width = call.model.width;
    shift_mix(me, call.batch, to.x, width, layer.ln2, shift_of(call, index) + width,
              call.shift.slot_stride, layer.ffn_mix, 1,
              &mixed, to.h);
    const Product key{mixed, layer.ffn_key, {to.ffn_hidden, nullptr, SOSTENUTO_RELU_SQUARED}, to.quantised[0]};
    multiply(me, &key, 1, call.batch.num_tokens);
    const Product value{to.ffn_hidden, layer.ffn_value, {to.x, nullptr, SOSTENUTO_NONE, true}, to.quantised[0]};
    multiply(me, &value, 1, call.batch.num_tokens);
}

}  // namespace

Rwkv7Buffers Rwkv7Buffers::lay_out(Arena& arena, const sostenuto_rwkv7_model& model, int64_t num_tokens) {
    // Formats are those of the matrices that read the rows, and all layers agree on them; low-rank widths may differ.
    const sostenuto_rwkv7_layer& layer = model.layers[model.num_layers - 1];
    const int64_t A = layer.receptance.out, width = model.width;
    const auto floats = [&](int64_t columns) { return arena.rows(num_tokens, columns, SOSTENUTO_FLOAT32); };
    const auto hidden = [&](sostenuto_low_rank sostenuto_rwkv7_layer::*which) {
        int64_t widest = 0;
        for (int64_t i = 0; i < model.num_layers; ++i) widest = std::max(widest, (model.layers[i].*which).up.in);
        return arena.rows(num_tokens, widest, readable_by((layer.*which).up.format));
    };
    Rwkv7Buffers to;
    to.x = floats(width);
    to.h = floats(width);
    // A layer that mixes values has two readers of m_v, and the low-rank one takes its own format only.
    const sostenuto_matrix& value = layer.value_mix.down.data != nullptr ? layer.value_mix.down : layer.value;
    const sostenuto_matrix* readers[] = {&layer.receptance, &layer.decay.down, &layer.key,
                                         &value,            &layer.rate.down,  &layer.gate.down};
    const auto read_by = [&](const sostenuto_matrix& reader) {
        return arena.rows(num_tokens, reader.in, readable_by(reader.format));
    };
    for (int m = 0; m < 6; ++m) to.mixes[m] = read_by(*readers[m]);
    to.ffn_mix = read_by(layer.ffn_key);
    for (Rows* each : {&to.r, &to.k, &to.v, &to.v_first, &to.decay, &to.a, &to.gate, &to.value_mix}) *each = floats(A);
    to.decay_hidden = hidden(&sostenuto_rwkv7_layer::decay);
    to.a_hidden = hidden(&sostenuto_rwkv7_layer::rate);
    to.gate_hidden = hidden(&sostenuto_rwkv7_layer::gate);
    to.value_hidden = hidden(&sostenuto_rwkv7_layer::value_mix);
    to.y = read_by(layer.output);
    to.ffn_hidden = read_by(layer.ffn_value);
    const int64_t widest = std::max({width, A, layer.ffn_value.in});
    for (Rows& rows : to.quantised) rows = arena.quantised(num_tokens, &rows == to.quantised ? widest : width);
    return to;
}

void rwkv7_forward(Member& me, const Rwkv7Call& call) {
    const sostenuto_rwkv7_model& model = call.model;
    const Rwkv7Buffers& to = call.buffers;
    clear(me, call.batch.num_tokens, to);
    me.share(call.batch.num_tokens, [&](int64_t t) {
        layer_norm(model.embedding, call.token_ids[t], model.width, model.ln0, to.x, t);
    });
    for (int64_t i = 0; i < model.num_layers; ++i) {
        time_mixing(me, call, i);
        channel_mixing(me, call, i);
    }
    me.share(call.num_outputs, [&](int64_t i) {
        const float* x = static_cast<const float*>(to.x.data) + call.output_rows[i] * to.x.stride;
        memcpy(static_cast<float*>(call.hidden.data) + i * call.hidden.stride, x, model.width * sizeof(float));
    });
}

Rwkv7HeadBuffers Rwkv7HeadBuffers::lay_out(Arena& arena, const sostenuto_rwkv7_model& model, int64_t num_rows) {
    const int32_t format = model.head.format;
    const Rows normal = arena.rows(num_rows, model.width, readable_by(format));
    return {normal, format == SOSTENUTO_INT8 ? arena.quantised(num_rows, model.width) : Rows{}};
}

void rwkv7_logits(Member& me, const sostenuto_rwkv7_model& model, int64_t num_rows, const Rows& hidden,
                  const Rwkv7HeadBuffers& buffers, const Rows& logits) {
    const Rows& normal = buffers.normal;
    me.share(num_rows, [&](int64_t row) {
        layer_norm(hidden, row, model.width, model.ln_out, normal, row);
        zero_padding(normal, row, model.width);
    });
    Output to{logits};
    to.streams = num_rows * model.vocab_size >= kStreamedLogits && is_in_lines(logits);
    const Product product{normal, model.head, to, buffers.quantised};
    multiply(me, &product, 1, num_rows);
}

}  // namespace sostenuto
