// Vectors of the target's own width, with the few operations the operators need.
//
// Arithmetic (+ - * / and comparisons) is the compiler's vector extension, so the same source serves every target. A
// multiply-add is always written `fma`: the library is compiled with -ffp-contract=off, so that one expression cannot
// round differently in two places. An element's result never depends on its place in a vector: tails go through the
// same instructions, on zero-padded lanes.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace sostenuto {

using bf16 = uint16_t;  // the upper half of a float
struct half {           // IEEE 754 binary16
    uint16_t bits;
};

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define SOSTENUTO_AVX512 1
constexpr int W = 16;  // floats in a vector
#elif defined(__AVX2__) && defined(__FMA__)
#define SOSTENUTO_AVX2 1
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

#if defined(SOSTENUTO_AVX512) && defined(__AVX512BF16__)
#define SOSTENUTO_BF16_PRODUCTS 1
constexpr bool kMultipliesBf16 = true;
#else
constexpr bool kMultipliesBf16 = false;
#endif
#if defined(SOSTENUTO_AVX512) && defined(__AVX512VNNI__)
#define SOSTENUTO_INT8_PRODUCTS 1
#endif
#if defined(SOSTENUTO_BF16_PRODUCTS) && defined(SOSTENUTO_INT8_PRODUCTS) && defined(__AMX_BF16__) && \
    defined(__AMX_INT8__) && !defined(SOSTENUTO_WITHOUT_TILES)
#define SOSTENUTO_AMX 1
constexpr bool kHasTiles = true;
#else
constexpr bool kHasTiles = false;
#endif

typedef float vec __attribute__((vector_size(4 * W), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * W), may_alias));
typedef uint32_t uvec __attribute__((vector_size(4 * W), may_alias));  // wraps around

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

typedef float unaligned_vec __attribute__((vector_size(4 * W), aligned(4), may_alias));

static inline vec load(const float* p) { return *reinterpret_cast<const unaligned_vec*>(p); }

typedef int32_t unaligned_ivec __attribute__((vector_size(4 * W), aligned(4), may_alias));

typedef int16_t pairs __attribute__((vector_size(4 * W), may_alias));  // two to a lane of an ivec

static inline ivec load(const int32_t* p) { return *reinterpret_cast<const unaligned_ivec*>(p); }

static inline void store(int32_t* p, ivec v) { *reinterpret_cast<unaligned_ivec*>(p) = v; }

static inline vec to_float(ivec v) { return __builtin_convertvector(v, vec); }

static inline void store(float* p, vec v) { *reinterpret_cast<unaligned_vec*>(p) = v; }

// The same value, loaded once: compilers like to load it again for every instruction that uses it.
static inline vec in_register(vec v) {
#if defined(SOSTENUTO_AVX512)
    asm("" : "+v"(v));
#elif defined(SOSTENUTO_AVX2)
    asm("" : "+x"(v));
#endif
    return v;
}

static inline vec broadcast(float x) { return x - vec{}; }  // keeps the sign of zero, and a NaN

static inline vec fma(vec a, vec b, vec c) {
#if defined(SOSTENUTO_AVX512)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(SOSTENUTO_AVX2)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__ARM_NEON)
    return vfmaq_f32(c, a, b);
#else
    return a * b + c;
#endif
}

static inline ivec broadcast(int32_t x) { return ivec{} + x; }

// a.low b.low + a.high b.high in every lane.
static inline ivec multiply_pairs(pairs a, pairs b) {
#if defined(SOSTENUTO_AVX512)
    return (ivec)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(SOSTENUTO_AVX2)
    return (ivec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    const ivec x = (ivec)a, y = (ivec)b;
    return (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16);
#endif
}

#if defined(SOSTENUTO_AVX512)
static inline __mmask16 first(int64_t n) { return n >= W ? 0xffff : static_cast<__mmask16>((1u << n) - 1); }
#endif

// The first n lanes from memory, zero in the others. Reads nothing beyond them.
static inline vec load_first(const float* p, int64_t n) {
#if defined(SOSTENUTO_AVX512)
    return _mm512_maskz_loadu_ps(first(n), p);
#else
    if (n >= W) return load(p);
    vec v{};
    memcpy(&v, p, n * sizeof(float));
    return v;
#endif
}

static inline void store_first(float* p, vec v, int64_t n) {
#if defined(SOSTENUTO_AVX512)
    _mm512_mask_storeu_ps(p, first(n), v);
#else
    if (n >= W) return store(p, v);
    memcpy(p, &v, n * sizeof(float));
#endif
}

// Goes to memory past the caches; `p` is aligned to vectors. `finish_stream` before others look.
static inline void stream(float* p, vec v) {
#if defined(SOSTENUTO_AVX512)
    _mm512_stream_ps(p, v);
#elif defined(SOSTENUTO_AVX2)
    _mm256_stream_ps(p, v);
#else
    store(p, v);
#endif
}

static inline void finish_stream() {
#if defined(SOSTENUTO_AVX512) || defined(SOSTENUTO_AVX2)
    _mm_sfence();
#endif
}

static inline void store4(float* p, vec v) { memcpy(p, &v, 4 * sizeof(float)); }

// The first n lanes of v, zero in the others.
static inline vec first_lanes(vec v, int64_t n) {
#if defined(SOSTENUTO_AVX512)
    return _mm512_maskz_mov_ps(first(n), v);
#else
    if (n >= W) return v;
    vec kept{};
    memcpy(&kept, &v, n * sizeof(float));
    return kept;
#endif
}

static inline float from_bf16(bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// The nearest numbers that bfloat16 has, ties to even, as PyTorch does it.
static inline vec round_to_bf16(vec x) {
    const ivec bits = (ivec)x, nearest = bits + 0x7fff + (bits >> 16 & 1), nan = bits | 0x00400000;
    return (vec)((x == x ? nearest : nan) & static_cast<int32_t>(0xffff0000));
}

static inline vec load_first(const bf16* p, int64_t n) {
#if defined(SOSTENUTO_AVX512)
    const __m256i half = _mm256_maskz_loadu_epi16(first(n), p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
#else
#if defined(SOSTENUTO_AVX2)
    if (n >= W) {
        const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
    }
#endif
    vec v{};
    for (int i = 0; i < W && i < n; ++i) v[i] = from_bf16(p[i]);
    return v;
#endif
}

static inline vec load(const bf16* p) { return load_first(p, W); }

static inline void store_first(bf16* p, vec v, int64_t n) {
#if defined(SOSTENUTO_AVX512) && defined(__AVX512BF16__)
    const __m256i half = (__m256i)_mm512_cvtneps_pbh(v);
    _mm256_mask_storeu_epi16(p, first(n), half);
#else
    const ivec bits = (ivec)round_to_bf16(v);
    for (int i = 0; i < W && i < n; ++i) p[i] = static_cast<bf16>(bits[i] >> 16);
#endif
}

static inline void store(bf16* p, vec v) { store_first(p, v, W); }

// float16, where no instruction converts it: subnormal numbers by what a multiplication or an addition makes of them.
#if defined(SOSTENUTO_AVX512) || (defined(SOSTENUTO_AVX2) && defined(__F16C__))
#define SOSTENUTO_F16 1
#else
static inline vec from_half_bits(ivec bits) {
    const ivec magnitude = (bits & 0x7fff) << 13, sign = (bits & 0x8000) << 16;
    const vec scaled = (vec)magnitude * 0x1p112f;
    return (vec)((ivec)(scaled >= 65536.0f ? (vec)(magnitude | 0x7f800000) : scaled) | sign);
}

// Nearest, ties to even; what is too large becomes infinite.
static inline ivec to_half_bits(vec x) {
    const ivec bits = (ivec)x, magnitude = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;
    const ivec normal = (magnitude - (112 << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    const ivec subnormal = (ivec)((vec)magnitude + 0.5f) - 0x3f000000;
    const ivec finite = magnitude < 113 << 23 ? subnormal : normal;
    const ivec large = magnitude > 0x7f800000 ? ivec{} + 0x7e00 : ivec{} + 0x7c00;
    return (magnitude >= 0x477ff000 ? large : finite) | sign;
}
#endif

static inline vec load_first(const half* p, int64_t n) {
#if defined(SOSTENUTO_AVX512)
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p));
#else
#if defined(SOSTENUTO_F16)
    if (n >= W) return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#endif
    uint16_t bits[W] = {};
    for (int i = 0; i < W && i < n; ++i) bits[i] = p[i].bits;
#if defined(SOSTENUTO_F16)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bits)));
#else
    ivec wide{};
    for (int i = 0; i < W; ++i) wide[i] = bits[i];
    return from_half_bits(wide);
#endif
#endif
}

static inline vec load(const half* p) { return load_first(p, W); }

static inline void store_first(half* p, vec v, int64_t n) {
#if defined(SOSTENUTO_AVX512)
    _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    uint16_t bits[W];
#if defined(SOSTENUTO_F16)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bits), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
    const ivec wide = to_half_bits(v);
    for (int i = 0; i < W; ++i) bits[i] = static_cast<uint16_t>(wide[i]);
#endif
    for (int i = 0; i < W && i < n; ++i) p[i].bits = bits[i];
#endif
}

static inline void store(half* p, vec v) { store_first(p, v, W); }

// What is left of v when it is kept as such numbers: as a half, one of its two neighbours, the nearer one more often.
// The upper bits of `dither` say which, so that a number which changes by less than half a step, token after token,
// changes as much as it should on average. Of subnormal numbers the smaller ones take the nearest.
template <typename Value>
vec kept_as(vec v, ivec dither);

template <>
inline vec kept_as<float>(vec v, ivec) {
    return v;
}

template <>
inline vec kept_as<half>(vec v, ivec dither) {
    constexpr int32_t kLost = (1 << 13) - 1;  // bits of a float that a half of its size does not have
    const ivec either = ((ivec)v + (dither >> 19 & kLost)) & ~kLost;
    v = v == v ? (vec)either : v;  // what is no number stays none
#if defined(SOSTENUTO_AVX512)
    return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(SOSTENUTO_F16)
    return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
    return from_half_bits(to_half_bits(v));
#endif
}

// The sum of all lanes, halves first: one fixed order.
static inline float sum(vec v) {
#if defined(SOSTENUTO_AVX512)
    return _mm512_reduce_add_ps(v);
#else
    float lanes[W];
    memcpy(lanes, &v, sizeof lanes);
    for (int half = W / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
#endif
}

// The sums of four vectors, {s0, s1, s2, s3}, repeated along the vector.
static inline vec sum4(const vec p[4]) {
#if defined(SOSTENUTO_AVX512)
    const __m512 ab = _mm512_unpacklo_ps(p[0], p[1]) + _mm512_unpackhi_ps(p[0], p[1]);
    const __m512 cd = _mm512_unpacklo_ps(p[2], p[3]) + _mm512_unpackhi_ps(p[2], p[3]);
    __m512 s = _mm512_shuffle_ps(ab, cd, 0x44) + _mm512_shuffle_ps(ab, cd, 0xee);
    s = s + _mm512_shuffle_f32x4(s, s, 0x4e);
    return s + _mm512_shuffle_f32x4(s, s, 0xb1);
#elif defined(SOSTENUTO_AVX2)
    const __m256 ab = _mm256_unpacklo_ps(p[0], p[1]) + _mm256_unpackhi_ps(p[0], p[1]);
    const __m256 cd = _mm256_unpacklo_ps(p[2], p[3]) + _mm256_unpackhi_ps(p[2], p[3]);
    const __m256 s = _mm256_shuffle_ps(ab, cd, 0x44) + _mm256_shuffle_ps(ab, cd, 0xee);
    return s + _mm256_permute2f128_ps(s, s, 1);
#elif defined(__ARM_NEON)
    return vpaddq_f32(vpaddq_f32(p[0], p[1]), vpaddq_f32(p[2], p[3]));
#else
    return vec{sum(p[0]), sum(p[1]), sum(p[2]), sum(p[3])};
#endif
}

// The first four lanes of such sums, each in a vector of its own.
static inline void spread4(vec sums, vec out[4]) {
#if defined(SOSTENUTO_AVX512)
    out[0] = _mm512_permute_ps(sums, 0x00);
    out[1] = _mm512_permute_ps(sums, 0x55);
    out[2] = _mm512_permute_ps(sums, 0xaa);
    out[3] = _mm512_permute_ps(sums, 0xff);
#elif defined(SOSTENUTO_AVX2)
    out[0] = _mm256_permute_ps(sums, 0x00);
    out[1] = _mm256_permute_ps(sums, 0x55);
    out[2] = _mm256_permute_ps(sums, 0xaa);
    out[3] = _mm256_permute_ps(sums, 0xff);
#else
    for (int i = 0; i < 4; ++i) out[i] = broadcast(sums[i]);
#endif
}

// The nearest integers, ties to even, of numbers within 2^22 of zero. Any bits for others.
static inline ivec to_nearest(vec x) {
    const vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    return (ivec)(x + magic) - (ivec)magic;
}

// e^x within 2 units in the last place, for x clamped to [-87, 88]; a NaN stays a NaN.
static inline vec exp(vec x) {
    x = x < -87.0f ? broadcast(-87.0f) : x;
    x = x > 88.0f ? broadcast(88.0f) : x;
    const vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    const vec shifted = fma(x, broadcast(1.44269504088896341f), magic);
    const vec n = shifted - magic;
    vec r = fma(n, broadcast(-0.693359375f), x);
    r = fma(n, broadcast(2.12194440e-4f), r);
    vec p = broadcast(1.9875691500e-4f);  // minimax polynomial of Cephes' expf
    p = fma(p, r, broadcast(1.3981999507e-3f));
    p = fma(p, r, broadcast(8.3334519073e-3f));
    p = fma(p, r, broadcast(4.1665795894e-2f));
    p = fma(p, r, broadcast(1.6666665459e-1f));
    p = fma(p, r, broadcast(5.0000001201e-1f));
    p = fma(p, r * r, r + 1.0f);
    const ivec power = ((ivec)shifted << 23) + 0x3f800000;
    return p * (vec)power;
}

static inline vec sigmoid(vec x) { return 1.0f / (1.0f + exp(-x)); }

static inline vec tanh(vec x) {
    const vec z = x * x;
    vec p = broadcast(-5.70498872745e-3f);  // Cephes' tanhf below 0.625
    p = fma(p, z, broadcast(2.06390887954e-2f));
    p = fma(p, z, broadcast(-5.37397155531e-2f));
    p = fma(p, z, broadcast(1.33314422036e-1f));
    p = fma(p, z, broadcast(-3.33332819422e-1f));
    const vec small = fma(p * z, x, x);
    const vec large = 1.0f - 2.0f / (exp(x + x) + 1.0f);
    return z < 0.390625f ? small : large;
}

// Whether a comparison holds in any lane.
static inline bool any(ivec mask) {
#if defined(SOSTENUTO_AVX512)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(SOSTENUTO_AVX2)
    return _mm256_movemask_ps((__m256)mask) != 0;
#else
    int32_t lanes = 0;
    for (int i = 0; i < W; ++i) lanes |= mask[i];
    return lanes != 0;
#endif
}

static inline vec max(vec a, vec b) { return a < b ? b : a; }  // a NaN in `a` stays

}  // namespace sostenuto
