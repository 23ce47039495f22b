/* One sweep over a run of ids: the sum of mixed ids, the least and greatest position, how many are outside their slice; and the
 * owner of each id, with the counts of all owners. A position is uint64(id) mod size, and size is below 2**62. */
#include "kernels.h"

__extension__ typedef unsigned __int128 uint128;

EXPORTED void kernels_sweep_ids(const int64_t *ids, const int64_t *starts, int64_t num_blocks, int64_t num_ids,
                                uint64_t size, const int64_t *begins, const int64_t *ends, uint64_t *sums, int64_t *lowest,
                                int64_t *highest, int64_t *outside, int level);
EXPORTED void kernels_look_owners_up(const int64_t *ids, int64_t num_ids, uint64_t size, const void *lookup, int owner_bytes,
                                     void *owners, int64_t num_targets, int64_t *counts, int level);
EXPORTED void kernels_search_owners(const int64_t *ids, int64_t num_ids, uint64_t size, const int64_t *breaks,
                                    int64_t num_breaks, const int32_t *owner_of_break, int32_t *owners, int64_t *counts);

#define GOLDEN UINT64_C(0x9E3779B97F4A7C15)

/* A division by a fixed size, as two products (Lemire, Kaser, Kurz: Faster remainder by direct computation, 2019). It is exact
 * for all 64-bit numbers, because the inverse has 128 bits. */
typedef struct {
    uint128 inverse;
    uint64_t size;
} Divisor;

static Divisor divisor_of(uint64_t size) {
    return (Divisor){.inverse = ~(uint128)0 / size + 1, .size = size};
}

INLINE uint64_t remainder_of(uint64_t number, Divisor divisor) {
    uint128 fraction = divisor.inverse * number;
    uint128 low = (uint128)(uint64_t)fraction * divisor.size;
    uint128 high = (uint128)(uint64_t)(fraction >> 64) * divisor.size;
    return (uint64_t)((high + (low >> 64)) >> 64);
}

typedef struct {
    uint64_t sum;
    int64_t lowest, highest, outside;
} Counts;

INLINE void count_one(Counts *counts, uint64_t id, int64_t position, int64_t begin, int64_t end) {
    uint64_t mixed = id * GOLDEN;
    counts->sum += mixed ^ (mixed >> 32);
    counts->lowest = position < counts->lowest ? position : counts->lowest;
    counts->highest = position > counts->highest ? position : counts->highest;
    counts->outside += (position < begin) | (position >= end);
}

INLINE Counts sweep_masked(const int64_t *ids, int64_t num_ids, uint64_t mask, int64_t begin, int64_t end) {
    Counts counts = {0, INT64_MAX, INT64_MIN, 0};
    for (int64_t row = 0; row < num_ids; row++) {
        count_one(&counts, (uint64_t)ids[row], (int64_t)((uint64_t)ids[row] & mask), begin, end);
    }
    return counts;
}

static Counts sweep_divided(const int64_t *ids, int64_t num_ids, Divisor divisor, int64_t begin, int64_t end) {
    Counts counts = {0, INT64_MAX, INT64_MIN, 0};
    for (int64_t row = 0; row < num_ids; row++) {
        count_one(&counts, (uint64_t)ids[row], (int64_t)remainder_of((uint64_t)ids[row], divisor), begin, end);
    }
    return counts;
}

WITH_AVX2 static Counts sweep_masked_avx2(const int64_t *ids, int64_t num_ids, uint64_t mask, int64_t begin, int64_t end) {
    return sweep_masked(ids, num_ids, mask, begin, end);
}

static Counts sweep_masked_plain(const int64_t *ids, int64_t num_ids, uint64_t mask, int64_t begin, int64_t end) {
    return sweep_masked(ids, num_ids, mask, begin, end);
}

/* starts: where each block begins in ids; no block is empty. All others have one value for each block; the last four are filled. */
void kernels_sweep_ids(const int64_t *ids, const int64_t *starts, int64_t num_blocks, int64_t num_ids, uint64_t size,
                       const int64_t *begins, const int64_t *ends, uint64_t *sums, int64_t *lowest, int64_t *highest,
                       int64_t *outside, int level) {
    const int is_power_of_two = (size & (size - 1)) == 0;
    const Divisor divisor = divisor_of(size);
    for (int64_t block = 0; block < num_blocks; block++) {
        const int64_t *first = ids + starts[block];
        const int64_t count = (block + 1 < num_blocks ? starts[block + 1] : num_ids) - starts[block];
        Counts counts;
        if (!is_power_of_two) {
            counts = sweep_divided(first, count, divisor, begins[block], ends[block]);
        } else if (level > 0) {
            counts = sweep_masked_avx2(first, count, size - 1, begins[block], ends[block]);
        } else {
            counts = sweep_masked_plain(first, count, size - 1, begins[block], ends[block]);
        }
        sums[block] = counts.sum;
        lowest[block] = counts.lowest;
        highest[block] = counts.highest;
        outside[block] = counts.outside;
    }
}

#define FEW_TARGETS 256

/* Fill owners, and count them. Neighbours often have one owner: four counters for each keep their additions apart. */
#define LOOK_UP(NAME, OWNER)                                                                                            \
    static void NAME(const int64_t *ids, int64_t num_ids, uint64_t size, const OWNER *lookup, OWNER *owners,           \
                     int64_t num_targets, int64_t *counts) {                                                           \
        const int is_power_of_two = (size & (size - 1)) == 0;                                                          \
        const Divisor divisor = divisor_of(size);                                                                      \
        if (is_power_of_two) {                                                                                         \
            for (int64_t row = 0; row < num_ids; row++) {                                                              \
                owners[row] = lookup[(uint64_t)ids[row] & (size - 1)];                                                 \
            }                                                                                                          \
        } else {                                                                                                       \
            for (int64_t row = 0; row < num_ids; row++) {                                                              \
                owners[row] = lookup[remainder_of((uint64_t)ids[row], divisor)];                                       \
            }                                                                                                          \
        }                                                                                                              \
        if (num_targets > FEW_TARGETS) {                                                                               \
            for (int64_t row = 0; row < num_ids; row++) {                                                              \
                counts[owners[row]]++;                                                                                 \
            }                                                                                                          \
            return;                                                                                                    \
        }                                                                                                              \
        int64_t apart[4][FEW_TARGETS] = {{0}};                                                                         \
        int64_t row = 0;                                                                                               \
        for (; row + 4 <= num_ids; row += 4) {                                                                         \
            for (int lane = 0; lane < 4; lane++) {                                                                     \
                apart[lane][owners[row + lane]]++;                                                                     \
            }                                                                                                          \
        }                                                                                                              \
        for (; row < num_ids; row++) {                                                                                 \
            apart[0][owners[row]]++;                                                                                   \
        }                                                                                                              \
        for (int64_t target = 0; target < num_targets; target++) {                                                     \
            counts[target] += apart[0][target] + apart[1][target] + apart[2][target] + apart[3][target];               \
        }                                                                                                              \
    }

LOOK_UP(look_up_bytes, uint8_t)
LOOK_UP(look_up_shorts, uint16_t)
LOOK_UP(look_up_ints, int32_t)

/* lookup: the owner of each position, of 1, 2 or 4 bytes, below num_targets. owners: filled. counts: one for each target; added to. */
void kernels_look_owners_up(const int64_t *ids, int64_t num_ids, uint64_t size, const void *lookup, int owner_bytes,
                            void *owners, int64_t num_targets, int64_t *counts, int level) {
    (void)level;
    if (owner_bytes == 1) {
        look_up_bytes(ids, num_ids, size, lookup, owners, num_targets, counts);
    } else if (owner_bytes == 2) {
        look_up_shorts(ids, num_ids, size, lookup, owners, num_targets, counts);
    } else {
        look_up_ints(ids, num_ids, size, lookup, owners, num_targets, counts);
    }
}

/* The same for sizes without a lookup table: owner_of_break[i] owns the positions from breaks[i] on; breaks[0] is 0. */
void kernels_search_owners(const int64_t *ids, int64_t num_ids, uint64_t size, const int64_t *breaks, int64_t num_breaks,
                           const int32_t *owner_of_break, int32_t *owners, int64_t *counts) {
    const Divisor divisor = divisor_of(size);
    const int is_power_of_two = (size & (size - 1)) == 0;
    for (int64_t row = 0; row < num_ids; row++) {
        const uint64_t id = (uint64_t)ids[row];
        const int64_t position = (int64_t)(is_power_of_two ? id & (size - 1) : remainder_of(id, divisor));
        int64_t low = 0, left = num_breaks;
        while (left > 1) { /* breaks[low] <= position */
            const int64_t half = left / 2;
            low = breaks[low + half] <= position ? low + half : low;
            left -= half;
        }
        owners[row] = owner_of_break[low];
        counts[owner_of_break[low]]++;
    }
}
