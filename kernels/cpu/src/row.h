// One row of logits.

#pragma once

#include <cstdint>

#include "simd.h"

namespace sostenuto {

constexpr int64_t kBlock = 1024;  // weights summed in float32 before their sum joins the others in double

// NaN if there is one among them.
float greatest(const float* logits, int64_t count);

// log(sum exp(logit)). Not a number if a logit is none, or plus infinity.
double log_sum_exp(const float* logits, int64_t count);

}  // namespace sostenuto
