/* Duplicates among int64 ids, with a hash table that no search walks through.
 *
 * Each id is mixed by an odd multiplier, which is one to one, and the upper bits of the result are its slot. The first id of a slot
 * stays there. A later one is compared with it; if they differ, it goes to a list. The list is swept in the same way with
 * another multiplier, until it is empty. Equal ids have equal slots in each sweep, so they meet.
 *
 * The multipliers are random in each process. Whatever the ids are, two of them share a slot with a probability of at most
 * 2 / slots (Dietzfelbinger et al., 1997), so nobody can craft ids that make this slow. */
#include "kernels.h"

EXPORTED int kernels_has_duplicates(const int64_t *ids, const int64_t *groups, int64_t num_ids, uint64_t *table,
                                    uint64_t *list, uint64_t seed, int level, int64_t *num_swept);
EXPORTED uint64_t kernels_first_multiplier(uint64_t seed);
EXPORTED void kernels_deal(const int64_t *ids, int64_t num_ids, int64_t *dealt, int64_t *edges, int bits,
                           uint64_t multiplier);
EXPORTED int kernels_has_duplicates_dealt(const int64_t *ids, const int64_t *edges, int64_t num_deals, int bits,
                                          uint64_t *table, uint64_t *list, uint64_t seed, int level,
                                          int64_t *num_swept);

typedef struct {
    uint64_t *table;
    uint64_t *list;
    int64_t count; /* of the list */
    int shift;
    int is_equal;
} Sweep;

/* splitmix64 (Steele, Lea, Flood 2014) */
static uint64_t next_random(uint64_t *state) {
    uint64_t mixed = *state += UINT64_C(0x9E3779B97F4A7C15);
    mixed = (mixed ^ (mixed >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    mixed = (mixed ^ (mixed >> 27)) * UINT64_C(0x94D049BB133111EB);
    return mixed ^ (mixed >> 31);
}

/* The table has two to four slots for each id. The caller allocates 1 << table_bits slots, by the same rule. */
static int table_bits(int64_t num_ids) { return num_ids < 4 ? 3 : 65 - __builtin_clzll((uint64_t)num_ids - 1); }

static void start(Sweep *sweep, int64_t num_ids) {
    int bits = table_bits(num_ids);
    memset(sweep->table, 0, sizeof(uint64_t) << bits);
    sweep->table[0] = UINT64_MAX; /* so that the content of an empty slot belongs to another slot */
    sweep->shift = 64 - bits;
    sweep->count = 0;
    sweep->is_equal = 0;
}

INLINE void add(uint64_t *table, uint64_t *list, int shift, uint64_t mixed, int64_t *count, int *is_equal) {
    uint64_t slot = mixed >> shift;
    uint64_t there = table[slot];
    uint64_t difference = there ^ mixed;
    uint64_t is_free = (difference >> shift) != 0;
    table[slot] = there ^ (difference & (0 - is_free)); /* no branch: a fifth of them would be mispredicted */
    list[*count] = mixed;
    *count += !is_free;
    *is_equal |= difference == 0;
}

INLINE void add_ids(Sweep *sweep, const int64_t *ids, const int64_t *groups, int64_t num_ids, uint64_t multiplier,
                    uint64_t of_group) {
    uint64_t *table = sweep->table, *list = sweep->list;
    int64_t count = sweep->count;
    int is_equal = sweep->is_equal;
    const int shift = sweep->shift;
    for (int64_t row = 0; row < num_ids; row++) {
        uint64_t mixed = (uint64_t)ids[row] * multiplier;
        if (groups != NULL) {
            mixed += (uint64_t)groups[row] * of_group;
        }
        add(table, list, shift, mixed, &count, &is_equal);
    }
    sweep->count = count;
    sweep->is_equal = is_equal;
}

/* Sweep the list until it is empty, or two of its ids are equal. At least one id leaves it in each sweep. */
INLINE int sweep_list(Sweep *sweep, uint64_t *random, int64_t *num_swept) {
    while (!sweep->is_equal && sweep->count > 1) {
        const int64_t left = sweep->count;
        const uint64_t multiplier = next_random(random) | 1;
        start(sweep, left);
        int64_t count = 0;
        int is_equal = 0;
        for (int64_t row = 0; row < left; row++) {
            /* an id is read before the list is written there */
            add(sweep->table, sweep->list, sweep->shift, sweep->list[row] * multiplier, &count, &is_equal);
        }
        sweep->count = count;
        sweep->is_equal = is_equal;
        *num_swept += left;
    }
    return sweep->is_equal;
}

/* Return the multiplier of the first sweep for a seed. */
uint64_t kernels_first_multiplier(uint64_t seed) { return next_random(&seed) | 1; }

INLINE int search(const int64_t *ids, const int64_t *groups, int64_t num_ids, uint64_t *table, uint64_t *list, uint64_t seed,
                  int64_t *num_swept) {
    Sweep sweep = {.table = table, .list = list};
    uint64_t random = seed;
    const uint64_t multiplier = next_random(&random) | 1, of_group = next_random(&random) | 1;
    start(&sweep, num_ids);
    if (groups == NULL) {
        add_ids(&sweep, ids, NULL, num_ids, multiplier, 0);
    } else {
        add_ids(&sweep, ids, groups, num_ids, multiplier, of_group);
    }
    *num_swept += num_ids;
    return sweep_list(&sweep, &random, num_swept);
}

WITH_AVX2 static int search_bmi2(const int64_t *ids, const int64_t *groups, int64_t num_ids, uint64_t *table, uint64_t *list,
                                 uint64_t seed, int64_t *num_swept) {
    return search(ids, groups, num_ids, table, list, seed, num_swept);
}

/* Return whether an id is duplicate; with groups, whether it may be within one group: ids of two groups may meet by chance.
 *
 * table: 1 << table_bits(num_ids) values. list: num_ids values. level 1: shifts by a variable take one step, with BMI2. num_swept: the
 * ids of all sweeps are added to it. */
int kernels_has_duplicates(const int64_t *ids, const int64_t *groups, int64_t num_ids, uint64_t *table, uint64_t *list,
                           uint64_t seed, int level, int64_t *num_swept) {
    return level > 0 ? search_bmi2(ids, groups, num_ids, table, list, seed, num_swept)
                     : search(ids, groups, num_ids, table, list, seed, num_swept);
}

/* Order ids by bucket, the upper `bits` bits of the mixed id. edges: (1 << bits) + 1 values; where each bucket begins. */
void kernels_deal(const int64_t *ids, int64_t num_ids, int64_t *dealt, int64_t *edges, int bits, uint64_t multiplier) {
    const int shift = 64 - bits;
    const int64_t num_buckets = INT64_C(1) << bits;
    memset(edges, 0, sizeof(int64_t) * ((size_t)num_buckets + 1));
    int64_t *next = edges + 1;
    for (int64_t row = 0; row < num_ids; row++) {
        next[((uint64_t)ids[row] * multiplier) >> shift]++;
    }
    for (int64_t bucket = 0, begin = 0; bucket < num_buckets; bucket++) {
        const int64_t count = next[bucket];
        next[bucket] = begin; /* where the next id of this bucket goes: at the end, where the next bucket begins */
        begin += count;
    }
    for (int64_t row = 0; row < num_ids; row++) {
        dealt[next[((uint64_t)ids[row] * multiplier) >> shift]++] = ids[row];
    }
}

#define AHEAD 8 /* pieces of a bucket that are fetched before they are needed: each is somewhere else in memory */

INLINE int search_dealt(const int64_t *ids, const int64_t *edges, int64_t num_deals, int bits, uint64_t *table, uint64_t *list,
                        uint64_t seed, int64_t *num_swept) {
    const int64_t num_buckets = INT64_C(1) << bits;
    uint64_t random = seed;
    for (int64_t bucket = 0; bucket < num_buckets; bucket++) {
        const int64_t *begin = edges + bucket * num_deals, *end = begin + num_deals;
        int64_t total = 0;
        for (int64_t deal = 0; deal < num_deals; deal++) {
            total += end[deal] - begin[deal];
        }
        if (total < 2) {
            continue;
        }
        Sweep sweep = {.table = table, .list = list};
        const uint64_t multiplier = next_random(&random) | 1;
        start(&sweep, total);
        for (int64_t deal = 0; deal < num_deals; deal++) {
            if (deal + AHEAD < num_deals) {
                const char *piece = (const char *)(ids + begin[deal + AHEAD]);
                for (int line = 0; line < 4; line++) {
                    __builtin_prefetch(piece + 64 * line);
                }
            }
            add_ids(&sweep, ids + begin[deal], NULL, end[deal] - begin[deal], multiplier, 0);
        }
        *num_swept += total;
        if (sweep_list(&sweep, &random, num_swept)) {
            return 1;
        }
    }
    return 0;
}

WITH_AVX2 static int search_dealt_bmi2(const int64_t *ids, const int64_t *edges, int64_t num_deals, int bits, uint64_t *table,
                                       uint64_t *list, uint64_t seed, int64_t *num_swept) {
    return search_dealt(ids, edges, num_deals, bits, table, list, seed, num_swept);
}

/* Return whether an id is duplicate among ids that were dealt several times.
 *
 * edges: ((1 << bits) + 1, num_deals); where each bucket of each deal begins in ids. table and list: for the largest bucket. */
int kernels_has_duplicates_dealt(const int64_t *ids, const int64_t *edges, int64_t num_deals, int bits, uint64_t *table,
                                 uint64_t *list, uint64_t seed, int level, int64_t *num_swept) {
    return level > 0 ? search_dealt_bmi2(ids, edges, num_deals, bits, table, list, seed, num_swept)
                     : search_dealt(ids, edges, num_deals, bits, table, list, seed, num_swept);
}
