/* Rows by owner: a stable partition. Each row is read once, in order, and written to the next place of its target. */
#include "kernels.h"

EXPORTED void kernels_order_rows(const void *owners, int owner_bytes, const int64_t *kept, int64_t num_kept,
                                 int64_t num_rows, int64_t num_targets, int64_t *counts, int64_t *next, int64_t *positions);
EXPORTED void kernels_move_rows(const unsigned char *rows, int64_t num_rows, int64_t row_bytes, const int64_t *positions,
                                unsigned char *out);

#define ORDER(NAME, OWNER)                                                                                              \
    static void NAME(const OWNER *owners, const int64_t *kept, int64_t num_kept, int64_t num_targets, int64_t *counts,  \
                     int64_t *next, int64_t *positions) {                                                               \
        for (int64_t at = 0; at < num_kept; at++) {                                                                     \
            counts[owners[kept == NULL ? at : kept[at]]]++;                                                             \
        }                                                                                                               \
        int64_t begin = 0;                                                                                              \
        for (int64_t target = 0; target < num_targets; target++) {                                                      \
            next[target] = begin;                                                                                       \
            begin += counts[target];                                                                                    \
        }                                                                                                               \
        for (int64_t at = 0; at < num_kept; at++) {                                                                     \
            const int64_t row = kept == NULL ? at : kept[at];                                                           \
            positions[row] = next[owners[row]]++;                                                                       \
        }                                                                                                               \
    }

ORDER(order_bytes, uint8_t)
ORDER(order_shorts, uint16_t)
ORDER(order_ints, int32_t)

/* owners: below num_targets, of 1, 2 or 4 bytes. kept: the rows that are moved, ascending; NULL for all. counts: num_targets zeros,
 * filled. next: room for as many. positions: for each row its place among the rows by target; -1 for a row that is dropped. */
void kernels_order_rows(const void *owners, int owner_bytes, const int64_t *kept, int64_t num_kept, int64_t num_rows,
                        int64_t num_targets, int64_t *counts, int64_t *next, int64_t *positions) {
    if (kept != NULL) {
        memset(positions, 0xFF, sizeof(int64_t) * (size_t)num_rows);
    }
    if (owner_bytes == 1) {
        order_bytes(owners, kept, num_kept, num_targets, counts, next, positions);
    } else if (owner_bytes == 2) {
        order_shorts(owners, kept, num_kept, num_targets, counts, next, positions);
    } else {
        order_ints(owners, kept, num_kept, num_targets, counts, next, positions);
    }
}

/* The places of a later row are fetched for writing: rows of one target are neighbours, those of many are not. */
INLINE void fetch_place(unsigned char *out, int64_t num_rows, int64_t row_bytes, const int64_t *positions, int64_t row) {
    const int64_t later = row + 1 + 1024 / row_bytes;
    if (later < num_rows && positions[later] >= 0) {
        for (int64_t byte = 0; byte < row_bytes; byte += 64) {
            __builtin_prefetch(out + positions[later] * row_bytes + byte, 1);
        }
    }
}

INLINE void move(const unsigned char *rows, int64_t num_rows, int64_t row_bytes, const int64_t *positions,
                 unsigned char *out) {
    for (int64_t row = 0; row < num_rows; row++) {
        if (row_bytes >= 64) {
            fetch_place(out, num_rows, row_bytes, positions, row);
        }
        if (positions[row] >= 0) {
            memcpy(out + positions[row] * row_bytes, rows + row * row_bytes, (size_t)row_bytes);
        }
    }
}

/* Rows of many bytes, without a call for each. */
static void move_wide(const unsigned char *rows, int64_t num_rows, int64_t row_bytes, const int64_t *positions,
                      unsigned char *out) {
    for (int64_t row = 0; row < num_rows; row++) {
        fetch_place(out, num_rows, row_bytes, positions, row);
        if (positions[row] < 0) {
            continue;
        }
        const unsigned char *from = rows + row * row_bytes;
        unsigned char *to = out + positions[row] * row_bytes;
        int64_t byte = 0;
        for (; byte + 32 <= row_bytes; byte += 32) {
            memcpy(to + byte, from + byte, 32);
        }
        if (byte < row_bytes) { /* the last 32 bytes, some of them once more */
            memcpy(to + row_bytes - 32, from + row_bytes - 32, 32);
        }
    }
}

void kernels_move_rows(const unsigned char *rows, int64_t num_rows, int64_t row_bytes, const int64_t *positions,
                       unsigned char *out) {
    switch (row_bytes) { /* a copy of known length needs no call */
    case 2:
        move(rows, num_rows, 2, positions, out);
        break;
    case 4:
        move(rows, num_rows, 4, positions, out);
        break;
    case 8:
        move(rows, num_rows, 8, positions, out);
        break;
    case 16:
        move(rows, num_rows, 16, positions, out);
        break;
    case 32:
        move(rows, num_rows, 32, positions, out);
        break;
    case 64:
        move(rows, num_rows, 64, positions, out);
        break;
    case 128:
        move(rows, num_rows, 128, positions, out);
        break;
    case 256:
        move(rows, num_rows, 256, positions, out);
        break;
    default:
        if (row_bytes >= 32 && row_bytes <= 1024) {
            move_wide(rows, num_rows, row_bytes, positions, out);
        } else {
            move(rows, num_rows, row_bytes, positions, out);
        }
    }
}
