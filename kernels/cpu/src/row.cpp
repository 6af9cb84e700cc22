#include "row.h"

#include <algorithm>
#include <cmath>

namespace sostenuto {

float greatest(const float* logits, int64_t count) {
    vec most = broadcast(logits[0]), doubt{};
    int64_t i = 0;
    for (; i + W <= count; i += W) {
        const vec x = load(logits + i);
        most = max(most, x);
        doubt = doubt + (x == x ? vec{} : x);  // 0 as long as every x equals itself
    }
    float lanes[W], result = logits[0];
    store(lanes, most + doubt);
    const auto consider = [&](float x) { result = x > result || x != x ? x : result; };
    std::for_each(lanes, lanes + W, consider);
    std::for_each(logits + i, logits + count, consider);
    return result;
}

double log_sum_exp(const float* logits, int64_t count) {
    const float most = greatest(logits, count);
    double total = 0;
    for (int64_t begin = 0; begin < count; begin += kBlock) {
        const int64_t end = std::min(count, begin + kBlock);
        vec block{};
        for (int64_t i = begin; i < end; i += W) {
            const vec x = load_first(logits + i, end - i) - most;
            block = block + first_lanes(x < -87.0f ? vec{} : exp(x), end - i);
        }
        total += sum(block);
    }
    return std::isfinite(most) ? most + std::log(total) : NAN;
}

}  // namespace sostenuto
