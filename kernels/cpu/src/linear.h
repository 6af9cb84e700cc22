// Matrix products `y[T, out] = x[T, in] @ weight[out, in].T`, the weights packed so that they stream.
//
// Packed layout: panels of 64 outputs (fewer in the last), each a run of steps along `in`; a step holds, for every
// output of its panel, the `depth` weights that one instruction consumes. So one pass over memory, in order, computes
// any number of rows, and an output is always one lane: its sum runs along `in`, in order, in one accumulator. That
// order knows nothing of how many rows there are, which thread runs, or where blocks end.
//
//   float32   depth 1   float32 activations, fused multiply-add
//   bfloat16  depth 2   activations rounded to bfloat16, exact products, float32 sums (vdpbf16ps where there is one)
//   int8      depth 4   a scale for each output; activations rounded to 16 bits with a scale for each row, exact
//                       products and sums (vpdpbusd where there is one), as many as bfloat16 has in the same time
//
// vdpbf16ps takes denormals as zero; nothing near 1e-38 matters here.

#pragma once

#include <cstdint>

#include "rows.h"
#include "team.h"

namespace sostenuto {

using Matrix = sostenuto_matrix;

// What happens to a sum before it is written: `activation(sum + bias)`, then stored, or added to what is there.
struct Output {
    Rows rows;
    const float* bias = nullptr;
    int32_t activation = SOSTENUTO_NONE;
    bool add = false;
    bool streams = false;  // past the caches: float32, aligned to lines, and more than they hold
};

// x has the weights' format, padded with zeros to a whole step; or any format if the weights are int8.
struct Product {
    Rows x;
    Matrix weight;
    Output y;
    Rows quantised = {};  // room for x in int8's form, if that is the weights'
};

vec activate(vec x, int32_t activation);

int64_t packed_bytes(int64_t out, int64_t in, int32_t format);
void pack(Member& me, const Rows& weight, const Matrix& packed);

// All products of one phase, over the same number of rows, shared by the team as one loop.
void multiply(Member& me, const Product* products, int num_products, int64_t num_rows);

}  // namespace sostenuto
