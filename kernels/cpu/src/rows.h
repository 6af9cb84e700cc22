// Rows of activations: how the operators read, write and allocate them.

#pragma once

#include "simd.h"
#include "sostenuto.h"

namespace sostenuto {

using Rows = sostenuto_rows;

inline int64_t item_bytes(int32_t format) { return format == SOSTENUTO_BFLOAT16 ? 2 : 4; }

// The weights one multiply instruction consumes along `in`; rows that are multiplied are padded to it with zeros.
inline int64_t depth(int32_t format) { return format == SOSTENUTO_BFLOAT16 ? 2 : 1; }

inline vec get(const Rows& rows, int64_t row, int64_t c, int64_t n) {
    const int64_t i = row * rows.stride + c;
    return rows.format == SOSTENUTO_BFLOAT16 ? load_first(static_cast<const bf16*>(rows.data) + i, n)
                                             : load_first(static_cast<const float*>(rows.data) + i, n);
}

inline void put(const Rows& rows, int64_t row, int64_t c, vec value, int64_t n) {
    const int64_t i = row * rows.stride + c;
    if (rows.format == SOSTENUTO_BFLOAT16) {
        store_first(static_cast<bf16*>(rows.data) + i, value, n);
    } else {
        store_first(static_cast<float*>(rows.data) + i, value, n);
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
