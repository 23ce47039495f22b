/* Casts of float32 to float16 and bfloat16, with their errors in the same sweep. kernels/numpy_casts.py defines every bit, the order of sums included. */
#include "casts.h"

EXPORTED void kernels_cast_floats(const float *values, int64_t num_values, uint16_t *out, int to_half, int level,
                                  Losses *losses);

#define INFINITE UINT32_C(0x7F800000)

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* Round a value in range: see _write_float16 in the twin. */
INLINE uint16_t round_half(uint32_t bits, float *written) {
    const uint32_t magnitude = bits & UINT32_C(0x7FFFFFFF);
    const int32_t exponent = (int32_t)(magnitude & INFINITE);
    const uint32_t shift = (uint32_t)(exponent > 0x38800000 ? exponent : 0x38800000) + UINT32_C(0x06800000);
    const float total = float_of(magnitude) + float_of(shift);
    *written = total - float_of(shift);
    return (uint16_t)(((bits >> 16) & UINT32_C(0x8000)) + bits_of(total) + (shift >> 13) + UINT32_C(0x0800));
}

INLINE uint16_t round_bfloat16(uint32_t bits, float *written) {
    const uint32_t rounded = (bits + ((bits >> 16) & 1) + UINT32_C(0x7FFF)) >> 16;
    *written = float_of((rounded & UINT32_C(0x7FFF)) << 16);
    return (uint16_t)rounded;
}

INLINE uint16_t round_one(uint32_t bits, int to_half, float *error) {
    float written;
    const uint16_t rounded = to_half ? round_half(bits, &written) : round_bfloat16(bits, &written);
    *error = fabsf(float_of(bits & UINT32_C(0x7FFFFFFF)) - written);
    return rounded;
}

/* Values that do not fit are clamped, and NaN stays NaN; neither has an error. */
static void cast_leaf_with_losses(const float *values, int count, uint16_t *out, int to_half, float *errors, int64_t position,
                                  Losses *losses) {
    const uint32_t first_beyond = to_half ? UINT32_C(0x477FF000) : UINT32_C(0x7F7F8000);
    for (int at = 0; at < count; at++) {
        const uint32_t bits = bits_of(values[at]), magnitude = bits & UINT32_C(0x7FFFFFFF);
        const uint32_t sign = (bits >> 16) & UINT32_C(0x8000);
        if (magnitude < first_beyond) {
            out[at] = round_one(bits, to_half, &errors[at]);
            continue;
        }
        errors[at] = 0;
        if (losses->first < 0) {
            losses->first = position + at;
        }
        if (magnitude > INFINITE) {
            losses->nans++;
            out[at] = (uint16_t)(to_half ? sign | ((bits >> 13) & UINT32_C(0x03FF)) | UINT32_C(0x7E00)
                                         : (bits >> 16) | UINT32_C(0x0040));
        } else {
            losses->beyond++;
            out[at] = (uint16_t)(sign | (to_half ? UINT32_C(0x7BFF) : UINT32_C(0x7F7F)));
        }
    }
}

INLINE int all_fit(const float *values, int count, uint32_t first_beyond) {
    uint32_t is_beyond = 0;
    for (int at = 0; at < count; at++) {
        is_beyond |= (int32_t)(bits_of(values[at]) & UINT32_C(0x7FFFFFFF)) >= (int32_t)first_beyond;
    }
    return !is_beyond;
}

INLINE double sum_leaf(const float *errors, int count, double *worst) {
    float most = 0;
    for (int at = 0; at < count; at++) {
        most = errors[at] > most ? errors[at] : most;
    }
    *worst = most > *worst ? most : *worst;
    if (count < 8) {
        double sum = 0;
        for (int at = 0; at < count; at++) {
            sum += errors[at];
        }
        return sum;
    }
    double lanes[8];
    for (int lane = 0; lane < 8; lane++) {
        lanes[lane] = errors[lane];
    }
    int at = 8;
    for (; at + 8 <= count; at += 8) {
        for (int lane = 0; lane < 8; lane++) {
            lanes[lane] += errors[at + lane];
        }
    }
    double sum = add_lanes(lanes);
    for (; at < count; at++) {
        sum += errors[at];
    }
    return sum;
}

INLINE double cast_leaf(const float *values, int count, uint16_t *out, int to_half, int64_t position, Losses *losses) {
    float errors[LEAF];
    if (all_fit(values, count, to_half ? UINT32_C(0x477FF000) : UINT32_C(0x7F7F8000))) {
        for (int at = 0; at < count; at++) {
            out[at] = round_one(bits_of(values[at]), to_half, &errors[at]);
        }
    } else {
        cast_leaf_with_losses(values, count, out, to_half, errors, position, losses);
    }
    return sum_leaf(errors, count, &losses->worst);
}

typedef double (*CastLeaf)(const float *values, int count, uint16_t *out, int64_t position, Losses *losses);

static double half_plain(const float *values, int count, uint16_t *out, int64_t position, Losses *losses) {
    return cast_leaf(values, count, out, 1, position, losses);
}

static double bfloat16_plain(const float *values, int count, uint16_t *out, int64_t position, Losses *losses) {
    return cast_leaf(values, count, out, 0, position, losses);
}

#if defined(__x86_64__)
/* The errors of a leaf, eight at a time: as sum_leaf adds them. */
typedef struct {
    __m256d low, high;
    __m256 most;
} Errors;

WITH_AVX2 static inline void add_errors(Errors *errors, __m256 value, __m256 written) {
    const __m256 error = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), _mm256_sub_ps(value, written));
    errors->most = _mm256_max_ps(errors->most, error);
    errors->low = _mm256_add_pd(errors->low, _mm256_cvtps_pd(_mm256_castps256_ps128(error)));
    errors->high = _mm256_add_pd(errors->high, _mm256_cvtps_pd(_mm256_extractf128_ps(error, 1)));
}

WITH_AVX2 static inline double sum_errors(const Errors *errors, double *worst) {
    float each[8];
    _mm256_storeu_ps(each, errors->most);
    for (int lane = 0; lane < 8; lane++) {
        *worst = each[lane] > *worst ? each[lane] : *worst;
    }
    return sum_lanes(errors->low, errors->high);
}

WITH_AVX2 static int all_fit_avx2(const float *values, uint32_t first_beyond) {
    const __m256i limit = _mm256_set1_epi32((int32_t)first_beyond - 1), bits = _mm256_set1_epi32(0x7FFFFFFF);
    __m256i is_beyond = _mm256_setzero_si256();
    for (int at = 0; at < LEAF; at += 8) {
        const __m256i magnitude = _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(values + at)), bits);
        is_beyond = _mm256_or_si256(is_beyond, _mm256_cmpgt_epi32(magnitude, limit));
    }
    return _mm256_testz_si256(is_beyond, is_beyond);
}

WITH_AVX2 static double bfloat16_avx2(const float *values, int count, uint16_t *out, int64_t position, Losses *losses) {
    if (count != LEAF || !all_fit_avx2(values, UINT32_C(0x7F7F8000))) {
        return cast_leaf(values, count, out, 0, position, losses);
    }
    const __m256i one = _mm256_set1_epi32(1), below_half = _mm256_set1_epi32(0x7FFF);
    Errors errors = {_mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_ps()};
    for (int at = 0; at < LEAF; at += 8) {
        const __m256 value = _mm256_loadu_ps(values + at);
        const __m256i bits = _mm256_castps_si256(value);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
        const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, odd), below_half), 16);
        _mm_storeu_si128((__m128i *)(out + at),
                         _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1)));
        add_errors(&errors, value, _mm256_castsi256_ps(_mm256_slli_epi32(rounded, 16)));
    }
    return sum_errors(&errors, &losses->worst);
}

WITH_AVX2 static double half_avx2(const float *values, int count, uint16_t *out, int64_t position, Losses *losses) {
    if (count != LEAF || !all_fit_avx2(values, UINT32_C(0x477FF000))) {
        return cast_leaf(values, count, out, 1, position, losses);
    }
    Errors errors = {_mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_ps()};
    for (int at = 0; at < LEAF; at += 8) {
        const __m256 value = _mm256_loadu_ps(values + at);
        const __m128i half = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm_storeu_si128((__m128i *)(out + at), half);
        add_errors(&errors, value, _mm256_cvtph_ps(half));
    }
    return sum_errors(&errors, &losses->worst);
}
#endif

static double cast_span(CastLeaf cast, const float *values, int64_t count, uint16_t *out, int64_t position, Losses *losses) {
    if (count <= LEAF) {
        return cast(values, (int)count, out, position, losses);
    }
    int64_t half = count / 2;
    half -= half % 8;
    const double first = cast_span(cast, values, half, out, position, losses);
    return first + cast_span(cast, values + half, count - half, out + half, position + half, losses);
}

/* out: float16 bits if to_half, else bfloat16 bits. losses: filled. */
void kernels_cast_floats(const float *values, int64_t num_values, uint16_t *out, int to_half, int level, Losses *losses) {
    CastLeaf cast = to_half ? half_plain : bfloat16_plain;
#if defined(__x86_64__)
    if (level > 0) {
        cast = to_half ? half_avx2 : bfloat16_avx2;
    }
#else
    (void)level;
#endif
    *losses = (Losses){.first = -1};
    losses->total = cast_span(cast, values, num_values, out, 0, losses);
}
