#include "logprobs.h"

#include <algorithm>
#include <cmath>

#include "row.h"

namespace sostenuto {

namespace {

constexpr int kGroup = 4;  // vectors looked at together

struct Candidate {
    float value;
    int64_t id;
};

bool is_better(const Candidate& a, const Candidate& b) { return a.value != b.value ? a.value > b.value : a.id < b.id; }

// Whether one of `kGroup` vectors from `p` on has a value above the bound.
bool any_above(const float* p, float bound) {
    vec most = load(p);
    for (int i = 1; i < kGroup; ++i) most = max(load(p + i * W), most);
    return any(most > broadcast(bound));
}

// The greatest values among those of ids that are not excluded, in order; of equal ones the lowest id first. What is kept
// so far is a heap with the worst on top, and most of a row is not better than that.
void most_likely(const sostenuto_logprobs& asked, const float* logits, Candidate* kept) {
    const int64_t *excluded = asked.excluded_ids, *end = excluded + asked.num_excluded;
    int64_t count = 0;
    const auto consider = [&](int64_t id) {
        const Candidate candidate{logits[id], id};
        if (count == asked.num_top && !is_better(candidate, kept[0])) return;
        if (std::binary_search(excluded, end, id)) return;
        if (count == asked.num_top) std::pop_heap(kept, kept + count--, is_better);
        kept[count++] = candidate;
        std::push_heap(kept, kept + count, is_better);
    };
    int64_t id = 0;
    while (id < asked.vocab_size) {
        if (count == asked.num_top && id + kGroup * W <= asked.vocab_size && !any_above(logits + id, kept[0].value)) {
            id += kGroup * W;
            continue;
        }
        const int64_t last = std::min<int64_t>(asked.vocab_size, id + kGroup * W);
        while (id < last) consider(id++);
    }
    std::sort_heap(kept, kept + count, is_better);
}

}  // namespace

void logprobs(Member& me, const sostenuto_logprobs& asked) {
    me.share(asked.num_rows, [&](int64_t row) {
        const float* logits = asked.logits + row * asked.stride;
        const double log_total = log_sum_exp(logits, asked.vocab_size);
        const auto logprob = [&](float logit) { return static_cast<float>(logit - log_total); };
        asked.own[row] = logprob(logits[asked.token_ids[row]]);
        if (asked.num_top == 0) return;
        Candidate* kept = static_cast<Candidate*>(me.scratch(asked.num_top * sizeof(Candidate)));
        most_likely(asked, logits, kept);
        for (int64_t i = 0; i < asked.num_top; ++i) {
            asked.top[row * asked.num_top + i] = logprob(kept[i].value);
            asked.top_ids[row * asked.num_top + i] = kept[i].id;
        }
    });
}

}  // namespace sostenuto
