/* Sixteen numbers at a time, by the compiler's own vectors, so that the same source serves every processor.
 *
 * ELEMENT is what tensors hold: float, or with BFLOAT16 defined, bfloat16. All sums are float32.
 */
#pragma once
#include <stdint.h>
#include <string.h>

#define LANES 16
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

#ifdef BFLOAT16
typedef uint16_t element;
typedef uint16_t half_vec __attribute__((vector_size(2 * LANES)));

INLINE vec load(const element *at) {
    half_vec bits;
    memcpy(&bits, at, sizeof bits);
    return (vec)(__builtin_convertvector(bits, ivec) << 16);
}

INLINE void store(element *at, vec x) {
    ivec bits = (ivec)x;
    ivec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    ivec is_nan = x != x;
    half_vec out = __builtin_convertvector((is_nan & 0x7fc0) | (~is_nan & rounded), half_vec);
    memcpy(at, &out, sizeof out);
}

INLINE float one(const element *at) {
    uint32_t bits = (uint32_t)*at << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE void put(element *at, float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    *at = x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
#else
typedef float element;

INLINE vec load(const element *at) {
    vec x;
    memcpy(&x, at, sizeof x);
    return x;
}

INLINE void store(element *at, vec x) { memcpy(at, &x, sizeof x); }
INLINE float one(const element *at) { return *at; }
INLINE void put(element *at, float x) { *at = x; }
#endif

INLINE vec load_float(const float *at) {
    vec x;
    memcpy(&x, at, sizeof x);
    return x;
}

INLINE vec spread(float x) { return (vec){} + x; }
INLINE vec choose(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }

INLINE float sum(vec x) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] += x[i + half];
    return x[0];
}

INLINE float largest(vec x) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] = x[i] > x[i + half] ? x[i] : x[i + half];
    return x[0];
}

#ifdef __clang__
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

/* Where lane i comes from, of two rows behind each other, when lanes that have the bit `step` in their number change
 * places with those of the other row that lack it. */
#define LOW(i, step) ((i) & (step) ? LANES + (i) - (step) : (i))
#define HIGH(i, step) ((i) & (step) ? LANES + (i) : (i) + (step))
#define EACH_LANE(from, step) \
    from(0, step), from(1, step), from(2, step), from(3, step), from(4, step), from(5, step), from(6, step), \
        from(7, step), from(8, step), from(9, step), from(10, step), from(11, step), from(12, step), from(13, step), \
        from(14, step), from(15, step)
#define SWAP(step) \
    for (int i = 0; i < LANES; i++) \
        if (!(i & step)) { \
            vec a = x[i], b = x[i + step]; \
            x[i] = PICK(a, b, EACH_LANE(LOW, step)); \
            x[i + step] = PICK(a, b, EACH_LANE(HIGH, step)); \
        }

INLINE void transpose(vec x[LANES]) {
    SWAP(1)
    SWAP(2)
    SWAP(4)
    SWAP(8)
}

/* e to the x, for x of at most 0, to a relative 2e-7; exactly 0 below -87. NaN stays NaN. */
INLINE vec exponential(vec x) {
    ivec tiny = x < -87.0f;
    vec kept = choose(tiny, spread(-87.0f), x);
    vec whole = (kept * 1.44269504f + 12582912.0f) - 12582912.0f; /* rounded: no float32 of that size has a fraction */
    vec rest = kept - whole * 0.693359375f + whole * 2.12194440e-4f;
    vec y = spread(1.9875691500e-4f);
    y = y * rest + 1.3981999507e-3f;
    y = y * rest + 8.3334519073e-3f;
    y = y * rest + 4.1665795894e-2f;
    y = y * rest + 1.6666665459e-1f;
    y = y * rest + 5.0000001201e-1f;
    y = y * (rest * rest) + rest + 1.0f;
    vec power = (vec)((__builtin_convertvector(whole, ivec) + 127) << 23);
    return choose(tiny, spread(0), y * power);
}
