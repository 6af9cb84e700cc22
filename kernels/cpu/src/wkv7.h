// RWKV-7's time mixing between its projections, state and all.

#pragma once

#include "rows.h"
#include "team.h"

namespace sostenuto {

constexpr int64_t kMaxHeadSize = 8 * W;  // a row of a state must fit the registers

void wkv7(Member& me, const sostenuto_batch& batch, const sostenuto_wkv7_parameters& p, const sostenuto_wkv7_rows& rows,
          const LayerStates& states);

}  // namespace sostenuto
