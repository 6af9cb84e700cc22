// Layer norm, token shift and mixes: what stands before every projection of a block.

#pragma once

#include "rows.h"
#include "team.h"

namespace sostenuto {

// out[m] = h + (previous h - h) * mix[m]; see sostenuto.h. `h[T, width]` float32 is scratch shared by the team.
void shift_mix(Member& me, const sostenuto_batch& batch, const Rows& x, int64_t width, const sostenuto_norm& norm,
               float* shift, int64_t slot_stride, const float* mix, int num_mixes, const Rows* out, const Rows& h);

}  // namespace sostenuto
