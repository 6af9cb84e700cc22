#include "shift_mix.h"

#include <algorithm>
#include <cstring>

#include "layer_norm.h"

namespace sostenuto {

namespace {

constexpr int64_t kChannels = 128;  // of a mixing task

void mix_channels(const sostenuto_batch& batch, int64_t begin, int64_t end, int64_t width, float* shift,
                  int64_t slot_stride, const float* mix, int num_mixes, const Rows* out, const Rows& h) {
    const float* rows = static_cast<const float*>(h.data);
    for (int64_t b = 0; b < batch.num_sequences; ++b) {
        float* kept = shift + batch.slots[b] * slot_stride;
        const float* previous = kept;
        if (b + kAhead < batch.num_sequences)
            fetch<kToRead>({shift, slot_stride, SOSTENUTO_FLOAT32}, batch.slots[b + kAhead], begin, end);
        for (int64_t t = batch.starts[b]; t < batch.starts[b + 1]; ++t) {
            const float* now = rows + t * h.stride;
            for (int m = 0; m < num_mixes; ++m) fetch<kToWrite>(out[m], t + kAhead, begin, end);
            for (int64_t c = begin; c < end; c += W) {
                const int64_t n = end - c;
                const vec value = load_first(now + c, n), change = load_first(previous + c, n) - value;
                for (int m = 0; m < num_mixes; ++m)
                    put(out[m], t, c, fma(change, load_first(mix + m * width + c, n), value), n);
            }
            previous = now;
        }
        memcpy(kept + begin, previous + begin, (end - begin) * sizeof(float));
    }
}

}  // namespace

void shift_mix(Member& me, const sostenuto_batch& batch, const Rows& x, int64_t width, const sostenuto_norm& norm,
               float* shift, int64_t slot_stride, const float* mix, int num_mixes, const Rows* out, const Rows& h) {
    me.share(batch.num_tokens, [&](int64_t row) { layer_norm(x, row, width, norm, h, row); });
    // Cut by channels, not by tokens: then whoever reads a kept row is also the one who replaces it.
    me.share((width + kChannels - 1) / kChannels, [&](int64_t task) {
        const int64_t begin = task * kChannels;
        mix_channels(batch, begin, std::min(width, begin + kChannels), width, shift, slot_stride, mix, num_mixes, out,
                     h);
    });
}

}  // namespace sostenuto
