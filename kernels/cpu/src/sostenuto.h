/* The library's interface: plain C, called through ctypes.
 *
 * Everything is shared memory of the caller's; nothing is kept after a call returns, except what a team owns. Sizes and
 * strides count items, not bytes. Arguments are checked by the caller (`kernels/cpu`), not here, but for indices where a
 * function says so. Every
 * function that computes takes the team whose threads do it; one call at a time runs on a team, others wait.
 *
 * Letters as in kernels/README.md: T packed tokens, B sequences, C width, A = H * N attention width, H heads, N head
 * size, S slots. Sequence b owns tokens [starts[b], starts[b + 1]) and row slots[b] of the states.
 */

#ifndef SOSTENUTO_H
#define SOSTENUTO_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#pragma GCC visibility push(default)

/* Formats; int8: of weights only, float16: of states only. */
enum { SOSTENUTO_FLOAT32 = 0, SOSTENUTO_BFLOAT16 = 1, SOSTENUTO_INT8 = 2, SOSTENUTO_FLOAT16 = 3 };
enum { SOSTENUTO_NONE = 0, SOSTENUTO_TANH = 1, SOSTENUTO_SIGMOID = 2, SOSTENUTO_RELU_SQUARED = 3 }; /* activations */

/* Row-major rows of one format. */
typedef struct {
    void* data;
    int64_t stride; /* items from row to row */
    int32_t format;
} sostenuto_rows;

/* Packed weights [out, in], 64-byte aligned, as sostenuto_pack wrote them. */
typedef struct {
    void* data;
    int64_t out, in;
    int32_t format;
} sostenuto_matrix;

/* output_activation(activation(x @ down.T) @ up.T + bias); bias [up.out] float32 or NULL; down.data NULL: absent */
typedef struct {
    sostenuto_matrix down, up;
    const float* bias;
    int32_t activation, output_activation;
} sostenuto_low_rank;

typedef struct {
    int64_t num_tokens, num_sequences;
    const int64_t *starts, *slots;
} sostenuto_batch;

typedef struct {
    const float *weight, *bias;
    float eps;
} sostenuto_norm;

/* States of one kind in the pool: contiguous inside a slot, strides in values. WKV states are float32 or float16,
   others float32. */
typedef struct {
    void* data;
    int64_t num_slots, slot_stride, layer_stride;
    int32_t format;
} sostenuto_states;

/* What the WKV-7 operator takes besides r, k, v and so on. */
typedef struct {
    int64_t num_heads, head_size;
    const float *k_k, *k_a, *r_k; /* [A] each */
    sostenuto_norm norm;          /* per head, [A] */
} sostenuto_wkv7_parameters;

/* [T, A] each; `v_first` and `value_mix` have data NULL in the first layer. `a` and `value_mix` are after their
 * sigmoid, `decay` is raw. */
typedef struct {
    sostenuto_rows r, k, v, decay, a, gate, v_first, value_mix, y;
} sostenuto_wkv7_rows;

typedef struct {
    sostenuto_norm ln1, ln2;
    const float* att_mix; /* [6, C]: r, w, k, v, a, g */
    const float* ffn_mix; /* [C] */
    sostenuto_matrix receptance, key, value, output;
    sostenuto_low_rank decay, rate, gate, value_mix;
    sostenuto_wkv7_parameters wkv;
    sostenuto_matrix ffn_key, ffn_value;
} sostenuto_rwkv7_layer;

typedef struct {
    int64_t num_layers, width, vocab_size;
    sostenuto_rows embedding; /* [V, C] */
    sostenuto_norm ln0, ln_out;
    const sostenuto_rwkv7_layer* layers;
    sostenuto_matrix head;
} sostenuto_rwkv7_model;

/* How to draw from a row: all of them doubles, so that a table of rows is an array. */
typedef struct {
    double temperature; /* 0: the most likely token, the lowest id among equals */
    double top_k;       /* 0: all */
    double top_p;
    double min_p;
    double uniform; /* in [0, 1) */
} sostenuto_sampling_rule;

/* Rows of logits [num_rows, vocab_size], rows `stride` apart, and for each row how to draw; token_ids is written. */
typedef struct {
    int64_t num_rows, vocab_size, stride;
    const float* logits;
    const sostenuto_sampling_rule* rules;
    int64_t* token_ids;
} sostenuto_sampling;

/* Rows of logits [num_rows, vocab_size], rows `stride` apart, and a token of each; num_top alternatives a row, at most as
 * many as there are ids that are not among excluded_ids, which rise. own[num_rows], top and top_ids[num_rows, num_top] are
 * written. */
typedef struct {
    int64_t num_rows, vocab_size, stride;
    const float* logits;
    const int64_t* token_ids;
    int64_t num_top, num_excluded;
    const int64_t* excluded_ids;
    float *own, *top;
    int64_t* top_ids;
} sostenuto_logprobs;

typedef struct sostenuto_team sostenuto_team;

/* Start `size` threads' worth of team: the caller's and size - 1 of its own. NULL: out of memory or threads. */
sostenuto_team* sostenuto_team_create(int32_t size);
void sostenuto_team_destroy(sostenuto_team* team);
/* Fill the team's scratch memory with NaN; for tests. */
void sostenuto_team_poison(sostenuto_team* team);

/* Name of the instruction set the library was compiled for. */
const char* sostenuto_target(void);
/* Heads up to this size are handled by sostenuto_wkv7. */
int64_t sostenuto_max_head_size(void);

int64_t sostenuto_packed_bytes(int64_t out, int64_t in, int32_t format);
/* Pack weight[out, in], of the packed format itself; or of another, to be quantised, if that is int8. */
void sostenuto_pack(sostenuto_team* team, const sostenuto_rows* weight, const sostenuto_matrix* packed);

/* y = x @ weight.T */
void sostenuto_linear(sostenuto_team* team, int64_t num_rows, const sostenuto_rows* x, const sostenuto_matrix* weight,
                      const sostenuto_rows* y);
void sostenuto_apply_low_rank(sostenuto_team* team, int64_t num_rows, const sostenuto_rows* x,
                              const sostenuto_low_rank* weights, const sostenuto_rows* y);
/* out[m] = h + (previous h - h) * mix[m], h = layer norm of x; `shift` keeps the last h of a sequence. */
void sostenuto_shift_mix(sostenuto_team* team, const sostenuto_batch* batch, const sostenuto_rows* x, int64_t width,
                         const sostenuto_norm* norm, const sostenuto_states* shift, const float* mix,
                         int32_t num_mixes, const sostenuto_rows* out);
void sostenuto_wkv7(sostenuto_team* team, const sostenuto_batch* batch, const sostenuto_wkv7_parameters* parameters,
                    const sostenuto_wkv7_rows* rows, const sostenuto_states* state);
void sostenuto_relu_squared(sostenuto_team* team, int64_t num_rows, int64_t width, const sostenuto_rows* x,
                            const sostenuto_rows* y);
/* Draw a token for every row: truncation at temperature 1, then temperature, then the inverse of the cumulative
 * distribution in the order of token ids. */
void sostenuto_sample(sostenuto_team* team, const sostenuto_sampling* sampling);
/* Natural logarithms of the tokens' probabilities, and of the most likely ones', the lowest id first among equals. */
void sostenuto_report_logprobs(sostenuto_team* team, const sostenuto_logprobs* asked);
/* Consume the batch's tokens, advance both kinds of states in place, and write the residual stream after the last layer
 * for the tokens that output_rows[num_outputs] names: hidden[num_outputs, C] float32. Returns 0; or 1, having done
 * nothing, if an index is out of range. */
int32_t sostenuto_rwkv7_forward(sostenuto_team* team, const sostenuto_rwkv7_model* model, const sostenuto_batch* batch,
                             const int64_t* token_ids, const sostenuto_states* wkv, const sostenuto_states* shift,
                             int64_t num_outputs, const int64_t* output_rows, float* hidden);
/* logits[num_rows, V] float32 for hidden rows. */
void sostenuto_rwkv7_logits(sostenuto_team* team, const sostenuto_rwkv7_model* model, int64_t num_rows,
                            const sostenuto_rows* hidden, float* logits);
/* Both, and then a token for every sequence, by its rule: sampled[num_sequences]. None is among the forbidden ids.
 * Returns 0; or 1, having done nothing, if an index is out of range. */
int32_t sostenuto_rwkv7_step(sostenuto_team* team, const sostenuto_rwkv7_model* model, const sostenuto_batch* batch,
                             const int64_t* token_ids, const sostenuto_states* wkv, const sostenuto_states* shift,
                             int64_t num_forbidden, const int64_t* forbidden_ids,
                             const sostenuto_sampling_rule* rules, int64_t* sampled);

#pragma GCC visibility pop

#ifdef __cplusplus
}
#endif

#endif
