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

// to[i] = exp((logits[i] - shift) * scale), and 0 where that is next to nothing.
void exponentials(const float* logits, int64_t count, float shift, float scale, float* to) {
    for (int64_t i = 0; i < count; i += W) {
        const vec x = (load_first(logits + i, count - i) - shift) * scale;
        store_first(to + i, x < -87.0f ? vec{} : exp(x), count - i);
    }
}

// Zero the weights whose likelihood is below the cutoff; return the sum of the others, and of each block of them.
double keep_likely(float* weights, const float* likelihoods, int64_t count, float cutoff, double* sums) {
    double total = 0;
    for (int64_t begin = 0; begin < count; begin += kBlock) {
        const int64_t end = std::min(count, begin + kBlock);
        vec block{};
        for (int64_t i = begin; i < end; i += W) {
            const vec likelihood = load_first(likelihoods + i, end - i);
            const vec kept = likelihood < cutoff ? vec{} : load_first(weights + i, end - i);
            store_first(weights + i, kept, end - i);
            block = block + kept;
        }
        sums[begin / kBlock] = sum(block);
        total += sums[begin / kBlock];
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

// Copies the values >= bound to `to`, in order; returns how many.
int64_t keep_at_least(const float* values, int64_t count, float bound, float* to) {
    int64_t kept = 0, i = 0;
#if defined(SOSTENUTO_AVX512)
    for (; i + W <= count; i += W) {
        const __m512 v = load(values + i);
        const __mmask16 mask = _mm512_cmp_ps_mask(v, _mm512_set1_ps(bound), _CMP_GE_OQ);
        if (mask == 0) continue;
        const vec packed = _mm512_maskz_compress_ps(mask, v);  // straight to memory it is slow on some machines
        const int n = __builtin_popcount(mask);
        store_first(to + kept, packed, n);
        kept += n;
    }
#else
    for (; i + W <= count; i += W) {
        if (!any(load(values + i) >= broadcast(bound))) continue;  // hardly any is
        for (int64_t j = i; j < i + W; ++j)
            if (values[j] >= bound) to[kept++] = values[j];
    }
#endif
    for (; i < count; ++i)
        if (values[i] >= bound) to[kept++] = values[i];
    return kept;
}

// The least likelihood that is among the `top_k` greatest and in the smallest set of greatest whose sum exceeds `mass`.
float truncation(const Scratch& scratch, int64_t count, int64_t top_k, double mass) {
    for (const float bound : {0x1p-1f, 0x1p-3f, 0x1p-6f, 0x1p-12f, 0.0f}) {  // the few most likely nearly always decide
        const int64_t num_kept = keep_at_least(scratch.likelihoods, count, bound, scratch.weights);
        double sum = 0;
        for (int64_t i = 0; i < num_kept; ++i) sum += scratch.weights[i];
        if (num_kept < top_k && sum <= mass) continue;
        const float cutoff = rank_cutoff(scratch.weights, num_kept, top_k, mass);
        if (cutoff != kNever) return cutoff;
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

    exponentials(logits, V, most, 1, scratch.likelihoods);
    float cutoff = static_cast<float>(rule.min_p);  // the most likely token's likelihood is 1
    const int64_t top_k = rule.top_k > 0 ? static_cast<int64_t>(rule.top_k) : V;
    const double top_p = rule.top_p;
    if (top_k < V || top_p < 1) {
        const double total = keep_likely(scratch.likelihoods, scratch.likelihoods, V, 0, scratch.sums);
        cutoff = std::max(cutoff, truncation(scratch, V, top_k, top_p < 1 ? top_p * total : 2 * total));
    }
    float* weights = scratch.likelihoods;
    if (temperature != 1) {
        weights = scratch.weights;
        exponentials(logits, V, most, std::min(1 / temperature, 1e30f), weights);
    }
    const double total = keep_likely(weights, scratch.likelihoods, V, cutoff, scratch.sums);
    return find(weights, scratch.sums, V, rule.uniform * total);
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
