/* Fingerprints of rows: 64 bits over all bytes of all slots. kernels/numpy_fingerprints.py defines them.
 *
 * A word waits for the word before it in its row, so eight rows are folded side by side. */
#include "kernels.h"

EXPORTED void kernels_fold_slot(uint64_t *state, const unsigned char *rows, int64_t num_rows, int64_t width);
EXPORTED void kernels_finish_fingerprints(const uint64_t *state, int64_t num_rows, uint64_t *fingerprints);

#define FIRST UINT64_C(0xBF58476D1CE4E5B9)
#define SECOND UINT64_C(0x94D049BB133111EB)
#define LANES 8

INLINE uint64_t mix(uint64_t state) {
    state *= FIRST;
    state ^= state >> 32;
    return state * SECOND;
}

INLINE uint64_t read_word(const unsigned char *bytes) {
    uint64_t word;
    memcpy(&word, bytes, 8);
    return word;
}

/* The last `rest` bytes of a row, below 8, padded with zeros. Nothing outside the row is read. */
INLINE uint64_t read_rest(const unsigned char *row, int64_t width, int64_t rest) {
    if (width >= 8) {
        return read_word(row + width - 8) >> (64 - 8 * rest);
    }
    uint64_t word = 0;
    for (int64_t byte = 0; byte < rest; byte++) {
        word |= (uint64_t)row[byte] << (8 * byte);
    }
    return word;
}

INLINE void fold_rows(uint64_t *state, const unsigned char *rows, int64_t width, int lanes) {
    uint64_t mixed[LANES];
    for (int lane = 0; lane < lanes; lane++) {
        mixed[lane] = mix(state[lane] ^ (uint64_t)width);
    }
    const int64_t rest = width % 8;
    for (int64_t byte = 0; byte < width - rest; byte += 8) {
        for (int lane = 0; lane < lanes; lane++) {
            mixed[lane] = mix(mixed[lane] ^ read_word(rows + lane * width + byte));
        }
    }
    for (int lane = 0; lane < lanes; lane++) {
        state[lane] = rest ? mix(mixed[lane] ^ read_rest(rows + lane * width, width, rest)) : mixed[lane];
    }
}

INLINE void fold(uint64_t *state, const unsigned char *rows, int64_t num_rows, int64_t width) {
    int64_t row = 0;
    for (; row + LANES <= num_rows; row += LANES) {
        fold_rows(state + row, rows + row * width, width, LANES);
    }
    for (; row < num_rows; row++) {
        fold_rows(state + row, rows + row * width, width, 1);
    }
}

/* state: one number for each row, changed. rows: num_rows times width bytes. */
void kernels_fold_slot(uint64_t *state, const unsigned char *rows, int64_t num_rows, int64_t width) {
    fold(state, rows, num_rows, width);
}

/* fingerprints: filled. */
void kernels_finish_fingerprints(const uint64_t *state, int64_t num_rows, uint64_t *fingerprints) {
    for (int64_t row = 0; row < num_rows; row++) {
        uint64_t mixed = mix(state[row] ^ (state[row] >> 32));
        fingerprints[row] = mixed ^ (mixed >> 32);
    }
}
