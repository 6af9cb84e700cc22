#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "row.h"

namespace sostenuto {

namespace {

constexpr int64_t kFew = 64;      // values that are sorted rather than divided further

constexpr float kNever = -1;

// One row's room.
struct Scratch {
    float* likelihoods;  // [V] exp(logit - greatest logit)
    float* weights;      // [V] what is drawn from
    double* sums;        // of each block of weights
};

// exp((logit - shift) * scale), and 0 where that is next to nothing.
inline vec weight_of(const float* logit, int64_t n, float shift, float scale) {
    const vec x = (load_first(logit, n) - shift) * scale;
    return first_lanes(x < -87.0f ? vec{} : exp(x), n);
}

// Calls `weight(i, n)` for every vector of n values from i on; keeps the sum of each block, and returns that of all.
template <typename Weight>
double sum_blocks(int64_t count, double* sums, const Weight& weight) {
    double total = 0;
    for (int64_t begin = 0; begin < count; begin += kBlock) {
        const int64_t end = std::min(count, begin + kBlock);
        vec block{};
        int64_t i = begin;
        for (; i + W <= end; i += W) block = block + weight(i, W);
        if (i < end) block = block + weight(i, end - i);
        total += sums[begin / kBlock] = sum(block);
    }
    return total;
}

// The greatest value v of `values` such that those >= v are at least `count_wanted`, or sum to more than `mass_wanted`;
// kNever if they never do. Reorders the values: each round divides them by a pivot and keeps the side with the answer.
float rank_cutoff(float* values, int64_t count, int64_t count_wanted, double mass_wanted) {
    int64_t greater = 0;  // values known to be greater than all that are left
    double mass = 0;      // their sum
    while (count > kFew) {
        float probes[9];
        for (int i = 0; i < 9; ++i) probes[i] = values[(2 * i + 1) * count / 18];
        std::nth_element(probes, probes + 4, probes + 9);
        const float pivot = probes[4];
        float* above_end = std::partition(values, values + count, [&](float v) { return v > pivot; });
        double above = 0;
        for (float* v = values; v < above_end; ++v) above += *v;
        const int64_t num_above = above_end - values;
        if (greater + num_above >= count_wanted || mass + above > mass_wanted) {
            count = num_above;
            continue;
        }
        float* equal_end = std::partition(above_end, values + count, [&](float v) { return v == pivot; });
        const int64_t num_equal = equal_end - above_end;
        greater += num_above + num_equal;
        mass += above + static_cast<double>(num_equal) * pivot;
        if (greater >= count_wanted || mass > mass_wanted) return pivot;
        count -= num_above + num_equal;
        values = equal_end;
    }
    std::sort(values, values + count, std::greater<float>());
    for (int64_t i = 0; i < count; ++i) {
        mass += values[i];
        if (greater + i + 1 >= count_wanted || mass > mass_wanted) return values[i];
    }
    return kNever;
}

// Copies the values in [bound, limit) to `to`, in order; returns how many.
int64_t keep_between(const float* values, int64_t count, float bound, float limit, float* to) {
    int64_t kept = 0, i = 0;
#if defined(SOSTENUTO_AVX512)
    for (; i + W <= count; i += W) {
        const __m512 v = load(values + i);
        const __mmask16 mask = _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(v, _mm512_set1_ps(bound), _CMP_GE_OQ), v,
                                                       _mm512_set1_ps(limit), _CMP_LT_OQ);
        if (mask == 0) continue;
        const vec packed = _mm512_maskz_compress_ps(mask, v);  // straight to memory it is slow on some machines
        const int n = __builtin_popcount(mask);
        store_first(to + kept, packed, n);
        kept += n;
    }
#else
    for (; i + W <= count; i += W) {
        const vec v = load(values + i);
        if (!any((v >= broadcast(bound)) & (v < broadcast(limit)))) continue;  // hardly any is
        for (int64_t j = i; j < i + W; ++j)
            if (values[j] >= bound && values[j] < limit) to[kept++] = values[j];
    }
#endif
    for (; i < count; ++i)
        if (values[i] >= bound && values[i] < limit) to[kept++] = values[i];
    return kept;
}

// In double, four sums side by side: one would wait for each of its additions.
double precise_sum(const float* values, int64_t count) {
    double sums[4] = {};
    for (int64_t i = 0; i < count; ++i) sums[i % 4] += values[i];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// The least likelihood that is among the `top_k` greatest and in the smallest set of greatest whose sum exceeds `mass`.
// The few most likely nearly always decide; of others only those between two bounds are looked at more closely.
float truncation(const Scratch& scratch, int64_t count, int64_t top_k, double mass) {
    float limit = INFINITY;
    for (const float bound : {0x1p-1f, 0x1p-3f, 0x1p-5f, 0x1p-7f, 0x1p-9f, 0x1p-11f, 0x1p-14f, 0.0f}) {
        const int64_t num_kept = keep_between(scratch.likelihoods, count, bound, limit, scratch.weights);
        const double kept = precise_sum(scratch.weights, num_kept);
        if (num_kept >= top_k || kept > mass) {
            const float cutoff = rank_cutoff(scratch.weights, num_kept, top_k, mass);
            if (cutoff != kNever) return cutoff;
        }
        top_k -= num_kept;
        mass -= kept;
        limit = bound;
    }
    return 0;
}

// The first id whose cumulative weight exceeds `point`. An id of weight 0 is never chosen.
int64_t find(const float* weights, const double* sums, int64_t count, double point) {
    double before = 0;
    int64_t last = 0;
    for (int64_t begin = 0; begin < count; begin += kBlock) {
        const double sum = sums[begin / kBlock];
        if (sum == 0) continue;
        const int64_t end = std::min(count, begin + kBlock);
        if (before + sum > point) {
            double cumulative = before;
            for (int64_t i = begin; i < end; ++i) {
                if (weights[i] == 0) continue;
                last = i;
                cumulative += weights[i];
                if (cumulative > point) return i;
            }
            return last;  // the block's own sum was rounded up
        }
        before += sum;
        for (last = end - 1; weights[last] == 0;) --last;
    }
    return last;  // the point lies at the very end
}

// The first index of `value`, which is there.
int64_t first_index(const float* values, int64_t count, float value) {
    int64_t i = 0;
    while (i + W <= count && !any(load(values + i) == broadcast(value))) i += W;
    return std::find(values + i, values + count, value) - values;
}

int64_t sample_row(const sostenuto_sampling& s, int64_t row, const Scratch& scratch) {
    const float* logits = s.logits + row * s.stride;
    const int64_t V = s.vocab_size;
    const float most = greatest(logits, V);
    if (!std::isfinite(most)) return -1;
    const sostenuto_sampling_rule& rule = s.rules[row];
    const float temperature = static_cast<float>(rule.temperature);
    if (temperature == 0) return first_index(logits, V, most);

    float* likelihoods = scratch.likelihoods;
    double total = sum_blocks(V, scratch.sums, [&](int64_t i, int64_t n) {
        const vec likelihood = weight_of(logits + i, n, most, 1);
        store_first(likelihoods + i, likelihood, n);
        return likelihood;
    });
    float cutoff = static_cast<float>(rule.min_p);  // the most likely token's likelihood is 1
    const int64_t top_k = rule.top_k > 0 ? static_cast<int64_t>(rule.top_k) : V;
    const double top_p = rule.top_p;
    if (top_k < V || top_p < 1)
        cutoff = std::max(cutoff, truncation(scratch, V, top_k, top_p < 1 ? top_p * total : 2 * total));
    if (cutoff <= 0 && temperature == 1) return find(likelihoods, scratch.sums, V, rule.uniform * total);

    const float scale = std::min(1 / temperature, 1e30f);
    total = sum_blocks(V, scratch.sums, [&](int64_t i, int64_t n) {
        const vec likelihood = load_first(likelihoods + i, n);
        vec weight{};
        if (any(likelihood >= cutoff)) {  // after a truncation hardly any is
            weight = temperature == 1 ? likelihood : weight_of(logits + i, n, most, scale);
            weight = likelihood < cutoff ? vec{} : weight;
        }
        store_first(scratch.weights + i, weight, n);
        return weight;
    });
    return find(scratch.weights, scratch.sums, V, rule.uniform * total);
}

}  // namespace

void sample(Member& me, const sostenuto_sampling& s) {
    const int64_t width = round_up(s.vocab_size, W), blocks = (s.vocab_size + kBlock - 1) / kBlock;
    me.share(s.num_rows, [&](int64_t row) {
        float* memory = static_cast<float*>(me.scratch(2 * width * sizeof(float) + blocks * sizeof(double)));
        s.token_ids[row] = sample_row(s, row, {memory, memory + width, reinterpret_cast<double*>(memory + 2 * width)});
    });
}

}  // namespace sostenuto
