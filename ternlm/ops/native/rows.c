/* Passes over activations, without gradients, which PyTorch's operators take several each for. */
#include <math.h>

#include "vectors.h"

#define LEAST 16384 /* numbers, from which on several threads are faster */

/* out = x / sqrt(mean(x^2) + eps) * weight, of `num` rows of `size` numbers, a multiple of LANES; where `more` is given,
 * it's added to by x first, and x is that sum. */
void rms_norm(const element *x, element *more, const float *weight, element *out, int64_t num, int64_t size, float eps,
              int64_t threads) {
#pragma omp parallel for num_threads(threads) if (num * size >= LEAST)
    for (int64_t r = 0; r < num; r++) {
        const element *row = x + r * size;
        vec squares = {};
        if (more) {
            element *sums = more + r * size;
            for (int64_t i = 0; i < size; i += LANES) store(sums + i, load(sums + i) + load(row + i));
            row = sums;
        }
        for (int64_t i = 0; i < size; i += LANES) squares += load(row + i) * load(row + i);
        float scale = 1 / sqrtf(sum(squares) / size + eps);
        for (int64_t i = 0; i < size; i += LANES) store(out + r * size + i, load(row + i) * scale * load_float(weight + i));
    }
}

/* out = gate / (1 + e^-gate) * up, of `num` rows of `size` numbers, a multiple of LANES; gates and ups `stride` apart. */
void silu_mul(const element *gate, const element *up, element *out, int64_t num, int64_t size, int64_t stride,
              int64_t threads) {
#pragma omp parallel for num_threads(threads) if (num * size >= LEAST)
    for (int64_t r = 0; r < num; r++)
        for (int64_t i = 0; i < size; i += LANES) {
            vec x = load(gate + r * stride + i), shrunk = exponential(choose(x < 0, x, -x)); /* e^-|x| */
            vec share = choose(x < 0, shrunk, spread(1)) / (1 + shrunk);
            store(out + r * size + i, x * share * load(up + r * stride + i));
        }
}

/* Rotate each head by its token's position, in place: `heads` heads of each of `num` tokens, `stride` numbers from one
 * token to the next. cosines, sines: (num, size). */
void rotate(element *x, const element *cosines, const element *sines, int64_t num, int64_t heads, int64_t size,
            int64_t stride, int64_t threads) {
    int64_t half = size / 2;
#pragma omp parallel for num_threads(threads) if (num * heads * size >= LEAST)
    for (int64_t t = 0; t < num; t++)
        for (int64_t head = 0; head < heads; head++) {
            element *first = x + t * stride + head * size, *second = first + half;
            const element *c = cosines + t * size, *s = sines + t * size;
#pragma omp simd
            for (int64_t i = 0; i < half; i++) {
                float a = one(first + i), b = one(second + i);
                put(first + i, a * one(c + i) - b * one(s + i));
                put(second + i, b * one(c + half + i) + a * one(s + half + i));
            }
        }
}
