/* The row index: keys of ids, slots from sorted keys, and searches. formats/row_index.py defines it.
 *
 * A search waits for memory, not for the processor. So many ids are searched at once, and what the next step reads is fetched while
 * others are looked at. Numbers that are read from slots are checked before they are used. */
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

__extension__ typedef unsigned __int128 uint128;

#define ODD UINT64_C(0xD6E8FEB86659FD93)
#define EMPTY UINT32_MAX
#define BATCH 512
#define ROWS_AHEAD 24

enum { SOUND = 0, BEYOND_SLOTS = 1, NO_ROW = 2 };

typedef struct {
    const unsigned char *slots, *ids;
    int64_t num_slots, num_rows, longest_probe;
    uint64_t num_buckets, seed;
} Index;

EXPORTED void kernels_encode_keys(const int64_t *ids, int64_t num_ids, int64_t first_row, uint64_t seed, uint64_t *keys);
EXPORTED int64_t kernels_measure_slots(const uint64_t *keys, int64_t num_keys, uint64_t num_buckets, int64_t num_slots,
                                       int64_t *longest_probe);
EXPORTED void kernels_fill_slots(const uint64_t *keys, int64_t num_keys, uint64_t num_buckets, int64_t num_slots,
                                 uint32_t *slots);
EXPORTED int kernels_find_rows(const Index *index, const int64_t *sought, int64_t num_sought, int64_t *found);
EXPORTED int64_t kernels_count_rows_at(const Index *index, const int64_t *sought, int64_t num_sought, int64_t first_row, int level);
EXPORTED void kernels_take_rows(const unsigned char *block, int64_t row_bytes, const int64_t *found, const int64_t *targets,
                                int64_t num_rows, unsigned char *rows, unsigned char *has_row);

INLINE void fetch_ahead(const unsigned char *column, int64_t offset) {
    __builtin_prefetch((const void *)((uintptr_t)column + (uintptr_t)offset)); /* it may lie outside: no fault, no access */
}

/* seed: already multiplied. */
INLINE uint64_t hash_id(uint64_t id, uint64_t seed) {
    uint64_t hashed = id ^ seed;
    hashed ^= hashed >> 32;
    hashed *= ODD;
    hashed ^= hashed >> 32;
    hashed *= ODD;
    hashed ^= hashed >> 29;
    return hashed >> 32;
}

/* num_buckets may have 33 bits. */
INLINE int64_t bucket_of(uint64_t hashed, uint64_t num_buckets) {
    return (int64_t)(uint64_t)(((uint128)hashed * num_buckets) >> 32);
}

/* keys: filled with hash << 32 | row. */
void kernels_encode_keys(const int64_t *ids, int64_t num_ids, int64_t first_row, uint64_t seed, uint64_t *keys) {
    for (int64_t row = 0; row < num_ids; row++) {
        keys[row] = hash_id((uint64_t)ids[row], seed) << 32 | (uint64_t)(first_row + row);
    }
}

/* Return the number of slots after these sorted keys. num_slots: before them. longest_probe: made larger. */
int64_t kernels_measure_slots(const uint64_t *keys, int64_t num_keys, uint64_t num_buckets, int64_t num_slots,
                              int64_t *longest_probe) {
    int64_t longest = *longest_probe;
    for (int64_t number = 0; number < num_keys; number++) {
        const int64_t bucket = bucket_of(keys[number] >> 32, num_buckets);
        const int64_t position = bucket > num_slots ? bucket : num_slots;
        longest = position - bucket > longest ? position - bucket : longest;
        num_slots = position + 1;
    }
    *longest_probe = longest;
    return num_slots;
}

/* slots: the slots from num_slots to where kernels_measure_slots ends; they hold EMPTY, and are filled. */
void kernels_fill_slots(const uint64_t *keys, int64_t num_keys, uint64_t num_buckets, int64_t num_slots, uint32_t *slots) {
    int64_t next = 0;
    for (int64_t number = 0; number < num_keys; number++) {
        const int64_t bucket = bucket_of(keys[number] >> 32, num_buckets) - num_slots;
        const int64_t position = bucket > next ? bucket : next;
        slots[position] = (uint32_t)keys[number];
        next = position + 1;
    }
}

/* Find the rows of up to BATCH ids. */
static int find_batch(const Index *index, const int64_t *sought, int count, int64_t *found) {
    int64_t position[BATCH];
    uint32_t row[BATCH];
    uint16_t number[BATCH];
    for (int at = 0; at < count; at++) {
        position[at] = bucket_of(hash_id((uint64_t)sought[at], index->seed), index->num_buckets);
        fetch_ahead(index->slots, 4 * position[at]);
        number[at] = (uint16_t)at;
        found[at] = -1;
    }
    for (int64_t probe = 0; count > 0 && probe <= index->longest_probe; probe++) {
        int left = 0;
        for (int at = 0; at < count; at++) {
            if (position[at] >= index->num_slots) {
                return BEYOND_SLOTS;
            }
            const uint32_t there = read_uint32(index->slots, position[at]);
            row[left] = there;
            position[left] = position[at];
            number[left] = number[at];
            if (there != EMPTY) {
                if (there >= index->num_rows) {
                    return NO_ROW;
                }
                fetch_ahead(index->ids, 8 * (int64_t)there);
                left++;
            }
        }
        count = left;
        left = 0;
        for (int at = 0; at < count; at++) {
            const int64_t id = sought[number[at]];
            const int is_hit = read_int64(index->ids, row[at]) == id;
            found[number[at]] ^= ((int64_t)row[at] ^ -1) & -(int64_t)is_hit; /* -1 becomes the row; half of all branches were wrong */
            position[left] = position[at] + 1;
            number[left] = number[at];
            left += !is_hit;
        }
        count = left;
    }
    return SOUND;
}

/* found: the row of each sought id, -1 if it has none. Return why the index is damaged, or SOUND. */
int kernels_find_rows(const Index *index, const int64_t *sought, int64_t num_sought, int64_t *found) {
    for (int64_t first = 0; first < num_sought; first += BATCH) {
        const int64_t left = num_sought - first;
        const int fault = find_batch(index, sought + first, left < BATCH ? (int)left : BATCH, found + first);
        if (fault != SOUND) {
            return fault;
        }
    }
    return SOUND;
}

/* Return whether one of the slots first to last has a row, before any empty one. */
INLINE int is_row_at(const Index *index, int64_t first, int64_t last, uint64_t row) {
    last = last < index->num_slots ? last : index->num_slots - 1;
    for (int64_t slot = first; slot <= last; slot++) {
        const uint32_t there = read_uint32(index->slots, slot);
        if (there == row || there == EMPTY) {
            return there == row;
        }
    }
    return 0;
}

static int64_t count_batch_plain(const Index *index, const int64_t *position, int count, uint64_t first_row) {
    int64_t num_found = 0;
    for (int at = 0; at < count; at++) {
        num_found += is_row_at(index, position[at], position[at] + index->longest_probe, first_row + (uint64_t)at);
    }
    return num_found;
}

#if defined(__x86_64__)
/* Eight slots at once: where a search ends is a guess that a branch gets wrong every other time. */
WITH_AVX2 static int64_t count_batch_avx2(const Index *index, const int64_t *position, int count, uint64_t first_row) {
    const int64_t longest = index->longest_probe;
    const unsigned within = longest < 7 ? (2U << longest) - 1 : 0xFF;
    const __m256i empty = _mm256_set1_epi32(-1);
    int64_t num_found = 0;
    for (int at = 0; at < count; at++) {
        const uint64_t row = first_row + (uint64_t)at;
        if (position[at] + 8 > index->num_slots) {
            num_found += is_row_at(index, position[at], position[at] + longest, row);
            continue;
        }
        const __m256i slots = _mm256_loadu_si256((const __m256i *)(const void *)(index->slots + 4 * position[at]));
        const __m256i hits = _mm256_cmpeq_epi32(slots, _mm256_set1_epi32((int)(uint32_t)row));
        const unsigned ends = (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(slots, empty)));
        const unsigned found = (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(hits)) & ((ends & -ends) - 1);
        num_found += (found & within) != 0;
        if (!(found | ends)) {
            num_found += is_row_at(index, position[at] + 8, position[at] + longest, row);
        }
    }
    return num_found;
}
#endif

/* Return how many of these ids, which are in consecutive rows, a search finds at their row. */
int64_t kernels_count_rows_at(const Index *index, const int64_t *sought, int64_t num_sought, int64_t first_row, int level) {
    int64_t (*count_batch)(const Index *, const int64_t *, int, uint64_t) = count_batch_plain;
#if defined(__x86_64__)
    if (level > 0 && first_row + num_sought < (int64_t)EMPTY) { /* rows of 32 bits */
        count_batch = count_batch_avx2;
    }
#endif
    (void)level;
    int64_t position[BATCH];
    int64_t num_found = 0;
    for (int64_t first = 0; first < num_sought; first += BATCH) {
        const int count = num_sought - first < BATCH ? (int)(num_sought - first) : BATCH;
        for (int at = 0; at < count; at++) {
            position[at] = bucket_of(hash_id((uint64_t)sought[first + at], index->seed), index->num_buckets);
            fetch_ahead(index->slots, 4 * position[at]);
        }
        num_found += count_batch(index, position, count, (uint64_t)(first_row + first));
    }
    return num_found;
}

INLINE void copy_rows(const unsigned char *block, int64_t row_bytes, const int64_t *found, const int64_t *targets,
                      int64_t num_rows, unsigned char *rows, unsigned char *has_row) {
    for (int64_t at = 0; at < num_rows; at++) {
        const int64_t later = at + ROWS_AHEAD < num_rows ? found[at + ROWS_AHEAD] : -1;
        if (later >= 0) {
            for (int64_t byte = 0; byte < row_bytes && byte < 512; byte += 64) {
                fetch_ahead(block, later * row_bytes + byte);
            }
        }
        if (found[at] >= 0) {
            memcpy(rows + targets[at] * row_bytes, block + found[at] * row_bytes, (size_t)row_bytes);
            has_row[targets[at]] = 1;
        }
    }
}

/* Copy row found[i] of a block to row targets[i] of rows, unless it is -1. */
void kernels_take_rows(const unsigned char *block, int64_t row_bytes, const int64_t *found, const int64_t *targets,
                       int64_t num_rows, unsigned char *rows, unsigned char *has_row) {
    switch (row_bytes) { /* a copy of known length needs no call */
    case 32:
        copy_rows(block, 32, found, targets, num_rows, rows, has_row);
        break;
    case 64:
        copy_rows(block, 64, found, targets, num_rows, rows, has_row);
        break;
    case 128:
        copy_rows(block, 128, found, targets, num_rows, rows, has_row);
        break;
    case 256:
        copy_rows(block, 256, found, targets, num_rows, rows, has_row);
        break;
    default:
        copy_rows(block, row_bytes, found, targets, num_rows, rows, has_row);
    }
}
