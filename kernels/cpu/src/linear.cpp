#include "linear.h"

#include <algorithm>
#include <cstring>

namespace sostenuto {

namespace {

constexpr int kPanel = 64;               // outputs of a panel
constexpr int kVectors = kPanel / W;     // vectors of a panel's step
constexpr int64_t kBlockBytes = 96 << 10;  // of weights, worked through by all rows before the next: stays in L2
constexpr int64_t kRowsPerTask = 48;     // their sums, 12 KB, stay in L1

// Rows x vectors of sums that fit the target's registers, with room for the weights and an activation.
#if defined(SOSTENUTO_AVX512)
constexpr int kTileRows = 6, kTileVectors = 4;
#elif defined(SOSTENUTO_AVX2)
constexpr int kTileRows = 4, kTileVectors = 2;
#else
constexpr int kTileRows = 4, kTileVectors = 4;
#endif

// How one format multiplies: `Step` is what one activation load brings for all lanes.
struct Float32 {
    using Step = float;
    static constexpr int depth = 1;
    static vec dot(vec sum, const Step* weights, Step x) { return fma(load(weights), broadcast(x), sum); }
};

struct BFloat16 {
    using Step = uint32_t;  // two values
    static constexpr int depth = 2;
    static vec dot(vec sum, const Step* weights, Step x) {
#if defined(SOSTENUTO_AVX512) && defined(__AVX512BF16__)
        return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(weights), (__m512bh)_mm512_set1_epi32(x));
#else
        ivec pairs;
        memcpy(&pairs, weights, sizeof pairs);
        const ivec low = pairs << 16, high = pairs & static_cast<int32_t>(0xffff0000);
        sum = fma((vec)high, broadcast(from_bf16(x >> 16)), sum);
        return fma((vec)low, broadcast(from_bf16(x & 0xffff)), sum);
#endif
    }
};

// sums[R][V * W] += weights of `steps` steps times R rows. The sums live in registers for the length of the block.
template <typename F, int R, int V>
void tile(const typename F::Step* x, int64_t x_stride, const typename F::Step* weights, int64_t panel_width,
          int64_t steps, float* sums, const char* prefetch, int64_t prefetch_stride) {
    vec s[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) s[r][v] = load(sums + r * kPanel + v * W);
    for (int64_t k = 0; k < steps; ++k) {
        if (prefetch_stride > 0) {
            for (int64_t line = 0; line < prefetch_stride; line += 64)
                __builtin_prefetch(prefetch + k * prefetch_stride + line, 0, 2);
        }
        for (int r = 0; r < R; ++r) {
            const typename F::Step value = x[r * x_stride + k];
            for (int v = 0; v < V; ++v) s[r][v] = F::dot(s[r][v], weights + k * panel_width + v * W, value);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store(sums + r * kPanel + v * W, s[r][v]);
}

template <typename F>
using TileFunction = decltype(&tile<F, 1, 1>);

template <typename F, int V>
TileFunction<F> tile_for_rows(int rows) {
    switch (rows) {
        case 1: return tile<F, 1, V>;
        case 2: return tile<F, 2, V>;
        case 3: return tile<F, 3, V>;
        case 4: return tile<F, 4, V>;
        case 5: return tile<F, 5, V>;
        default: return tile<F, 6, V>;
    }
}

template <typename F>
TileFunction<F> choose_tile(int rows, int vectors) {
    switch (vectors) {
        case 1: return tile_for_rows<F, 1>(rows);
        case 2: return tile_for_rows<F, 2>(rows);
        case 3: return tile_for_rows<F, 3>(rows);
        default: return tile_for_rows<F, 4>(rows);
    }
}

void finish(const float* sums, int64_t first_row, int64_t num_rows, int64_t first, int64_t width, const Output& y) {
    for (int64_t r = 0; r < num_rows; ++r) {
        const int64_t row = first_row + r;
        for (int64_t c = 0; c < width; c += W) {
            const int64_t n = std::min<int64_t>(W, width - c);
            vec value = load(sums + r * kPanel + c);
            if (y.bias != nullptr) value = value + load_first(y.bias + first + c, n);
            value = activate(value, y.activation);
            if (y.add) value = value + get(y.rows, row, first + c, n);
            put(y.rows, row, first + c, value, n);
        }
    }
}

// One panel times some rows. `kTileRows` rows share each load of weights; all groups of rows work through a block of
// weights before the next block, which meanwhile is prefetched: it is next in memory.
template <typename F>
void multiply_panel(Member& me, const Product& product, int64_t panel, int64_t first_row, int64_t num_rows) {
    using Step = typename F::Step;
    const Matrix& m = product.weight;
    const int64_t steps = round_up(m.in, F::depth) / F::depth;
    const int64_t outputs = std::min<int64_t>(kPanel, m.out - panel * kPanel);
    const int64_t width = round_up(outputs, W);
    const Step* weights = static_cast<const Step*>(m.data) + panel * kPanel * steps;
    const Step* x = static_cast<const Step*>(product.x.data) + first_row * (product.x.stride / F::depth);
    const int64_t x_stride = product.x.stride / F::depth;

    float* sums = static_cast<float*>(me.scratch(kRowsPerTask * kPanel * sizeof(float)));
    memset(sums, 0, num_rows * kPanel * sizeof(float));
    const int64_t groups = (num_rows + kTileRows - 1) / kTileRows;
    const int64_t block = std::max<int64_t>(1, kBlockBytes / (width * static_cast<int64_t>(sizeof(Step))));
    const int64_t line_bytes = width * sizeof(Step);
    for (int64_t k = 0; k < steps; k += block) {
        const int64_t length = std::min(block, steps - k);
        const char* next = reinterpret_cast<const char*>(weights + (k + length) * width);
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t begin = num_rows * g / groups, rows = num_rows * (g + 1) / groups - begin;
            const int64_t share = line_bytes / 64 * (g + 1) / groups - line_bytes / 64 * g / groups;
            const char* prefetch = next + line_bytes / 64 * g / groups * length * 64;
            for (int64_t v = 0; v < width / W; v += kTileVectors) {
                const int vectors = static_cast<int>(std::min<int64_t>(kTileVectors, width / W - v));
                choose_tile<F>(static_cast<int>(rows), vectors)(
                    x + begin * x_stride + k, x_stride, weights + k * width + v * W, width, length,
                    sums + begin * kPanel + v * W, prefetch, v == 0 ? share * 64 : 0);
            }
        }
    }
    finish(sums, first_row, num_rows, panel * kPanel, outputs, product.y);
}

int64_t panels(const Matrix& m) { return (m.out + kPanel - 1) / kPanel; }

template <typename Item>
void pack_panel(const Item* weight, int64_t row_stride, const Matrix& m, int64_t panel, Item* packed) {
    const int64_t d = depth(m.format), steps = round_up(m.in, d) / d;
    const int64_t outputs = std::min<int64_t>(kPanel, m.out - panel * kPanel), width = round_up(outputs, W);
    Item* to = packed + panel * kPanel * steps * d;
    for (int64_t k = 0; k < steps; ++k)
        for (int64_t o = 0; o < width; ++o)
            for (int64_t i = 0; i < d; ++i) {
                const bool inside = o < outputs && k * d + i < m.in;
                *to++ = inside ? weight[(panel * kPanel + o) * row_stride + k * d + i] : Item{};
            }
}

}  // namespace

vec activate(vec x, int32_t activation) {
    switch (activation) {
        case SOSTENUTO_TANH: return tanh(x);
        case SOSTENUTO_SIGMOID: return sigmoid(x);
        case SOSTENUTO_RELU_SQUARED: {
            const vec positive = max(x, vec{});
            return positive * positive;
        }
        default: return x;
    }
}

int64_t packed_bytes(int64_t out, int64_t in, int32_t format) {
    return round_up(out, W) * round_up(in, depth(format)) * item_bytes(format);
}

void pack(Member& me, const void* weight, int64_t row_stride, const Matrix& m) {
    me.share(panels(m), [&](int64_t panel) {
        if (m.format == SOSTENUTO_BFLOAT16) {
            pack_panel(static_cast<const bf16*>(weight), row_stride, m, panel,
                       static_cast<bf16*>(m.data));
        } else {
            pack_panel(static_cast<const float*>(weight), row_stride, m, panel,
                       static_cast<float*>(m.data));
        }
    });
}

void multiply(Member& me, const Product* products, int num_products, int64_t num_rows) {
    const int64_t row_tasks = (num_rows + kRowsPerTask - 1) / kRowsPerTask;
    int64_t count = 0;
    for (int i = 0; i < num_products; ++i) count += panels(products[i].weight) * row_tasks;
    me.share(count, [&](int64_t task) {
        const Product* product = products;
        while (task >= panels(product->weight) * row_tasks) task -= panels(product++->weight) * row_tasks;
        const int64_t panel = task / row_tasks, part = task % row_tasks;
        const int64_t begin = num_rows * part / row_tasks, rows = num_rows * (part + 1) / row_tasks - begin;
        if (product->weight.format == SOSTENUTO_BFLOAT16) {
            multiply_panel<BFloat16>(me, *product, panel, begin, rows);
        } else {
            multiply_panel<Float32>(me, *product, panel, begin, rows);
        }
    });
}

}  // namespace sostenuto
