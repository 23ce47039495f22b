/* Rows of float32 as FBGEMM's fused 8-bit rows, with their errors in the same sweep; and back. kernels/numpy_casts.py defines every
 * bit, the order of sums included. */
#include "casts.h"

#define HALF_RANGE 1.7e38f

EXPORTED void kernels_encode_int8(const float *values, int64_t num_rows, int64_t dim, uint8_t *out, double *row_sums, int level,
                                  Losses *losses);
EXPORTED void kernels_decode_int8(const uint8_t *rows, int64_t num_rows, int64_t dim, float *out, int level);

/* What is the same for all values of a row. */
typedef struct {
    float low, scale, inverse;
} RowScale;

static RowScale scale_row(const float *values, int64_t dim, float low, float high) {
    if (low == 0) { /* of a zero the sign is kept: that of the first one */
        for (int64_t at = 0; at < dim; at++) {
            if (values[at] == 0) {
                low = values[at];
                break;
            }
        }
    }
    const float spread = (high - low) + 0.0f; /* never -0 */
    return (RowScale){.low = low, .scale = spread / 255.0f, .inverse = 255.0f / (spread + 1e-8f)};
}

INLINE double encode_one(float value, RowScale scale, uint8_t *level) {
    const float rounded = rintf((value - scale.low) * scale.inverse);
    *level = (uint8_t)(int)rounded;
    const float back = rounded * scale.scale + scale.low;
    return fabs((double)value - (double)back);
}

/* Find the edges of a row; return whether all values are numbers in range. */
static int find_edges_plain(const float *values, int64_t dim, float *low, float *high) {
    float least = values[0], most = values[0];
    int is_sound = 1;
    for (int64_t at = 0; at < dim; at++) {
        least = values[at] < least ? values[at] : least;
        most = values[at] > most ? values[at] : most;
        is_sound &= fabsf(values[at]) <= HALF_RANGE;
    }
    *low = least;
    *high = most;
    return is_sound;
}

static double encode_row_plain(const float *values, int64_t dim, uint8_t *out, RowScale scale, double *worst) {
    double lanes[8] = {0}, sum = 0;
    int64_t at = 0;
    for (; at + 8 <= dim; at += 8) {
        for (int lane = 0; lane < 8; lane++) {
            const double error = encode_one(values[at + lane], scale, out + at + lane);
            lanes[lane] += error;
            *worst = error > *worst ? error : *worst;
        }
    }
    sum = add_lanes(lanes);
    for (; at < dim; at++) {
        const double error = encode_one(values[at], scale, out + at);
        sum += error;
        *worst = error > *worst ? error : *worst;
    }
    return sum;
}

/* A row with NaN, or values out of range: those have no error. NaN becomes 0, the others are clamped. */
static double encode_row_with_losses(const float *values, int64_t dim, uint8_t *out, RowScale *scale, int64_t row,
                                     Losses *losses) {
    float low = HALF_RANGE, high = -HALF_RANGE, first_zero = 1;
    for (int64_t at = 0; at < dim; at++) {
        float value = isnan(values[at]) ? 0.0f : values[at];
        value = value > HALF_RANGE ? HALF_RANGE : value < -HALF_RANGE ? -HALF_RANGE : value;
        low = value < low ? value : low;
        high = value > high ? value : high;
        first_zero = value == 0 && first_zero != 0 ? value : first_zero;
        losses->nans += isnan(values[at]) != 0;
        losses->beyond += fabsf(values[at]) > HALF_RANGE;
    }
    if (losses->first < 0) {
        losses->first = row;
    }
    *scale = scale_row(&first_zero, 1, low, high);
    double lanes[8] = {0}, sum = 0;
    const int64_t whole = dim - dim % 8;
    for (int64_t at = 0; at < dim; at++) {
        float value = isnan(values[at]) ? 0.0f : values[at];
        value = value > HALF_RANGE ? HALF_RANGE : value < -HALF_RANGE ? -HALF_RANGE : value;
        double error = encode_one(value, *scale, out + at);
        error = fabsf(values[at]) <= HALF_RANGE ? error : 0;
        losses->worst = error > losses->worst ? error : losses->worst;
        if (at == whole) {
            sum = add_lanes(lanes);
        }
        if (at < whole) {
            lanes[at % 8] += error;
        } else {
            sum += error;
        }
    }
    if (whole == dim) {
        sum = add_lanes(lanes);
    }
    return sum;
}

#if defined(__x86_64__)
WITH_AVX2 static int find_edges_avx2(const float *values, int64_t dim, float *low, float *high) {
    if (dim < 8) {
        return find_edges_plain(values, dim, low, high);
    }
    const __m256 sign = _mm256_set1_ps(-0.0f), range = _mm256_set1_ps(HALF_RANGE);
    __m256 least = _mm256_loadu_ps(values), most = least, unsound = _mm256_setzero_ps();
    for (int64_t at = 0; at < dim; at += 8) {
        const __m256 value = _mm256_loadu_ps(values + (at + 8 <= dim ? at : dim - 8)); /* the last ones overlap */
        least = _mm256_min_ps(least, value);
        most = _mm256_max_ps(most, value);
        unsound = _mm256_or_ps(unsound, _mm256_cmp_ps(_mm256_andnot_ps(sign, value), range, _CMP_NLE_UQ));
    }
    float lows[8], highs[8];
    _mm256_storeu_ps(lows, least);
    _mm256_storeu_ps(highs, most);
    *low = lows[0];
    *high = highs[0];
    for (int lane = 1; lane < 8; lane++) {
        *low = lows[lane] < *low ? lows[lane] : *low;
        *high = highs[lane] > *high ? highs[lane] : *high;
    }
    return _mm256_movemask_ps(unsound) == 0;
}

WITH_AVX2 static double encode_row_avx2(const float *values, int64_t dim, uint8_t *out, RowScale scale, double *worst) {
    const __m256 low = _mm256_set1_ps(scale.low), step = _mm256_set1_ps(scale.scale), inverse = _mm256_set1_ps(scale.inverse);
    const __m256d sign = _mm256_set1_pd(-0.0);
    __m256d left = _mm256_setzero_pd(), right = _mm256_setzero_pd(), most = _mm256_setzero_pd();
    int64_t at = 0;
    for (; at + 8 <= dim; at += 8) {
        const __m256 value = _mm256_loadu_ps(values + at);
        const __m256 rounded = _mm256_round_ps(_mm256_mul_ps(_mm256_sub_ps(value, low), inverse),
                                               _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const __m256i level = _mm256_cvtps_epi32(rounded);
        const __m128i shorts = _mm_packus_epi32(_mm256_castsi256_si128(level), _mm256_extracti128_si256(level, 1));
        _mm_storel_epi64((__m128i *)(out + at), _mm_packus_epi16(shorts, shorts));
        const __m256 back = _mm256_add_ps(_mm256_mul_ps(rounded, step), low);
        const __m256d first = _mm256_sub_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(value)),
                                            _mm256_cvtps_pd(_mm256_castps256_ps128(back)));
        const __m256d second = _mm256_sub_pd(_mm256_cvtps_pd(_mm256_extractf128_ps(value, 1)),
                                             _mm256_cvtps_pd(_mm256_extractf128_ps(back, 1)));
        const __m256d one = _mm256_andnot_pd(sign, first), other = _mm256_andnot_pd(sign, second);
        left = _mm256_add_pd(left, one);
        right = _mm256_add_pd(right, other);
        most = _mm256_max_pd(most, _mm256_max_pd(one, other));
    }
    double each[4], sum = sum_lanes(left, right);
    _mm256_storeu_pd(each, most);
    for (int lane = 0; lane < 4; lane++) {
        *worst = each[lane] > *worst ? each[lane] : *worst;
    }
    for (; at < dim; at++) {
        const double error = encode_one(values[at], scale, out + at);
        sum += error;
        *worst = error > *worst ? error : *worst;
    }
    return sum;
}
#endif

/* numpy's sum of a contiguous array */
static double sum_pairwise(const double *values, int64_t count) {
    if (count < 8) {
        double sum = 0;
        for (int64_t at = 0; at < count; at++) {
            sum += values[at];
        }
        return sum;
    }
    if (count > LEAF) {
        int64_t half = count / 2;
        half -= half % 8;
        return sum_pairwise(values, half) + sum_pairwise(values + half, count - half);
    }
    double lanes[8];
    memcpy(lanes, values, sizeof(lanes));
    int64_t at = 8;
    for (; at + 8 <= count; at += 8) {
        for (int lane = 0; lane < 8; lane++) {
            lanes[lane] += values[at + lane];
        }
    }
    double sum = add_lanes(lanes);
    for (; at < count; at++) {
        sum += values[at];
    }
    return sum;
}

/* out: rows of dim + 8 bytes. row_sums: num_rows values, filled with the errors of each row. dim is at least 1. */
void kernels_encode_int8(const float *values, int64_t num_rows, int64_t dim, uint8_t *out, double *row_sums, int level,
                         Losses *losses) {
    *losses = (Losses){.first = -1};
    for (int64_t row = 0; row < num_rows; row++) {
        const float *first = values + row * dim;
        uint8_t *written = out + row * (dim + 8);
        float low, high;
        RowScale scale;
#if defined(__x86_64__)
        const int is_sound = level > 0 ? find_edges_avx2(first, dim, &low, &high) : find_edges_plain(first, dim, &low, &high);
#else
        (void)level;
        const int is_sound = find_edges_plain(first, dim, &low, &high);
#endif
        if (!is_sound) {
            row_sums[row] = encode_row_with_losses(first, dim, written, &scale, row, losses);
        } else {
            scale = scale_row(first, dim, low, high);
#if defined(__x86_64__)
            row_sums[row] = level > 0 ? encode_row_avx2(first, dim, written, scale, &losses->worst)
                                      : encode_row_plain(first, dim, written, scale, &losses->worst);
#else
            row_sums[row] = encode_row_plain(first, dim, written, scale, &losses->worst);
#endif
        }
        memcpy(written + dim, &scale.scale, 4);
        memcpy(written + dim + 4, &scale.low, 4);
    }
    losses->total = sum_pairwise(row_sums, num_rows);
}

INLINE void decode_rows(const uint8_t *rows, int64_t num_rows, int64_t dim, float *out) {
    for (int64_t row = 0; row < num_rows; row++) {
        const uint8_t *levels = rows + row * (dim + 8);
        float scale, bias;
        memcpy(&scale, levels + dim, 4);
        memcpy(&bias, levels + dim + 4, 4);
        for (int64_t at = 0; at < dim; at++) {
            out[row * dim + at] = (float)levels[at] * scale + bias;
        }
    }
}

WITH_AVX2 static void decode_rows_avx2(const uint8_t *rows, int64_t num_rows, int64_t dim, float *out) {
    decode_rows(rows, num_rows, dim, out);
}

void kernels_decode_int8(const uint8_t *rows, int64_t num_rows, int64_t dim, float *out, int level) {
    if (level > 0) {
        decode_rows_avx2(rows, num_rows, dim, out);
    } else {
        decode_rows(rows, num_rows, dim, out);
    }
}
