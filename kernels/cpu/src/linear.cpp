#include "linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "tiles.h"

namespace sostenuto {

namespace {

constexpr int kPanel = 64;               // outputs of a panel
#if defined(SOSTENUTO_AVX512)
constexpr int64_t kBlockBytes = 96 << 10;  // of weights, worked through by all rows before the next: stays in L2
#else
constexpr int64_t kBlockBytes = 32 << 10;  // and a tile's part of it in L1, with its rows
#endif
constexpr int64_t kActivationBytes = kHasTiles ? 5 << 18 : INT64_MAX;  // of rows that meet all weights: stay in L2
constexpr int64_t kRowsPerTask = kHasTiles ? 64 : 48;  // their sums, 12 or 16 KB, stay in L1

// How a format multiplies: a `Word` of weights belongs to one output, a `Step` of activations meets it. `step` adds the
// products of one step, R rows times V vectors of outputs, to sums in registers; `width` is the panel's.
//
// Where instructions take a word whole, all rows come by while it is in a register or memory.
template <typename F, int R, int V>
inline void whole_words(typename F::Sum (&s)[F::planes][R][V], const typename F::Step* x, int64_t x_stride,
                        const typename F::Word* weights) {
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < F::planes; ++p) {
            const typename F::Word word = x[r * x_stride].words[p];
            for (int v = 0; v < V; ++v) s[p][r][v] = F::dot(s[p][r][v], weights + v * W, word);
        }
}

// Where they do not, a word is taken apart into two factors, once for all rows, which meet the two of the activations.
// The fewer of both wait in registers.
template <typename F, int R, int V>
inline void half_words(typename F::Sum (&s)[1][R][V], const typename F::Step* x, int64_t x_stride,
                       const typename F::Word* weights) {
    using Sum = typename F::Sum;
    for (int half = 1; half >= 0; --half) {
        const auto activation = [&](int r) -> Sum { return broadcast(x[r * x_stride].factors[half]); };
        const auto weight = [&](int v) -> Sum {
            return F::factor(load(reinterpret_cast<const int32_t*>(weights) + v * W), half);
        };
        if constexpr (R < V) {
            Sum activations[R];
            for (int r = 0; r < R; ++r) activations[r] = activation(r);
            for (int v = 0; v < V; ++v) {
                const Sum w = weight(v);
                for (int r = 0; r < R; ++r) s[0][r][v] = F::add_product(s[0][r][v], w, activations[r]);
            }
        } else {
            Sum w[V];
            for (int v = 0; v < V; ++v) w[v] = weight(v);
            for (int r = 0; r < R; ++r) {
                const Sum each = activation(r);
                for (int v = 0; v < V; ++v) s[0][r][v] = F::add_product(s[0][r][v], w[v], each);
            }
        }
    }
}

struct Float32 {
    using Word = float;
    using Sum = vec;
    static constexpr int depth = 1, planes = 1;
    struct Step {
        Word words[planes];
    };
    static vec dot(vec sum, const Word* weights, Word x) { return fma(load(weights), broadcast(x), sum); }
    template <int R, int V>
    static void step(vec (&s)[planes][R][V], const Step* x, int64_t x_stride, const Word* weights) {
        whole_words<Float32, R, V>(s, x, x_stride, weights);
    }
};

struct BFloat16 {
    using Word = uint32_t;  // two values
    using Sum = vec;
    static constexpr int depth = 2, planes = 1;
#if defined(SOSTENUTO_BF16_PRODUCTS)
    struct Step {
        Word words[planes];
    };
    static vec dot(vec sum, const Word* weights, Word x) {
        return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(weights), (__m512bh)_mm512_set1_epi32(x));
    }
    template <int R, int V>
    static void step(vec (&s)[planes][R][V], const Step* x, int64_t x_stride, const Word* weights) {
        whole_words<BFloat16, R, V>(s, x, x_stride, weights);
    }
#else
    struct Step {
        float factors[2];
    };
    static vec factor(ivec pairs, int half) {
        return (vec)(half == 0 ? pairs << 16 : pairs & static_cast<int32_t>(0xffff0000));
    }
    static vec add_product(vec sum, vec weight, vec x) { return fma(weight, x, sum); }
    template <int R, int V>
    static void step(vec (&s)[planes][R][V], const Step* x, int64_t x_stride, const Word* weights) {
        half_words<BFloat16, R, V>(s, x, x_stride, weights);
    }
#endif
};

struct Int8 {
    using Word = uint32_t;  // four values, signed
    using Sum = ivec;
    static constexpr int depth = 4;
#if defined(SOSTENUTO_INT8_PRODUCTS)
    static constexpr int planes = 2;
    struct Step {
        Word words[planes];  // the upper and the lower bytes of four activations, unsigned
    };
    // Four activations a step; or, for tiles, the upper bytes of a row and then, in a row of their own, the lower ones.
    static void put(ivec q, uint8_t* row, int64_t stride, int64_t c) {
        const __m128i upper = _mm512_cvtepi32_epi8((__m512i)((q + 32896) >> 8));
        const __m128i lower = _mm512_cvtepi32_epi8((__m512i)(q + 32896));
        const auto put_16 = [&](int64_t at, __m128i bytes) { _mm_storeu_si128(reinterpret_cast<__m128i*>(row + at), bytes); };
        if (kHasTiles) {
            put_16(c, upper);
            put_16(c + stride / 2, lower);
        } else {
            put_16(2 * c, _mm_unpacklo_epi32(upper, lower));
            put_16(2 * c + 16, _mm_unpackhi_epi32(upper, lower));
        }
    }
    static ivec dot(ivec sum, const Word* weights, Word x) {
        return (ivec)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(x), _mm512_loadu_si512(weights));
    }
    template <int R, int V>
    static void step(ivec (&s)[planes][R][V], const Step* x, int64_t x_stride, const Word* weights) {
        whole_words<Int8, R, V>(s, x, x_stride, weights);
    }
#else
    static constexpr int planes = 1;  // of sums over a block, which is short enough for 32 bits
    struct Step {
        int32_t factors[2];  // four activations of 16 bits: the first and the third, the second and the fourth
    };
    static void put(ivec q, uint8_t* row, int64_t, int64_t c) {
        Step* to = reinterpret_cast<Step*>(row) + c / 4;
        for (int64_t i = 0; i < W; i += 4)
            *to++ = {{(q[i] & 0xffff) | q[i + 2] << 16, (q[i + 1] & 0xffff) | q[i + 3] << 16}};
    }
    static ivec factor(ivec four, int half) {
        const pairs upper = half == 0 ? (pairs)four << 8 : (pairs)four;
        return (ivec)(upper >> 8);
    }
    static ivec add_product(ivec sum, ivec weight, ivec x) { return sum + multiply_pairs((pairs)weight, (pairs)x); }
    template <int R, int V>
    static void step(ivec (&s)[planes][R][V], const Step* x, int64_t x_stride, const Word* weights) {
        half_words<Int8, R, V>(s, x, x_stride, weights);
    }
#endif
};

// Tiles whose sums fit the target's registers, with room for the weights and an activation: so many rows at most, and as
// many vectors of outputs as there is room for beside them. Multiply-adds take about four cycles and two begin in each,
// so a tile wants eight sums or more.
#if defined(SOSTENUTO_AVX512)
constexpr int kMostRows = 6;
constexpr int tile_vectors(int) { return 4; }
#elif defined(SOSTENUTO_AVX2)
constexpr int kMostRows = 6;
constexpr int tile_vectors(int rows) { return rows == 1 ? 8 : rows == 2 ? 4 : 2; }
#else
constexpr int kMostRows = 4;
constexpr int tile_vectors(int) { return 4; }
#endif

template <typename F>
constexpr int kTileRows = kMostRows / F::planes;

template <typename F>
using Item = std::remove_reference_t<decltype(typename F::Sum{}[0])>;

// The sums of some rows in a panel, between blocks: planes, rows, outputs.
template <typename F>
struct Sums {
    static constexpr int planes = F::planes;
    static constexpr int64_t longest_block = INT64_MAX;  // in steps

    Item<F>* data;
    Item<F>* at(int plane, int64_t row) const { return data + (row * planes + plane) * kPanel; }
    typename F::Sum begin(int plane, int64_t row, int64_t o) const { return load(at(plane, row) + o); }
    void end(int plane, int64_t row, int64_t o, typename F::Sum s) const { store(at(plane, row) + o, s); }
};

#if !defined(SOSTENUTO_INT8_PRODUCTS)
// Sums of a block, which would not fit 32 bits all together, join two: of their upper three bytes and of their lowest.
template <>
struct Sums<Int8> {
    static constexpr int planes = 2;
    static constexpr int64_t longest_block = 128;  // 4 products each, of at most 127 times 32639

    int32_t* data;
    int32_t* at(int plane, int64_t row) const { return data + (row * planes + plane) * kPanel; }
    ivec begin(int, int64_t, int64_t) const { return ivec{}; }
    void end(int, int64_t row, int64_t o, ivec s) const {
        store(at(0, row) + o, load(at(0, row) + o) + (s >> 8));
        store(at(1, row) + o, load(at(1, row) + o) + (s & 0xff));
    }
};
#endif

// sums += weights of `steps` steps times R rows from `row` on, V vectors from output `o` on. The sums live in registers
// for the length of the block. Meanwhile `prefetch_bytes` of what comes next are fetched, evenly.
template <typename F, int R, int V>
void tile(const typename F::Step* x, int64_t x_stride, const typename F::Word* weights, int64_t panel_width,
          int64_t steps, const Sums<F>& sums, int64_t row, int64_t o, const char* prefetch, int64_t prefetch_bytes) {
    typename F::Sum s[F::planes][R][V];
    for (int p = 0; p < F::planes; ++p)
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) s[p][r][v] = sums.begin(p, row + r, o + v * W);
    const int64_t rate = prefetch_bytes * 256 / steps;  // in 256ths of a byte a step
    int64_t fetched = 0;
    for (int64_t k = 0; k < steps; ++k) {
        for (; fetched < (k + 1) * rate; fetched += kLine * 256) __builtin_prefetch(prefetch + fetched / 256, 0, 2);
        F::template step<R, V>(s, x + k, x_stride, weights + k * panel_width);
    }
    for (int p = 0; p < F::planes; ++p)
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) sums.end(p, row + r, o + v * W, s[p][r][v]);
}

template <typename F>
using Tile = decltype(&tile<F, 1, 1>);

template <typename F, int R, int V = tile_vectors(R)>
Tile<F> choose_vectors(int64_t vectors) {
    if constexpr (V > 1) {
        if (vectors < V) return choose_vectors<F, R, V - 1>(vectors);
    }
    return tile<F, R, V>;
}

template <typename F, int R = kTileRows<F>>
Tile<F> choose_tile(int64_t rows, int64_t vectors) {
    if constexpr (R > 1) {
        if (rows < R) return choose_tile<F, R - 1>(rows, vectors);
    }
    return choose_vectors<F, R>(vectors);
}

// Where int8 weights keep the scale and the sum of each output's weights, and quantised rows theirs.
const float* output_scales(const Matrix& m) {
    const int64_t weights = round_up(m.out, W) * round_up(m.in, grain(SOSTENUTO_INT8));
    return reinterpret_cast<const float*>(static_cast<const int8_t*>(m.data) + weights);
}
const int32_t* output_sums(const Matrix& m) {
    return reinterpret_cast<const int32_t*>(output_scales(m) + round_up(m.out, W));
}
float* row_scale(const Rows& quantised, int64_t row, int64_t in) {
    const int64_t values = (kHasTiles ? 1 : 2) * quantised_width(in);
    return reinterpret_cast<float*>(static_cast<uint8_t*>(quantised.data) + row * quantised.stride + values);
}

// The product's result for a vector of outputs.
template <typename F>
vec result(const Sums<F>& sums, int64_t r, int64_t c, const Product&, int64_t, int64_t) {
    return load(sums.at(0, r) + c);
}

// Weights are t w, activations s q, see `quantise`; the sum of w q is 256 high + low.
template <>
vec result<Int8>(const Sums<Int8>& sums, int64_t r, int64_t c, const Product& product, int64_t row, int64_t o) {
    ivec high = load(sums.at(0, r) + c), low = load(sums.at(1, r) + c);
#if defined(SOSTENUTO_INT8_PRODUCTS)
    const ivec offset = load(output_sums(product.weight) + o) * 128;
    high = high - offset;
    low = low - offset;
#endif
    const vec scale = load(output_scales(product.weight) + o) * *row_scale(product.quantised, row, product.weight.in);
    return fma(to_float(high), broadcast(256.0f), to_float(low)) * scale;
}

// Calls `write(row, output, result, n)` for every vector of results, of which the first n are outputs.
template <typename F, typename Write>
void for_results(const Sums<F>& sums, int64_t first_row, int64_t num_rows, int64_t first, int64_t width,
                 const Product& product, Write write) {
    for (int64_t r = 0; r < num_rows; ++r)
        for (int64_t c = 0; c < width; c += W)
            write(first_row + r, first + c, result<F>(sums, r, c, product, first_row + r, first + c),
                  std::min<int64_t>(W, width - c));
}

template <typename F>
void finish(const Sums<F>& sums, int64_t first_row, int64_t num_rows, int64_t first, int64_t width,
            const Product& product) {
    const Output y = product.y;  // a copy: what is written can not change it
    const auto with = [&](auto write) { for_results<F>(sums, first_row, num_rows, first, width, product, write); };
    const bool is_plain = y.bias == nullptr && y.activation == SOSTENUTO_NONE;
    if (y.streams && is_plain && width % W == 0) {
        return with([&](int64_t row, int64_t o, vec value, int64_t) {
            stream(static_cast<float*>(y.rows.data) + row * y.rows.stride + o, value);
        });
    }
    if (is_plain && y.add) {
        return with([&](int64_t row, int64_t o, vec value, int64_t n) {
            put(y.rows, row, o, value + get(y.rows, row, o, n), n);
        });
    }
    if (is_plain) return with([&](int64_t row, int64_t o, vec value, int64_t n) { put(y.rows, row, o, value, n); });
    with([&](int64_t row, int64_t o, vec value, int64_t n) {
        if (y.bias != nullptr) value = value + load_first(y.bias + o, n);
        value = activate(value, y.activation);
        if (y.add) value = value + get(y.rows, row, o, n);
        put(y.rows, row, o, value, n);
    });
}

// Where in the next block the part begins that a tile, one in turn of so many, fetches: whole lines a step, or any part.
inline int64_t prefetch_begin(int64_t steps, int64_t step_bytes, int64_t turn, int64_t turns) {
#if defined(SOSTENUTO_AVX512)
    return step_bytes / kLine * turn / turns * steps * kLine;
#else
    return steps * step_bytes * turn / turns / kLine * kLine;
#endif
}

int64_t num_steps(const Matrix& m) { return round_up(m.in, grain(m.format)) / depth(m.format); }

// A panel of a matrix.
struct Panel {
    const char* weights;
    int64_t first, outputs, width;  // outputs; and how many there are, filled up to whole vectors
    int64_t steps;

    Panel(const Matrix& m, int64_t index)
        : first(index * kPanel),
          outputs(std::min<int64_t>(kPanel, m.out - first)),
          width(round_up(outputs, W)),
          steps(num_steps(m)) {
        weights = static_cast<const char*>(m.data) + first * steps * 4;
    }
    int64_t step_bytes() const { return width * 4; }
    const char* end() const { return weights + steps * step_bytes(); }
};

// Some rows of a product's activations.
struct Activations {
    const char* data;
    int64_t stride;  // bytes
    int64_t count;

    Activations(const Rows& rows, int64_t first, int64_t count)
        : stride(rows.stride * item_bytes(rows.format)), count(count) {
        data = static_cast<const char*>(rows.data) + first * stride;
    }
    const char* row(int64_t i) const { return data + i * stride; }
};

// A few rows share each load of weights; all groups of rows work through a block of weights before the next block,
// which meanwhile is prefetched: it is next in memory.
template <typename F>
void add_panel(const Activations& x, const Panel& panel, const Sums<F>& sums) {
    using Step = typename F::Step;
    using Word = typename F::Word;
    const Word* weights = reinterpret_cast<const Word*>(panel.weights);
    const int64_t width = panel.width, x_stride = x.stride / static_cast<int64_t>(sizeof(Step));
    memset(sums.data, 0, x.count * Sums<F>::planes * kPanel * sizeof(Item<F>));
    const int64_t groups = (x.count + kTileRows<F> - 1) / kTileRows<F>;
    const int64_t block = std::min(Sums<F>::longest_block, kBlockBytes / panel.step_bytes());
    for (int64_t k = 0; k < panel.steps; k += block) {
        const int64_t length = std::min(block, panel.steps - k);
        const char* next = reinterpret_cast<const char*>(weights + (k + length) * width);
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t begin = x.count * g / groups, count = x.count * (g + 1) / groups - begin;
            const int64_t tile_width = tile_vectors(count) * W, tiles = (width + tile_width - 1) / tile_width;
            const Step* rows = reinterpret_cast<const Step*>(x.row(begin)) + k;
            for (int64_t i = 0; i < tiles; ++i) {
                const int64_t o = i * tile_width, turn = g * tiles + i, turns = groups * tiles;
                const auto begin_of = [&](int64_t turn) {
                    return prefetch_begin(length, panel.step_bytes(), turn, turns);
                };
                choose_tile<F>(count, (width - o) / W)(rows, x_stride, weights + k * width + o, width, length, sums,
                                                       begin, o, next + begin_of(turn),
                                                       begin_of(turn + 1) - begin_of(turn));
            }
        }
    }
}

#if defined(SOSTENUTO_AMX)
// On tile registers, where the upper and the lower bytes of a row are two rows. The next panel is prefetched meanwhile.
template <typename F>
void add_panel_in_tiles(const Activations& x, const Panel& panel, const Sums<F>& sums) {
    const TilePanel tiles{panel.weights, panel.width / W, panel.steps / kTileSteps};
    const int64_t num_rows = x.count * F::planes, stride = x.stride / F::planes, sums_stride = kPanel * sizeof(Item<F>);
    const int64_t groups = (num_rows + kMostTileRows - 1) / kMostTileRows;
    const int64_t part = panel.steps * panel.step_bytes() / groups;
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t begin = num_rows * g / groups, count = num_rows * (g + 1) / groups - begin;
        char* to = reinterpret_cast<char*>(sums.data) + begin * sums_stride;
        const TileRows rows{x.data + begin * stride, stride, count, to, sums_stride};
        multiply_tiles<F::planes == 2>(rows, tiles, {panel.end() + g * part, part});
    }
}
#endif

// One panel times some rows.
template <typename F>
void multiply_panel(Member& me, const Product& product, int64_t index, int64_t first_row, int64_t num_rows) {
    const Panel panel(product.weight, index);
    const Activations x(std::is_same_v<F, Int8> ? product.quantised : product.x, first_row, num_rows);
    const Sums<F> sums{static_cast<Item<F>*>(me.scratch(Sums<F>::planes * kRowsPerTask * kPanel * sizeof(Item<F>)))};
    if (!product.y.streams) {
        for (int64_t r = 0; r < num_rows; ++r)
            fetch<kToWrite>(product.y.rows, first_row + r, panel.first, panel.first + panel.outputs);
    }
#if defined(SOSTENUTO_AMX)
    if constexpr (F::depth > 1) {
        add_panel_in_tiles<F>(x, panel, sums);
    } else
#endif
        add_panel<F>(x, panel, sums);
    finish<F>(sums, first_row, num_rows, panel.first, panel.outputs, product);
}

int64_t panels(const Matrix& m) { return (m.out + kPanel - 1) / kPanel; }

// Where the word of a step and an output lies in its panel: steps follow each other, or tiles of 16 steps of 16 outputs.
int64_t word_at(const Panel& panel, int32_t format, int64_t step, int64_t output) {
    if (grain(format) == depth(format)) return step * panel.width + output;
    const int64_t tile = step / kTileSteps * (panel.width / W) + output / W;
    return (tile * kTileSteps + step % kTileSteps) * W + output % W;
}

template <typename Value>
void pack_panel(const Rows& weight, const Matrix& m, int64_t index) {
    const Panel panel(m, index);
    const int64_t d = depth(m.format);
    const Value* from = static_cast<const Value*>(weight.data) + panel.first * weight.stride;
    Value* to = static_cast<Value*>(m.data) + panel.first * panel.steps * d;
    for (int64_t k = 0; k < panel.steps; ++k)
        for (int64_t o = 0; o < panel.width; ++o)
            for (int64_t i = 0; i < d; ++i) {
                const bool inside = o < panel.outputs && k * d + i < m.in;
                to[word_at(panel, m.format, k, o) * d + i] = inside ? from[o * weight.stride + k * d + i] : Value{};
            }
}

// Weights of one output become integers in [-127, 127] times a scale.
void pack_int8_panel(const Rows& weight, const Matrix& m, int64_t index) {
    const Panel panel(m, index);
    const int64_t outputs = panel.outputs;
    int8_t* to = static_cast<int8_t*>(m.data) + panel.first * panel.steps * 4;
    memset(to, 0, panel.width * panel.steps * 4);
    for (int64_t o = 0; o < panel.width; ++o) {
        const int64_t output = panel.first + o;
        float most = 0;
        for (int64_t i = 0; i < m.in && o < outputs; ++i) most = std::max(most, std::abs(get_one(weight, output, i)));
        const float scale = most / 127, inverse = most > 0 ? 127 / most : 0;
        int32_t sum = 0;
        for (int64_t i = 0; i < m.in && o < outputs; ++i) {
            const int q = static_cast<int>(std::nearbyint(get_one(weight, output, i) * inverse));
            to[word_at(panel, m.format, i / 4, o) * 4 + i % 4] = static_cast<int8_t>(q);
            sum += q;
        }
        const_cast<float*>(output_scales(m))[output] = scale;
        const_cast<int32_t*>(output_sums(m))[output] = sum;
    }
}

// A row becomes integers q in [-32639, 32639] times a scale, so no more is lost than the rounding to 16 bits. What is
// multiplied as bytes gets each q as two, q = 256 (high - 128) + low - 128. A row that is not finite gets a scale that
// is not.
void quantise(const Rows& x, int64_t row, int64_t width, const Rows& to) {
    vec most{}, doubt{};
    for (int64_t c = 0; c < width; c += W) {
        const vec value = get(x, row, c, width - c);
        most = max(most, max(value, -value));
        doubt = fma(value, vec{}, doubt);
    }
    float greatest = 0;
    for (int i = 0; i < W; ++i) greatest = std::max(greatest, most[i]);
    const float scale = greatest / 32639 + sum(doubt), inverse = greatest > 0 ? 32639 / greatest : 0;
    uint8_t* values = static_cast<uint8_t*>(to.data) + row * to.stride;
    for (int64_t c = 0; c < width; c += W)
        Int8::put(to_nearest(get(x, row, c, width - c) * inverse), values, to.stride, c);
    *row_scale(to, row, width) = scale;
}

int64_t bytes_per_row(const Product& product) {
    const Rows& rows = product.weight.format == SOSTENUTO_INT8 ? product.quantised : product.x;
    return rows.stride * item_bytes(rows.format);
}

// Some rows times all weights, panel by panel.
void multiply_rows(Member& me, const Product* products, const Product* end, int64_t first, int64_t num_rows) {
    const int64_t row_tasks = (num_rows + kRowsPerTask - 1) / kRowsPerTask;
    int64_t count = 0;
    for (const Product* p = products; p < end; ++p) count += panels(p->weight) * row_tasks;
    me.share(count, [&](int64_t task) {
        const Product* product = products;
        while (task >= panels(product->weight) * row_tasks) task -= panels(product++->weight) * row_tasks;
        const int64_t panel = task / row_tasks, part = task % row_tasks;
        const int64_t begin = num_rows * part / row_tasks, rows = num_rows * (part + 1) / row_tasks - begin;
        switch (product->weight.format) {
            case SOSTENUTO_INT8: return multiply_panel<Int8>(me, *product, panel, first + begin, rows);
            case SOSTENUTO_BFLOAT16: return multiply_panel<BFloat16>(me, *product, panel, first + begin, rows);
            default: return multiply_panel<Float32>(me, *product, panel, first + begin, rows);
        }
    });
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
    const int64_t padded = round_up(out, W), weights = padded * round_up(in, grain(format)) * item_bytes(format);
    return format == SOSTENUTO_INT8 ? weights + padded * (sizeof(float) + sizeof(int32_t)) : weights;
}

void pack(Member& me, const Rows& weight, const Matrix& m) {
    me.share(panels(m), [&](int64_t panel) {
        switch (m.format) {
            case SOSTENUTO_INT8: return pack_int8_panel(weight, m, panel);
            case SOSTENUTO_BFLOAT16: return pack_panel<bf16>(weight, m, panel);
            default: return pack_panel<float>(weight, m, panel);
        }
    });
}

void multiply(Member& me, const Product* products, int num_products, int64_t num_rows) {
    const Product* end = products + num_products;
    const auto is_int8 = [](const Product& product) { return product.weight.format == SOSTENUTO_INT8; };
    if (std::any_of(products, end, is_int8)) {
        me.share(num_rows, [&](int64_t row) {
            for (const Product* p = products; p < end; ++p)
                if (is_int8(*p)) quantise(p->x, row, p->weight.in, p->quantised);
        });
    }
    // Rows that a cache holds at once go through all weights together.
    int64_t row_bytes = 0;
    for (const Product* p = products; p < end; ++p) row_bytes = std::max(row_bytes, bytes_per_row(*p));
    const int64_t most = std::max(kRowsPerTask, kActivationBytes / row_bytes / kRowsPerTask * kRowsPerTask);
    const int64_t blocks = (num_rows + most - 1) / most;
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t begin = num_rows * b / blocks;
        multiply_rows(me, products, end, begin, num_rows * (b + 1) / blocks - begin);
    }
    release_tiles();
    finish_stream();
}

}  // namespace sostenuto
