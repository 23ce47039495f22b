/* What all kernels share. Arrays in, arrays out: no kernel knows of files or formats, allocates memory, or calls Python.
 *
 * The caller checks lengths and dtypes (dist_export/kernels/compiled*.py). Each kernel has a twin in numpy with the same results,
 * bit for bit. Numbers on disk are little-endian; the library is not loaded on other machines. */
#ifndef DIST_EXPORT_KERNELS_H
#define DIST_EXPORT_KERNELS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define EXPORTED __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

/* Functions for processors with AVX2, BMI2 and F16C. `level` 1 chooses them, 0 chooses plain C. */
#if defined(__x86_64__)
#define WITH_AVX2 __attribute__((target("avx2,bmi2,f16c")))
#else
#define WITH_AVX2
#endif

/* Values at any position: columns of a mapped file may be unaligned. */
INLINE int64_t read_int64(const unsigned char *column, int64_t row) {
    int64_t value;
    memcpy(&value, column + row * 8, 8);
    return value;
}

INLINE uint32_t read_uint32(const unsigned char *column, int64_t row) {
    uint32_t value;
    memcpy(&value, column + row * 4, 4);
    return value;
}

#endif
