#include "tiles.h"

namespace sostenuto {

#if defined(SOSTENUTO_AMX)

namespace {

constexpr int64_t kTileBytes = 64, kTile = 1024;  // of a row, of 16
constexpr int64_t kLine = 64, kFetch = 256;       // of the processor's caches, and what one request brings

// The shapes of the eight registers, as the processor reads them.
struct alignas(64) Shapes {
    uint8_t palette = 1, first_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    Shapes(int64_t upper, int64_t lower) {
        const int64_t alone[] = {upper, upper, upper, upper, upper, kTileRows, kTileRows, kTileRows};
        const int64_t both[] = {upper, upper, lower, lower, upper, lower, kTileRows, kTileRows};
        for (int tile = 0; tile < 8; ++tile) {
            row_bytes[tile] = kTileBytes;
            rows[tile] = static_cast<uint8_t>(lower == 0 ? alone[tile] : both[tile]);
        }
    }
};

// What this thread's registers are shaped for: shaping them again costs as much as reading some kilobytes.
thread_local int64_t shaped_upper = 0, shaped_lower = 0;

void shape(int64_t upper, int64_t lower) {
    if (shaped_upper == upper && shaped_lower == lower) return;
    const Shapes shapes(upper, lower);
    asm volatile("ldtilecfg %0" ::"m"(shapes));
    shaped_upper = upper;
    shaped_lower = lower;
}

// Asks for a little at every step, so that memory is busy all the time. A request for one line of four brings the
// others, too, and leaves the processor's few places for outstanding lines to the loads.
class Fetcher {
   public:
    Fetcher(const Prefetch& what, int64_t steps) : next_(what.data), rate_(what.bytes / steps) {}
    void step() {
        for (due_ += rate_; due_ >= kFetch; due_ -= kFetch, next_ += kFetch) __builtin_prefetch(next_, 0, 2);
    }

   private:
    const char* next_;
    int64_t rate_, due_ = 0;
};

// Weights that come from memory: the lines just ahead, in the same page, keep its own prefetcher going.
inline void fetch_ahead(const char* weights, int64_t vectors) {
    for (int64_t i = 0; i < vectors * kTile; i += kLine) __builtin_prefetch(weights + kTile + i, 0, 3);
}

#define SOSTENUTO_DOT(sums, rows, weights)   \
    if constexpr (bytes) {                   \
        _tile_dpbusd(sums, rows, weights);   \
    } else {                                 \
        _tile_dpbf16ps(sums, rows, weights); \
    }

// Up to 16 rows, all outputs in one pass.
template <bool bytes>
void multiply_one(const TileRows& rows, const TilePanel& panel) {
    const int64_t vectors = panel.vectors;
    const char *x = rows.data, *w = panel.weights;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < panel.tiles; ++k, x += kTileBytes, w += vectors * kTile) {
        fetch_ahead(w, vectors);
        _tile_loadd(4, x, rows.stride);
        _tile_loadd(5, w, kTileBytes);
        SOSTENUTO_DOT(0, 4, 5)
        if (vectors > 1) {
            _tile_loadd(6, w + kTile, kTileBytes);
            SOSTENUTO_DOT(1, 4, 6)
        }
        if (vectors > 2) {
            _tile_loadd(7, w + 2 * kTile, kTileBytes);
            SOSTENUTO_DOT(2, 4, 7)
        }
        if (vectors > 3) {
            _tile_loadd(5, w + 3 * kTile, kTileBytes);
            SOSTENUTO_DOT(3, 4, 5)
        }
    }
    _tile_stored(0, rows.sums, rows.sums_stride);
    if (vectors > 1) _tile_stored(1, rows.sums + kTileBytes, rows.sums_stride);
    if (vectors > 2) _tile_stored(2, rows.sums + 2 * kTileBytes, rows.sums_stride);
    if (vectors > 3) _tile_stored(3, rows.sums + 3 * kTileBytes, rows.sums_stride);
}

// More rows, the first `upper` of them in one tile; one or two vectors of outputs, from vector `first` on.
template <bool bytes>
void multiply_two(const TileRows& rows, int64_t upper, const TilePanel& panel, int64_t first, Fetcher fetcher) {
    const bool both = first + 1 < panel.vectors;
    const char *x = rows.data, *y = x + upper * rows.stride, *w = panel.weights + first * kTile;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < panel.tiles; ++k, x += kTileBytes, y += kTileBytes, w += panel.vectors * kTile) {
        fetcher.step();
        _tile_loadd(6, w, kTileBytes);
        _tile_loadd(4, x, rows.stride);
        SOSTENUTO_DOT(0, 4, 6)
        _tile_loadd(5, y, rows.stride);
        SOSTENUTO_DOT(2, 5, 6)
        if (both) {
            _tile_loadd(7, w + kTile, kTileBytes);
            SOSTENUTO_DOT(1, 4, 7)
            SOSTENUTO_DOT(3, 5, 7)
        }
    }
    char *to = rows.sums + first * kTileBytes, *to_lower = to + upper * rows.sums_stride;
    _tile_stored(0, to, rows.sums_stride);
    _tile_stored(2, to_lower, rows.sums_stride);
    if (both) {
        _tile_stored(1, to + kTileBytes, rows.sums_stride);
        _tile_stored(3, to_lower + kTileBytes, rows.sums_stride);
    }
}

#undef SOSTENUTO_DOT

}  // namespace

template <bool bytes>
void multiply_tiles(const TileRows& rows, const TilePanel& panel, const Prefetch& prefetch) {
    asm volatile("" ::: "memory");  // the intrinsics do not say what they read
    if (rows.count <= kTileRows) {
        shape(rows.count, 0);
        return multiply_one<bytes>(rows, panel);
    }
    const int64_t upper = (rows.count + 1) / 2;
    shape(upper, rows.count - upper);
    const int64_t passes = (panel.vectors + 1) / 2, part = prefetch.bytes / passes;
    for (int64_t i = 0; i < passes; ++i)
        multiply_two<bytes>(rows, upper, panel, 2 * i, Fetcher({prefetch.data + i * part, part}, panel.tiles));
}

template void multiply_tiles<true>(const TileRows&, const TilePanel&, const Prefetch&);
template void multiply_tiles<false>(const TileRows&, const TilePanel&, const Prefetch&);

#endif

void release_tiles() {
#if defined(SOSTENUTO_AMX)
    if (shaped_upper == 0) return;
    _tile_release();
    shaped_upper = 0;
#endif
}

}  // namespace sostenuto
