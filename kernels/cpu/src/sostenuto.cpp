// The C interface: each function gathers a team and runs one operator on it.

#include "sostenuto.h"

#include <algorithm>
#include <exception>
#include <limits>
#include <vector>

#include "linear.h"
#include "logprobs.h"
#include "rwkv7.h"
#include "sampling.h"
#include "shift_mix.h"
#include "team.h"
#include "wkv7.h"

using namespace sostenuto;

struct sostenuto_team : Team {
    using Team::Team;
};

namespace {

using Guard = std::lock_guard<std::mutex>;

constexpr int64_t kRowsPerTask = 16;

// Rows of another format, rounded, padded with zeros.
void convert(Member& me, int64_t num_rows, int64_t width, const Rows& from, const Rows& to,
             int32_t activation = SOSTENUTO_NONE) {
    me.share((num_rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task) {
        const int64_t end = std::min(num_rows, (task + 1) * kRowsPerTask);
        for (int64_t row = task * kRowsPerTask; row < end; ++row) {
            for (int64_t c = 0; c < width; c += W)
                put(to, row, c, activate(get(from, row, c, width - c), activation), width - c);
            zero_padding(to, row, width);
        }
    });
}

bool in_range(const int64_t* indices, int64_t count, int64_t end) {
    return std::all_of(indices, indices + count, [&](int64_t i) { return 0 <= i && i < end; });
}

// A matrix reads rows of its own format, whole steps long; anything else is converted first.
bool fits(const Rows& rows, const Matrix& weight) {
    return rows.format == readable_by(weight.format) && weight.in % grain(weight.format) == 0 &&
           rows.stride % depth(weight.format) == 0;
}

}  // namespace

sostenuto_team* sostenuto_team_create(int32_t size) {
    try {
        return new sostenuto_team(size);
    } catch (const std::exception&) {
        return nullptr;
    }
}

void sostenuto_team_destroy(sostenuto_team* team) { delete team; }

void sostenuto_team_poison(sostenuto_team* team) {
    Guard guard(team->lock);
    team->poison();
}

const char* sostenuto_target(void) {
#if defined(SOSTENUTO_AMX)
    return "AVX-512 with AMX";
#elif defined(SOSTENUTO_AVX512) && defined(__AVX512BF16__)
    return "AVX-512 with BF16";
#elif defined(SOSTENUTO_AVX512)
    return "AVX-512";
#elif defined(SOSTENUTO_AVX2)
    return "AVX2";
#elif defined(__ARM_NEON)
    return "NEON";
#else
    return "generic";
#endif
}

int64_t sostenuto_max_head_size(void) { return kMaxHeadSize; }

int64_t sostenuto_packed_bytes(int64_t out, int64_t in, int32_t format) { return packed_bytes(out, in, format); }

void sostenuto_pack(sostenuto_team* team, const sostenuto_rows* weight, const sostenuto_matrix* packed) {
    Guard guard(team->lock);
    team->run([&](Member& me) { pack(me, *weight, *packed); });
}

void sostenuto_linear(sostenuto_team* team, int64_t num_rows, const sostenuto_rows* x, const sostenuto_matrix* weight,
                      const sostenuto_rows* y) {
    Guard guard(team->lock);
    Product product{*x, *weight, {*y}};
    const bool is_int8 = weight->format == SOSTENUTO_INT8, converts = !is_int8 && !fits(*x, *weight);
    const auto lay_out = [&](Arena arena) {
        if (is_int8) product.quantised = arena.quantised(num_rows, weight->in);
        if (converts) product.x = arena.rows(num_rows, weight->in, readable_by(weight->format));
        return arena.used();
    };
    lay_out(Arena(team->arena(lay_out(Arena()))));
    team->run([&](Member& me) {
        if (converts) convert(me, num_rows, weight->in, *x, product.x);
        multiply(me, &product, 1, num_rows);
    });
}

void sostenuto_apply_low_rank(sostenuto_team* team, int64_t num_rows, const sostenuto_rows* x,
                              const sostenuto_low_rank* weights, const sostenuto_rows* y) {
    Guard guard(team->lock);
    const Matrix &down = weights->down, &up = weights->up;
    Rows input, hidden;
    const auto lay_out = [&](Arena arena) {
        input = arena.rows(num_rows, down.in, readable_by(down.format));
        hidden = arena.rows(num_rows, up.in, readable_by(up.format));
        return arena.used();
    };
    lay_out(Arena(team->arena(lay_out(Arena()))));
    team->run([&](Member& me) {
        convert(me, num_rows, down.in, *x, input);
        me.share(num_rows, [&](int64_t row) { zero_padding(hidden, row, up.in); });
        const Product first{input, down, {hidden, nullptr, weights->activation}};
        multiply(me, &first, 1, num_rows);
        const Product second{hidden, up, {*y, weights->bias, weights->output_activation}};
        multiply(me, &second, 1, num_rows);
    });
}

void sostenuto_shift_mix(sostenuto_team* team, const sostenuto_batch* batch, const sostenuto_rows* x, int64_t width,
                         const sostenuto_norm* norm, const sostenuto_states* shift, const float* mix,
                         int32_t num_mixes, const sostenuto_rows* out) {
    Guard guard(team->lock);
    const int64_t bytes = batch->num_tokens * width * static_cast<int64_t>(sizeof(float));
    const Rows h{team->arena(bytes), width, SOSTENUTO_FLOAT32};
    team->run([&](Member& me) {
        shift_mix(me, *batch, *x, width, *norm, static_cast<float*>(shift->data), shift->slot_stride, mix, num_mixes, out, h);
    });
}

void sostenuto_wkv7(sostenuto_team* team, const sostenuto_batch* batch, const sostenuto_wkv7_parameters* parameters,
                    const sostenuto_wkv7_rows* rows, const sostenuto_states* state) {
    Guard guard(team->lock);
    team->run([&](Member& me) { wkv7(me, *batch, *parameters, *rows, LayerStates(*state, 0)); });
}

void sostenuto_relu_squared(sostenuto_team* team, int64_t num_rows, int64_t width, const sostenuto_rows* x,
                            const sostenuto_rows* y) {
    Guard guard(team->lock);
    team->run([&](Member& me) { convert(me, num_rows, width, *x, *y, SOSTENUTO_RELU_SQUARED); });
}

void sostenuto_sample(sostenuto_team* team, const sostenuto_sampling* sampling) {
    Guard guard(team->lock);
    team->run([&](Member& me) { sample(me, *sampling); });
}

void sostenuto_report_logprobs(sostenuto_team* team, const sostenuto_logprobs* asked) {
    Guard guard(team->lock);
    team->run([&](Member& me) { logprobs(me, *asked); });
}

int32_t sostenuto_rwkv7_forward(sostenuto_team* team, const sostenuto_rwkv7_model* model, const sostenuto_batch* batch,
                             const int64_t* token_ids, const sostenuto_states* wkv, const sostenuto_states* shift,
                             int64_t num_outputs, const int64_t* output_rows, float* hidden) {
    if (!in_range(token_ids, batch->num_tokens, model->vocab_size) ||
        !in_range(output_rows, num_outputs, batch->num_tokens) ||
        !in_range(batch->slots, batch->num_sequences, wkv->num_slots))
        return 1;
    Guard guard(team->lock);
    const Rows outputs{hidden, model->width, SOSTENUTO_FLOAT32};
    Rwkv7Call call{*model, *batch, token_ids, *wkv, *shift, num_outputs, output_rows, outputs, {}};
    const auto lay_out = [&](Arena arena) {
        call.buffers = Rwkv7Buffers::lay_out(arena, *model, batch->num_tokens);
        return arena.used();
    };
    lay_out(Arena(team->arena(lay_out(Arena()))));
    team->run([&](Member& me) { rwkv7_forward(me, call); });
    return 0;
}

void sostenuto_rwkv7_logits(sostenuto_team* team, const sostenuto_rwkv7_model* model, int64_t num_rows,
                            const sostenuto_rows* hidden, float* logits) {
    Guard guard(team->lock);
    Rwkv7HeadBuffers buffers;
    const auto lay_out = [&](Arena arena) {
        buffers = Rwkv7HeadBuffers::lay_out(arena, *model, num_rows);
        return arena.used();
    };
    lay_out(Arena(team->arena(lay_out(Arena()))));
    const Rows output{logits, model->head.out, SOSTENUTO_FLOAT32};
    team->run([&](Member& me) { rwkv7_logits(me, *model, num_rows, *hidden, buffers, output); });
}

int32_t sostenuto_rwkv7_step(sostenuto_team* team, const sostenuto_rwkv7_model* model, const sostenuto_batch* batch,
                             const int64_t* token_ids, const sostenuto_states* wkv, const sostenuto_states* shift,
                             int64_t num_forbidden, const int64_t* forbidden_ids,
                             const sostenuto_sampling_rule* rules, int64_t* sampled) {
    const int64_t num_rows = batch->num_sequences, V = model->head.out;
    if (!in_range(token_ids, batch->num_tokens, model->vocab_size) ||
        !in_range(batch->slots, num_rows, wkv->num_slots) || !in_range(forbidden_ids, num_forbidden, V))
        return 1;
    Guard guard(team->lock);
    std::vector<int64_t> last(num_rows);
    for (int64_t i = 0; i < num_rows; ++i) last[i] = batch->starts[i + 1] - 1;
    Rwkv7Call call{*model, *batch, token_ids, *wkv, *shift, num_rows, last.data(), {}, {}};
    Rwkv7HeadBuffers head;
    Rows logits;
    const auto lay_out = [&](Arena arena) {
        call.buffers = Rwkv7Buffers::lay_out(arena, *model, batch->num_tokens);
        call.hidden = arena.rows(num_rows, model->width, SOSTENUTO_FLOAT32);
        head = Rwkv7HeadBuffers::lay_out(arena, *model, num_rows);
        logits = arena.rows(num_rows, V, SOSTENUTO_FLOAT32);
        return arena.used();
    };
    lay_out(Arena(team->arena(lay_out(Arena()))));
    float* values = static_cast<float*>(logits.data);
    const sostenuto_sampling sampling{num_rows, V, logits.stride, values, rules, sampled};
    team->run([&](Member& me) {
        rwkv7_forward(me, call);
        rwkv7_logits(me, *model, num_rows, call.hidden, head, logits);
        me.share(num_rows, [&](int64_t row) {
            for (int64_t i = 0; i < num_forbidden; ++i)
                values[row * logits.stride + forbidden_ids[i]] = -std::numeric_limits<float>::infinity();
        });
        sample(me, sampling);
    });
    return 0;
}
