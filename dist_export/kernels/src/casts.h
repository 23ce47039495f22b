/* What the casts share: what they lose, and the order in which errors are summed. */
#ifndef DIST_EXPORT_CASTS_H
#define DIST_EXPORT_CASTS_H

#include "kernels.h"

#include <math.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

typedef struct {
    int64_t nans, beyond, first; /* first: the index of the first value (row, for int8) that does not fit, or -1 */
    double worst, total;
} Losses;

#define LEAF 128 /* numpy sums so many values in eight lanes, and halves longer arrays */

INLINE double add_lanes(const double *lanes) {
    return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

#if defined(__x86_64__)
WITH_AVX2 static inline double sum_lanes(__m256d low, __m256d high) {
    double lanes[8];
    _mm256_storeu_pd(lanes, low);
    _mm256_storeu_pd(lanes + 4, high);
    return add_lanes(lanes);
}
#endif

#endif
