/* Attention without gradients over keys and values that lie in blocks of BLOCK tokens, (K, 2, BLOCK, H) each: a head's
 * keys, then its values.
 *
 * Shapes: T tokens of a pass, N query heads, K key/value heads, G = N / K, H head dim, a multiple of LANES.
 */
#include <math.h>
#include <omp.h>

#include "vectors.h"

#define BLOCK 16
#define TILE 64 /* keys that are attended at a time */
#define ROWS 6  /* queries of which the inner products keep their sums in registers */
#define QUERIES 96 /* that share what is read of keys and values, about */
#define CHUNK 256  /* keys that a task attends of a single token's sequence: how it is cut depends on its own length alone */
#define BLOCKS (TILE / BLOCK)

_Static_assert(BLOCK == LANES && BLOCKS == 4 && CHUNK % TILE == 0, "what follows is written for these");

/* One layer's attention. Tensors are by pointers to their first element; strides count elements. */
typedef struct {
    int64_t num_heads, num_kv_heads, head_size; /* N, K, H */
    int64_t q_stride, k_stride, v_stride;       /* from one token to the next; a token's heads lie behind each other */
    int64_t num_tokens;
    const int64_t *slots;  /* where each token is stored: its block times BLOCK, plus its place in it */
    const int64_t *pieces; /* of 4 numbers: first token in the pass, tokens, place of the first in its sequence, and
                              where in `blocks` its sequence's blocks begin */
    const int64_t *blocks;
    int64_t num_tasks;
    const int64_t *tasks; /* of 4 numbers: piece, first token in it, which chunk of CHUNK keys, of how many */
    float *scratch;       /* thread_size floats a thread, then partial_size a task and key/value head */
    int64_t threads;
} Pass;

typedef struct {
    float *queries, *keys, *scores, *sums, *largest, *total;
} Scratch;

static int64_t query_rows(int64_t groups) {
    int64_t tokens = QUERIES / groups;
    return (tokens ? tokens : 1) * groups;
}

/* Tokens of a piece that one task attends. */
int64_t tokens_of_task(int64_t num_heads, int64_t num_kv_heads) {
    return query_rows(num_heads / num_kv_heads) / (num_heads / num_kv_heads);
}

int64_t keys_of_chunk(void) { return CHUNK; }

/* Floats that a task of one token among several of its sequence leaves: its sums, and two numbers a head. */
static int64_t partial_size(int64_t groups, int64_t head_size) { return groups * (head_size + 2); }

static int64_t thread_size(int64_t groups, int64_t head_size) {
    return query_rows(groups) * (2 * head_size + TILE + 2) + TILE * head_size;
}

int64_t scratch_size(int64_t num_heads, int64_t num_kv_heads, int64_t head_size, int64_t threads, int64_t num_tasks) {
    int64_t groups = num_heads / num_kv_heads;
    return threads * thread_size(groups, head_size) + num_tasks * num_kv_heads * partial_size(groups, head_size);
}

static Scratch scratch_of(const Pass *pass, int64_t thread) {
    int64_t groups = pass->num_heads / pass->num_kv_heads, rows = query_rows(groups), size = pass->head_size;
    float *at = pass->scratch + thread * thread_size(groups, size);
    Scratch out = {at, at + rows * size, 0, 0, 0, 0};
    out.scores = out.keys + TILE * size;
    out.sums = out.scores + rows * TILE;
    out.largest = out.sums + rows * size;
    out.total = out.largest + rows;
    return out;
}

/* scores = queries keys, of `rows` queries; keys lie (H, TILE). */
INLINE void score(const int rows, const float *queries, int64_t size, const float *keys, float *scores) {
    vec acc[ROWS][BLOCKS];
    for (int r = 0; r < rows; r++)
        for (int b = 0; b < BLOCKS; b++) acc[r][b] = (vec){};
    for (int64_t h = 0; h < size; h++) {
        vec key[BLOCKS];
        for (int b = 0; b < BLOCKS; b++) key[b] = load_float(keys + h * TILE + b * LANES);
        for (int r = 0; r < rows; r++)
            for (int b = 0; b < BLOCKS; b++) acc[r][b] += queries[r * size + h] * key[b];
    }
    for (int r = 0; r < rows; r++)
        for (int b = 0; b < BLOCKS; b++) memcpy(scores + r * TILE + b * LANES, &acc[r][b], sizeof(vec));
}

INLINE void weigh_block(const int rows, const int wide, const float *weights, const element *values, int num_keys,
                        int64_t size, vec acc[ROWS][4]) {
    for (int j = 0; j < num_keys; j++) {
        vec value[4];
        for (int w = 0; w < wide; w++) value[w] = load(values + j * size + w * LANES);
        for (int r = 0; r < rows; r++)
            for (int w = 0; w < wide; w++) acc[r][w] += weights[r * TILE + j] * value[w];
    }
}

/* sums += weights values, of `rows` queries and `wide` vectors of the head, over a tile's keys: none beyond them, where
 * another text may have left what isn't finite. */
INLINE void weigh(const int rows, const int wide, const float *weights, const element *const *values, int num_keys,
                  int64_t size, float *sums) {
    vec acc[ROWS][4];
    for (int r = 0; r < rows; r++)
        for (int w = 0; w < wide; w++) acc[r][w] = load_float(sums + r * size + w * LANES);
    for (int b = 0; b * BLOCK < num_keys; b++)
        if (num_keys - b * BLOCK >= BLOCK)
            weigh_block(rows, wide, weights + b * BLOCK, values[b], BLOCK, size, acc);
        else
            weigh_block(rows, wide, weights + b * BLOCK, values[b], num_keys - b * BLOCK, size, acc);
    for (int r = 0; r < rows; r++)
        for (int w = 0; w < wide; w++) memcpy(sums + r * size + w * LANES, &acc[r][w], sizeof(vec));
}

#define EACH_ROWS(rows, CALL) \
    switch (rows) { \
    case 1: CALL(1); break; \
    case 2: CALL(2); break; \
    case 3: CALL(3); break; \
    case 4: CALL(4); break; \
    case 5: CALL(5); break; \
    default: CALL(6); \
    }

static void score_rows(int rows, const float *queries, int64_t size, const float *keys, float *scores) {
#define CALL(n) score(n, queries, size, keys, scores)
    EACH_ROWS(rows, CALL)
#undef CALL
}

static void weigh_rows(int rows, int wide, const float *weights, const element *const *values, int num_keys,
                       int64_t size, float *sums) {
#define CALL(n) \
    if (wide == 4) weigh(n, 4, weights, values, num_keys, size, sums); \
    else if (wide == 3) weigh(n, 3, weights, values, num_keys, size, sums); \
    else if (wide == 2) weigh(n, 2, weights, values, num_keys, size, sums); \
    else weigh(n, 1, weights, values, num_keys, size, sums)
    EACH_ROWS(rows, CALL)
#undef CALL
}

/* Turn one query's scores of a tile, of which the first `seen` count, into weights; scale its sums so far. */
static void soften(float *scores, int64_t seen, float *largest_yet, float *total, float *sums, int64_t size) {
    const ivec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    vec x[BLOCKS], most = spread(-INFINITY), added = {};
    for (int b = 0; b < BLOCKS; b++) {
        int32_t left = (int32_t)(seen - b * LANES);
        x[b] = choose(lane < left, load_float(scores + b * LANES), spread(-INFINITY));
        most = choose(x[b] > most, x[b], most);
    }
    float top = largest(most);
    top = top > *largest_yet ? top : *largest_yet;
    for (int b = 0; b < BLOCKS; b++) {
        x[b] = exponential(x[b] - top);
        added += x[b];
        memcpy(scores + b * LANES, &x[b], sizeof(vec));
    }
    float kept = expf(*largest_yet - top);
    *largest_yet = top;
    *total = *total * kept + sum(added);
    if (kept != 1)
        for (int64_t h = 0; h < size; h += LANES) {
            vec scaled = load_float(sums + h) * kept;
            memcpy(sums + h, &scaled, sizeof scaled);
        }
}

/* Write a block of keys (BLOCK, H) as (H, TILE). */
static void turn(const element *keys, int64_t size, float *out) {
    for (int64_t h = 0; h < size; h += LANES) {
        vec x[LANES];
        for (int j = 0; j < LANES; j++) x[j] = load(keys + j * size + h);
        transpose(x);
        for (int i = 0; i < LANES; i++) memcpy(out + (h + i) * TILE, &x[i], sizeof(vec));
    }
}

/* Begin to read `num` numbers that are wanted soon: the processor doesn't foresee which block is next. */
static void fetch(const element *from, int64_t num) {
    for (const char *at = (const char *)from, *end = (const char *)(from + num); at < end; at += 64)
        __builtin_prefetch(at, 0, 3);
}

/* Attend `tokens` tokens' queries of one key/value head, the first at `place` of its sequence, to keys first..last-1. */
static void attend_tiles(const Pass *pass, const element *memory, const int64_t *blocks, int64_t head, int64_t place,
                         int64_t tokens, int64_t first, int64_t last, Scratch s) {
    int64_t size = pass->head_size, heads = pass->num_kv_heads, groups = pass->num_heads / heads;
    int64_t rows = tokens * groups, block_size = BLOCK * size;
    for (int64_t r = 0; r < rows; r++) s.largest[r] = -INFINITY, s.total[r] = 0;
    memset(s.sums, 0, rows * size * sizeof(float));
    for (int64_t base = first; base < last; base += TILE) {
        int num_keys = (int)(last - base < TILE ? last - base : TILE), num_blocks = (num_keys + BLOCK - 1) / BLOCK;
        /* Of the next tile a part is fetched after each part of the work on this one: all at once would hold it up. */
        const element *values[BLOCKS], *next[BLOCKS];
        for (int b = 0; b < BLOCKS; b++) {
            int64_t far = base + TILE + b * BLOCK;
            next[b] = far < last ? memory + (blocks[far / BLOCK] * heads + head) * 2 * block_size : NULL;
        }
        for (int b = 0; b < num_blocks; b++) {
            const element *keys = memory + (blocks[base / BLOCK + b] * heads + head) * 2 * block_size;
            values[b] = keys + block_size;
            turn(keys, size, s.keys + b * BLOCK);
            if (next[b]) fetch(next[b], block_size);
        }
        /* Tokens before the tile see none of it. */
        int64_t skipped = base > place ? (base - place) * groups : 0;
        for (int64_t r = skipped; r < rows; r += ROWS) {
            int some = (int)(rows - r < ROWS ? rows - r : ROWS);
            if (r == skipped && next[0]) fetch(next[0] + block_size, block_size);
            score_rows(some, s.queries + r * size, size, s.keys, s.scores + r * TILE);
            if (r == skipped && next[1]) fetch(next[1] + block_size, block_size);
            for (int i = 0; i < some; i++) {
                int64_t seen = place + (r + i) / groups + 1 - base;
                soften(s.scores + (r + i) * TILE, seen, s.largest + r + i, s.total + r + i, s.sums + (r + i) * size, size);
            }
            if (r == skipped && next[2]) fetch(next[2] + block_size, block_size);
            for (int64_t h = 0; h < size; h += 4 * LANES) {
                const element *at[BLOCKS];
                for (int b = 0; b < num_blocks; b++) at[b] = values[b] + h;
                int wide = (int)((size - h) / LANES);
                weigh_rows(some, wide < 4 ? wide : 4, s.scores + r * TILE, at, num_keys, size, s.sums + r * size + h);
            }
            if (r == skipped && next[3]) fetch(next[3] + block_size, block_size);
        }
    }
}

static void run_task(const Pass *pass, const element *q, element *out, const element *memory, int64_t task,
                     int64_t head, Scratch s) {
    const int64_t *about = pass->tasks + 4 * task, *piece = pass->pieces + 4 * about[0];
    int64_t size = pass->head_size, groups = pass->num_heads / pass->num_kv_heads;
    int64_t most = query_rows(groups) / groups, left = piece[1] - about[1], tokens = left < most ? left : most;
    int64_t token = piece[0] + about[1], place = piece[2] + about[1], end = place + tokens;
    int64_t first = about[2] * CHUNK, last = end;
    if (about[3] > 1 && first + CHUNK < end) last = first + CHUNK;
    float scale = 1 / sqrtf((float)size);
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = 0; i < groups * size; i += LANES) {
            vec scaled = load(q + (token + t) * pass->q_stride + head * groups * size + i) * scale;
            memcpy(s.queries + t * groups * size + i, &scaled, sizeof scaled);
        }
    attend_tiles(pass, memory, pass->blocks + piece[3], head, place, tokens, first, last, s);
    if (about[3] > 1) { /* one of several chunks of its sequence: left to `join` */
        float *to = pass->scratch + pass->threads * thread_size(groups, size)
                    + (task * pass->num_kv_heads + head) * partial_size(groups, size);
        memcpy(to, s.sums, groups * size * sizeof(float));
        memcpy(to + groups * size, s.largest, groups * sizeof(float));
        memcpy(to + groups * (size + 1), s.total, groups * sizeof(float));
        return;
    }
    for (int64_t r = 0; r < tokens * groups; r++)
        for (int64_t h = 0; h < size; h += LANES)
            store(out + (token + r / groups) * pass->num_heads * size + (head * groups + r % groups) * size + h,
                  load_float(s.sums + r * size + h) / s.total[r]);
}

/* Begin to read what a task needs first, if it is one of a single token: others read little for what they compute. */
static void fetch_start(const Pass *pass, const element *memory, int64_t task, int64_t head) {
    const int64_t *about = pass->tasks + 4 * task, *piece = pass->pieces + 4 * about[0];
    int64_t end = piece[2] + 1, heads = pass->num_kv_heads, block_size = BLOCK * pass->head_size;
    if (piece[1] > 1) return;
    for (int64_t first = about[2] * CHUNK, at = first; at < end && at < first + TILE; at += BLOCK)
        fetch(memory + (pass->blocks[piece[3] + at / BLOCK] * heads + head) * 2 * block_size, 2 * block_size);
}

/* Put together what the tasks of a token's chunks left, of which this one is the first. */
static void join(const Pass *pass, element *out, int64_t task, int64_t head) {
    const int64_t *about = pass->tasks + 4 * task;
    int64_t size = pass->head_size, groups = pass->num_heads / pass->num_kv_heads, part = partial_size(groups, size);
    const float *from = pass->scratch + pass->threads * thread_size(groups, size)
                        + (task * pass->num_kv_heads + head) * part;
    int64_t next = pass->num_kv_heads * part;
    for (int64_t g = 0; g < groups; g++) {
        float top = -INFINITY, total = 0;
        for (int64_t c = 0; c < about[3]; c++) {
            float each = from[c * next + groups * size + g];
            top = each > top ? each : top;
        }
        for (int64_t c = 0; c < about[3]; c++)
            total += expf(from[c * next + groups * size + g] - top) * from[c * next + groups * (size + 1) + g];
        for (int64_t h = 0; h < size; h += LANES) {
            vec joined = {};
            for (int64_t c = 0; c < about[3]; c++)
                joined += expf(from[c * next + groups * size + g] - top) * load_float(from + c * next + g * size + h);
            store(out + pass->pieces[4 * about[0]] * pass->num_heads * size + (head * groups + g) * size + h,
                  joined / total);
        }
    }
}

/* Store the pieces' new keys and values in the memory, then attend each piece's queries to its sequence so far.
 *
 * memory: blocks of (K, 2, BLOCK, H). out: (T, N, H), of which the pieces' are written. */
void attend(const Pass *pass, const element *q, const element *k, const element *v, element *memory, element *out) {
    int64_t size = pass->head_size, heads = pass->num_kv_heads;
#pragma omp parallel num_threads(pass->threads)
    {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < pass->num_tokens; t++) {
            element *to = memory + (pass->slots[t] / BLOCK * 2 * heads * BLOCK + pass->slots[t] % BLOCK) * size;
            for (int64_t head = 0; head < heads; head++) {
                element *own = to + head * 2 * BLOCK * size;
                memcpy(own, k + t * pass->k_stride + head * size, size * sizeof(element));
                memcpy(own + BLOCK * size, v + t * pass->v_stride + head * size, size * sizeof(element));
            }
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < pass->num_tasks * heads; i++) {
            int64_t next = i + pass->threads;
            if (next < pass->num_tasks * heads) fetch_start(pass, memory, next / heads, next % heads);
            run_task(pass, q, out, memory, i / heads, i % heads, scratch_of(pass, omp_get_thread_num()));
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < pass->num_tasks * heads; i++) {
            const int64_t *about = pass->tasks + 4 * (i / heads);
            if (about[3] > 1 && about[2] == 0) join(pass, out, i / heads, i % heads);
        }
    }
}
