#include "layer_norm.h"

#include <cmath>

namespace sostenuto {

void layer_norm(const Rows& x, int64_t row, int64_t width, const sostenuto_norm& norm, const Rows& to, int64_t to_row) {
    vec sums{};
    for (int64_t c = 0; c < width; c += W) sums = sums + get(x, row, c, width - c);
    const vec mean = broadcast(sum(sums) / static_cast<float>(width));
    vec squares{};
    for (int64_t c = 0; c < width; c += W) {
        const vec d = first_lanes(get(x, row, c, width - c) - mean, width - c);
        squares = fma(d, d, squares);
    }
    const vec scale = broadcast(1.0f / std::sqrt(sum(squares) / static_cast<float>(width) + norm.eps));
    for (int64_t c = 0; c < width; c += W) {
        const int64_t n = width - c;
        const vec normal = (get(x, row, c, n) - mean) * scale;
        put(to, to_row, c, fma(normal, load_first(norm.weight + c, n), load_first(norm.bias + c, n)), n);
    }
}

}  // namespace sostenuto
