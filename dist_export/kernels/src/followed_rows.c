/* Rows of a base for the ids of what comes after it. Most come in the same order, so no index need be asked. */
#include "kernels.h"

EXPORTED int64_t kernels_follow_ids(const unsigned char *ids, int64_t num_rows, int64_t next, const int64_t *sought,
                                    int64_t num_sought, int64_t most_missed, int64_t *found);
EXPORTED void kernels_mark_rows(unsigned char *bits, const int64_t *rows, int64_t num_rows);

#define MOST_SKIPPED 8

/* found: the row of each id that is at `next`, or a few rows behind it; -1 for the others. Return the row after the last found. */
int64_t kernels_follow_ids(const unsigned char *ids, int64_t num_rows, int64_t next, const int64_t *sought,
                           int64_t num_sought, int64_t most_missed, int64_t *found) {
    int64_t at = 0;
    for (int64_t missed = 0; at < num_sought && missed <= most_missed; at++) {
        const int64_t end = num_rows - next > MOST_SKIPPED ? next + MOST_SKIPPED + 1 : num_rows;
        int64_t row = next;
        while (row < end && read_int64(ids, row) != sought[at]) {
            row++;
        }
        const int is_found = row < end;
        found[at] = is_found ? row : -1;
        next = is_found ? row + 1 : next;
        missed += !is_found;
    }
    for (; at < num_sought; at++) {
        found[at] = -1;
    }
    return next;
}

/* bits: one for each row, the first of a byte is its highest; those of these rows are set. */
void kernels_mark_rows(unsigned char *bits, const int64_t *rows, int64_t num_rows) {
    for (int64_t at = 0; at < num_rows; at++) {
        bits[rows[at] >> 3] |= (unsigned char)(128 >> (rows[at] & 7));
    }
}
