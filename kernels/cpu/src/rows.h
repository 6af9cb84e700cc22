// Rows of activations: how the operators read, write and allocate them.

#pragma once

#include <algorithm>

#include "simd.h"
#include "sostenuto.h"

namespace sostenuto {

using Rows = sostenuto_rows;

// What bfloat16 weights read where no instruction multiplies bfloat16: rows of floats that are such numbers.
constexpr int32_t kRounded = 16;  // beside the formats of sostenuto.h

inline int64_t item_bytes(int32_t format) {
    switch (format) {
        case SOSTENUTO_INT8: return 1;
        case SOSTENUTO_BFLOAT16:
        case SOSTENUTO_FLOAT16: return 2;
        default: return 4;
    }
}

// The states of one layer.
struct LayerStates {
    char* data;
    int64_t slot_bytes;
    int32_t format;

    LayerStates(const sostenuto_states& all, int64_t layer)
        : data(static_cast<char*>(all.data) + layer * all.layer_stride * item_bytes(all.format)),
          slot_bytes(all.slot_stride * item_bytes(all.format)),
          format(all.format) {}
    void* slot(int64_t index) const { return data + index * slot_bytes; }
};

// The weights of one step of a product, for one output.
inline int64_t depth(int32_t format) { return format == kRounded ? 2 : 4 / item_bytes(format); }

// How many inputs a product runs over at least: weights, and rows that are multiplied, are padded to it with zeros. Tile
// registers take 64 bytes of a row.
inline int64_t grain(int32_t format) {
    const bool in_tiles = kHasTiles && (format == SOSTENUTO_BFLOAT16 || format == SOSTENUTO_INT8);
    return in_tiles ? 16 * depth(format) : depth(format);
}

// The format of the rows that such weights are given: what their instructions read, or the exact one, to be quantised.
inline int32_t readable_by(int32_t weights) {
    switch (weights) {
        case SOSTENUTO_INT8: return SOSTENUTO_FLOAT32;
        case SOSTENUTO_BFLOAT16: return kMultipliesBf16 ? SOSTENUTO_BFLOAT16 : kRounded;
        default: return weights;
    }
}

inline vec get(const Rows& rows, int64_t row, int64_t c, int64_t n) {
    const int64_t i = row * rows.stride + c;
    return rows.format == SOSTENUTO_BFLOAT16 ? load_first(static_cast<const bf16*>(rows.data) + i, n)
                                             : load_first(static_cast<const float*>(rows.data) + i, n);
}

inline float get_one(const Rows& rows, int64_t row, int64_t c) {
    const int64_t i = row * rows.stride + c;
    return rows.format == SOSTENUTO_BFLOAT16 ? from_bf16(static_cast<const bf16*>(rows.data)[i])
                                             : static_cast<const float*>(rows.data)[i];
}

inline void put(const Rows& rows, int64_t row, int64_t c, vec value, int64_t n) {
    const int64_t i = row * rows.stride + c;
    if (rows.format == SOSTENUTO_BFLOAT16) {
        store_first(static_cast<bf16*>(rows.data) + i, value, n);
    } else {
        store_first(static_cast<float*>(rows.data) + i, rows.format == kRounded ? round_to_bf16(value) : value, n);
    }
}

// Zero what lies between a row's width and its stride, so that a product may run over it.
inline void zero_padding(const Rows& rows, int64_t row, int64_t width) {
    for (int64_t c = width; c < rows.stride; ++c) put(rows, row, c, vec{}, 1);
}

// The values of a row in the form that int8 weights read, written vector by vector.
inline int64_t quantised_width(int64_t width) { return round_up(width, std::max<int64_t>(W, grain(SOSTENUTO_INT8))); }

constexpr int64_t kLine = 64;  // bytes that a cache keeps together

// Ask for some columns of a row before they are read, or written: a few lines of many long rows are what no hardware
// foresees. Rows beyond the last may be named. (Inlined always: a function that only asks counts as one without effect.)
enum Use { kToRead, kToWrite };
constexpr int64_t kAhead = 2;  // rows between asking and using, where rows follow each other
template <Use use>
__attribute__((always_inline)) inline void fetch(const Rows& rows, int64_t row, int64_t begin, int64_t end) {
    const int64_t item = item_bytes(rows.format);
    const char* at = static_cast<const char*>(rows.data) + row * rows.stride * item;
    for (int64_t i = begin * item; i < end * item; i += kLine) __builtin_prefetch(at + i, use, 3);
}

// An odd number of lines, so that the same column of 16 rows lies in 16 different parts of a cache.
inline int64_t to_odd_lines(int64_t bytes) { return round_up(bytes + kLine, 2 * kLine) - kLine; }

// Cuts one allocation into pieces, 64-byte aligned. Made twice with the same takes: first to measure, then to cut.
class Arena {
   public:
    explicit Arena(void* memory = nullptr) : next_(static_cast<char*>(memory)) {}

    Rows rows(int64_t num_rows, int64_t width, int32_t format) {
        const bool in_tiles = grain(format) > depth(format);
        const int64_t bytes = round_up(width, grain(format)) * item_bytes(format);
        const int64_t stride = (in_tiles ? to_odd_lines(bytes) : bytes) / item_bytes(format);
        return {take(num_rows * stride * item_bytes(format)), stride, format};
    }
    // Rows in the form that int8 weights read: two bytes a value, and the row's scale.
    Rows quantised(int64_t num_rows, int64_t width) {
        const int64_t values = quantised_width(width), scale = static_cast<int64_t>(sizeof(float));
        const int64_t stride = kHasTiles ? 2 * to_odd_lines(values + scale) : round_up(2 * values + scale, kLine);
        return {take(num_rows * stride), stride, SOSTENUTO_INT8};
    }
    int64_t used() const { return used_; }

   private:
    void* take(int64_t bytes) {
        void* piece = next_ == nullptr ? nullptr : next_ + used_;
        used_ += round_up(bytes, kLine);
        return piece;
    }

    char* next_;
    int64_t used_ = 0;
};

}  // namespace sostenuto
