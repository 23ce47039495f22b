/* What the loader asks the library itself. */
#include "kernels.h"

#ifndef SOURCE_DIGEST
#error "SOURCE_DIGEST is the digest of these sources; setup.py defines it"
#endif

EXPORTED const char *kernels_source_digest(void);
EXPORTED int kernels_best_level(void);

const char *kernels_source_digest(void) { return SOURCE_DIGEST; }

int kernels_best_level(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
#else
    return 0;
#endif
}
