// Sums of rows with a panel on tile registers (Intel AMX): bfloat16 products, and products of bytes.
//
// A tile is 16 rows of 64 bytes. One of weights holds 16 steps of 16 outputs, and is 1 KB in a row in its panel; one of
// activations holds 64 bytes of up to 16 rows; one of sums these rows times those outputs. The order of a sum is the
// instruction's: the same for every row, however many there are.

#pragma once

#include <cstdint>

#include "simd.h"

namespace sostenuto {

constexpr int64_t kTileSteps = 16, kTileRows = 16;

#if defined(SOSTENUTO_AMX)

constexpr int64_t kMostTileRows = 2 * kTileRows;  // that share each load of weights

// Rows to be multiplied, and where their sums go. Strides in bytes.
struct TileRows {
    const char* data;
    int64_t stride;
    int64_t count;  // at most kMostTileRows
    char* sums;
    int64_t sums_stride;
};

struct TilePanel {
    const char* weights;
    int64_t vectors;  // of outputs, at most four
    int64_t tiles;    // along the inputs
};

// What memory is asked for meanwhile.
struct Prefetch {
    const char* data;
    int64_t bytes;
};

// sums = rows x weights.
template <bool bytes>
void multiply_tiles(const TileRows& rows, const TilePanel& panel, const Prefetch& prefetch);

#endif

// To be called by whoever may have used tiles: they are part of what a switch of threads saves.
void release_tiles();

}  // namespace sostenuto
