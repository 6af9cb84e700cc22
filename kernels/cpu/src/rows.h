// Rows of activations: how the operators read, write and allocate them.

#pragma once

#include "simd.h"
#include "sostenuto.h"

namespace sostenuto {

using Rows = sostenuto_rows;

// What bfloat16 weights read where no instruction multiplies bfloat16: rows of floats that are such numbers.
constexpr int32_t kRounded = 16;  // beside the formats of sostenuto.h

inline int64_t item_bytes(int32_t format) {
    switch (format) {
        case SOSTENUTO_INT8: return 1;
        case SOSTENUTO_BFLOAT16: return 2;
        default: return 4;
    }
}

// The weights of one step of a product; rows that are multiplied are padded to it with zeros.
inline int64_t depth(int32_t format) { return format == kRounded ? 2 : 4 / item_bytes(format); }

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

// Cuts one allocation into pieces, 64-byte aligned. Made twice with the same takes: first to measure, then to cut.
class Arena {
   public:
    explicit Arena(void* memory = nullptr) : next_(static_cast<char*>(memory)) {}

    Rows rows(int64_t num_rows, int64_t width, int32_t format) {
        const int64_t stride = round_up(width, depth(format));
        return {take(num_rows * stride * item_bytes(format)), stride, format};
    }
    // Rows in the form that int8 weights read: two bytes a value, then the row's scale.
    Rows quantised(int64_t num_rows, int64_t width) {
        const int64_t stride = round_up(2 * round_up(width, 4) + static_cast<int64_t>(sizeof(float)), 64);
        return {take(num_rows * stride), stride, SOSTENUTO_INT8};
    }
    int64_t used() const { return used_; }

   private:
    void* take(int64_t bytes) {
        void* piece = next_ == nullptr ? nullptr : next_ + used_;
        used_ += round_up(bytes, 64);
        return piece;
    }

    char* next_;
    int64_t used_ = 0;
};

}  // namespace sostenuto
