// Layer norm of one row: mean 0, variance 1, then scale and shift.

#pragma once

#include "rows.h"

namespace sostenuto {

void layer_norm(const Rows& x, int64_t row, int64_t width, const sostenuto_norm& norm, const Rows& to, int64_t to_row);

}  // namespace sostenuto
