// One token of several sequences through a decoder's blocks, on a CPU. What the blocks are: ../forward.py.
#include "products.h"

#include <omp.h>

extern "C" {
struct Norm {  // A layer norm (centred) or a root-mean-square norm; without a weight there is none.
    const void *weight, *bias;
    int64_t centred;
    double epsilon;
};

struct Layer {  // Up to three projections of queries, keys and values, or one, perhaps head by head; a null gate: none.
    Norm attention_norm, mlp_norm, query_norm, key_norm;
    Matrix qkv[3], out, gate, up, down;
    int64_t per_head;
    void* kept;  // Keys and then values, each [slots, kv_heads, length, head_dim].
};

struct Model {
    int64_t layers, width, heads, kv_heads, head_dim, inner, activation, parallel, norm_after;
    int64_t slots, length, rotary;
    double scale;
    const void *cosines, *sines;  // [length, rotary], the sines' first half negative; null without rotary positions.
    const float* alibi;           // [heads], or null.
    const Layer* layer;
};
}

template <class T>
static void normalise(const Norm& norm, const float* x, int64_t width, float* y) {
    const T *weight = (const T*)norm.weight, *bias = (const T*)norm.bias;
    float mean = 0, square = 0;
    if (norm.centred) {
#pragma omp simd reduction(+ : mean)
        for (int64_t k = 0; k < width; k++) mean += x[k];
        mean /= width;
    }
#pragma omp simd reduction(+ : square)
    for (int64_t k = 0; k < width; k++) square += (x[k] - mean) * (x[k] - mean);
    const float factor = 1.f / sqrtf(square / width + float(norm.epsilon));
    if (!norm.centred)
        for (int64_t k = 0; k < width; k++) y[k] = rounded<T>(rounded<T>(x[k] * factor) * wide(weight[k]));
    else if (bias)
        for (int64_t k = 0; k < width; k++) y[k] = rounded<T>((x[k] - mean) * factor * wide(weight[k]) + wide(bias[k]));
    else
        for (int64_t k = 0; k < width; k++) y[k] = rounded<T>((x[k] - mean) * factor * wide(weight[k]));
}

// The attention of one sequence's new token over the keys and values of one head, and of all heads that share them.
template <class T>
struct Attention {
    static constexpr int AHEAD = 8;  // Tokens.
    const Model& model;
    const Layer& layer;
    const float* joint;  // The token's queries, keys and values.
    int64_t position;
    float* scores;  // [length], up to a whole vector.

    const float* head(int role, int64_t index) const {
        const int64_t before[] = {0, model.heads, model.heads + model.kv_heads};
        return joint + (layer.per_head ? index * 3 + role : before[role] + index) * model.head_dim;
    }

    void prepare(const float* from, const Norm& norm, float* to) const {
        if (norm.weight)
            normalise<T>(norm, from, model.head_dim, to);
        else
            memcpy(to, from, model.head_dim * sizeof(float));
        const int64_t turning = model.rotary, half = turning / 2;
        if (!turning) return;
        const T* cosine = (const T*)model.cosines + position * turning;
        const T* sine = (const T*)model.sines + position * turning;
        float turned[turning];
        for (int64_t k = 0; k < half; k++) {
            turned[k] = rounded<T>(rounded<T>(to[k] * wide(cosine[k])) + to[k + half] * wide(sine[k]));
            turned[k + half] = rounded<T>(rounded<T>(to[k + half] * wide(cosine[k + half])) + to[k] * wide(sine[k + half]));
        }
        memcpy(to, turned, sizeof turned);
    }

    void run(int64_t slot, int64_t shared, float* mixed) const {
        const int64_t width = model.head_dim, group = model.heads / model.kv_heads;
        T* keys = (T*)layer.kept + (slot * model.kv_heads + shared) * model.length * width;
        T* values = keys + model.slots * model.kv_heads * model.length * width;
        float own[width];
        prepare(head(1, shared), layer.key_norm, own);
        for (int64_t k = 0; k < width; k++) narrow(own[k], keys[position * width + k]);
        const float* value = head(2, shared);
        for (int64_t k = 0; k < width; k++) narrow(value[k], values[position * width + k]);
        for (int64_t g = 0; g < group; g++) {
            prepare(head(0, shared * group + g), layer.query_norm, own);
            compare(keys, values, own);
            const float share = 1.f / soften(shared * group + g);
            mix(values, share, mixed + g * width);
        }
    }

    // The scores of all keys. What is read next is asked for early.
    void compare(const T* keys, const T* values, const float* query) const {
        const int64_t width = model.head_dim, whole = width / CHUNK * CHUNK;
        float ordered[padded(width)];
        memset(ordered, 0, sizeof ordered);
        for (int64_t k = 0; k < width; k++) ordered[Chunk<T>::place(k)] = query[k];
        for (int64_t j = 0; j <= position; j++) {
            const T* key = keys + j * width;
            Lanes first = {}, second = {};
            for (int64_t k = 0; k < whole; k += CHUNK) {
                __builtin_prefetch(key + AHEAD * width + k);
                __builtin_prefetch(values + j * width + k);
                first += Chunk<T>::first(key + k) * lanes(ordered + k);
                second += Chunk<T>::second(key + k) * lanes(ordered + k + LANES);
            }
            float sum = total(first + second);
            for (int64_t k = whole; k < width; k++) sum += wide(key[k]) * query[k];
            scores[j] = sum * float(model.scale);
        }
    }

    // From scores to weights that are not yet divided by their sum, which is returned.
    float soften(int64_t query_head) const {
        const int64_t count = position + 1, whole = (count + LANES - 1) / LANES * LANES;
        if (model.alibi)
            for (int64_t j = 0; j < count; j++) scores[j] += rounded<T>(model.alibi[query_head] * j);
        for (int64_t j = count; j < whole; j++) scores[j] = -INFINITY;
        Lanes most = lanes(scores), sum = {};
        for (int64_t j = LANES; j < whole; j += LANES) {
            const Lanes score = lanes(scores + j);
            most = score > most ? score : most;
        }
        const float top = highest(most);
        for (int64_t j = 0; j < whole; j += LANES) {
            const Lanes weight = exponential(lanes(scores + j) - top);
            memcpy(scores + j, &weight, sizeof weight);
            sum += weight;
        }
        return total(sum);
    }

    void mix(const T* values, float share, float* mixed) const {
        const int64_t width = model.head_dim, whole = width / CHUNK * CHUNK;
        for (int64_t k = 0; k < whole; k += CHUNK) {
            Lanes first = {}, second = {};
            for (int64_t j = 0; j <= position; j++) {
                first += Chunk<T>::first(values + j * width + k) * scores[j];
                second += Chunk<T>::second(values + j * width + k) * scores[j];
            }
            float out[CHUNK];
            memcpy(out, &first, sizeof first);
            memcpy(out + LANES, &second, sizeof second);
            for (int c = 0; c < CHUNK; c++) out[c] = rounded<T>(out[c] * share);
            for (int c = 0; c < CHUNK; c++) mixed[k + c] = out[Chunk<T>::place(c)];
        }
        for (int64_t k = whole; k < width; k++) {
            float sum = 0;
            for (int64_t j = 0; j <= position; j++) sum += wide(values[j * width + k]) * scores[j];
            mixed[k] = rounded<T>(sum * share);
        }
    }
};

// What the threads share: activations of n tokens.
template <class Kind>
struct Room {
    using Packed = typename Kind::Packed;
    char* at;
    float *x, *joint, *scores, *lines;
    Packed *normed, *normed_too, *mixed, *inner;

    template <class Number>
    Number* take(int64_t count) {
        Number* here = (Number*)at;
        at += (count * sizeof(Number) + 63) / 64 * 64;
        return here;
    }

    Room(const Model& model, int64_t n, int threads, char* memory) : at(memory) {
        const int64_t attention = model.heads * model.head_dim;
        x = take<float>(n * model.width);
        joint = take<float>(n * (attention + 2 * model.kv_heads * model.head_dim));
        scores = take<float>(threads * padded(model.length));
        lines = take<float>(threads * (attention + model.width));
        normed = take<Packed>(Kind::size(n, model.width));
        normed_too = take<Packed>(Kind::size(n, model.width));
        mixed = take<Packed>(Kind::size(n, attention));
        inner = take<Packed>(Kind::size(n, model.inner));
    }
};

template <class Kind>
struct Blocks {
    using T = typename Kind::Value;
    const Model& model;
    const int64_t n;
    const int64_t* positions;
    Room<Kind>& room;
    const Team team;
    const int64_t attention = model.heads * model.head_dim, joint = attention + 2 * model.kv_heads * model.head_dim;
    float* const line = room.lines + team.me * (attention + model.width);

    // This thread's tokens, where one thread does all of a token. Those that are packed into the same lines of the
    // CPU's cache are one thread's: threads that write beside each other wait.
    const int64_t groups = (n + Kind::SIDE - 1) / Kind::SIDE, first = team.from(groups) * Kind::SIDE,
                  last = team.to(groups) * Kind::SIDE < n ? team.to(groups) * Kind::SIDE : n;

    void read(const Norm* norm, typename Kind::Packed* to) const {
        for (int64_t i = first; i < last; i++) {
            const float* x = room.x + i * model.width;
            if (norm) normalise<T>(*norm, x, model.width, line);
            Kind::put(to, model.width, i, 0, model.width, norm ? line : x);
        }
    }

    void normalise_again(const Norm& norm) const {
        for (int64_t i = first; i < last; i++)
            normalise<T>(norm, room.x + i * model.width, model.width, room.x + i * model.width);
    }

    void project(const Layer& layer) const {
        int64_t before = 0;
        for (const Matrix& part : layer.qkv) {
            if (!part.weight) continue;
            Kind::multiply({&part}, room.normed, n, team, [&](const Block& block) {
                for (int64_t i = 0; i < block.rows; i++)
                    for (int64_t j = 0; j < block.outputs; j++)
                        room.joint[(block.row + i) * joint + before + block.output + j] = block.at(0, i, j);
            });
            before += part.outputs;
        }
    }

    void attend(const Layer& layer) const {
        const int64_t pairs = n * model.kv_heads, width = attention / model.kv_heads;
        float* scores = room.scores + team.me * padded(model.length);
        for (int64_t pair = team.from(pairs); pair < team.to(pairs); pair++) {
            const int64_t i = pair % n, shared = pair / n;
            Attention<T>{model, layer, room.joint + i * joint, positions[i], scores}.run(i, shared, line);
            Kind::put(room.mixed, attention, i, shared * width, width, line);
        }
    }

    void expand(const Layer& layer, const typename Kind::Packed* from) const {
        if (!layer.gate.weight)
            return Kind::multiply({&layer.up}, from, n, team, [&](const Block& block) {
                activate(model.activation, block.values[0], block.count);
                for (int k = 0; k < block.count; k++) block.values[0][k] = rounded<T>(block.values[0][k]);
                Kind::put(room.inner, model.inner, block);
            });
        Kind::multiply({&layer.gate, &layer.up}, from, n, team, [&](const Block& block) {
            activate(model.activation, block.values[0], block.count);
            for (int k = 0; k < block.count; k++)
                block.values[0][k] = rounded<T>(rounded<T>(block.values[0][k]) * block.values[1][k]);
            Kind::put(room.inner, model.inner, block);
        });
    }

    void add(const Matrix& matrix, const typename Kind::Packed* from) const {
        Kind::multiply({&matrix}, from, n, team, [&](const Block& block) {
            for (int64_t i = 0; i < block.rows; i++) {
                float* x = room.x + (block.row + i) * model.width + block.output;
                for (int64_t j = 0; j < block.outputs; j++) x[j] = rounded<T>(x[j] + block.at(0, i, j));
            }
        });
    }

    // A barrier stands wherever a thread reads what others wrote. Called by all threads of a parallel region.
    void layer(const Layer& layer) const {
        read(model.norm_after ? nullptr : &layer.attention_norm, room.normed);
        if (model.parallel) read(&layer.mlp_norm, room.normed_too);
#pragma omp barrier
        project(layer);
        if (model.parallel) expand(layer, room.normed_too);
#pragma omp barrier
        attend(layer);
#pragma omp barrier
        add(layer.out, room.mixed);
#pragma omp barrier
        if (!model.parallel) {
            if (model.norm_after) normalise_again(layer.attention_norm);
            read(model.norm_after ? nullptr : &layer.mlp_norm, room.normed);
#pragma omp barrier
            expand(layer, room.normed);
#pragma omp barrier
        }
        add(layer.down, room.inner);
#pragma omp barrier
        if (model.norm_after) normalise_again(layer.mlp_norm);
    }
};

template <class Kind>
static void run_blocks(const Model& model, int64_t n, void* hidden, const int64_t* positions, char* memory,
                       int threads) {
    using T = typename Kind::Value;
    Room<Kind> room(model, n, threads, memory);
    // Rows and columns that nobody writes fill up the last vector or tile.
    memset((void*)room.normed, 0, room.at - (char*)room.normed);
#pragma omp parallel num_threads(threads)
    {
        Kind::begin();
        Blocks<Kind> blocks{model, n, positions, room, Team{omp_get_thread_num(), omp_get_num_threads()}};
        const int64_t from = blocks.first * model.width, to = blocks.last * model.width;
        for (int64_t k = from; k < to; k++) room.x[k] = wide(((const T*)hidden)[k]);
        for (int64_t index = 0; index < model.layers; index++) blocks.layer(model.layer[index]);
        for (int64_t k = from; k < to; k++) narrow(room.x[k], ((T*)hidden)[k]);
        Kind::end();
    }
}

template <class Kind>
static void run_product(const Matrix& matrix, int64_t n, const void* x, void* y, char* memory, int threads) {
    using T = typename Kind::Value;
    typename Kind::Packed* packed = (typename Kind::Packed*)memory;
    memset((void*)packed, 0, Kind::size(n, matrix.inputs) * sizeof *packed);
    for (int64_t i = 0; i < n; i++)
        for (int64_t k = 0; k < matrix.inputs; k += CHUNK) {
            const int64_t count = matrix.inputs - k < CHUNK ? matrix.inputs - k : CHUNK;
            float values[CHUNK];
            for (int64_t c = 0; c < count; c++) values[c] = wide(((const T*)x)[i * matrix.inputs + k + c]);
            Kind::put(packed, matrix.inputs, i, k, count, values);
        }
#pragma omp parallel num_threads(threads)
    {
        Kind::begin();
        Kind::multiply({&matrix}, packed, n, Team{omp_get_thread_num(), omp_get_num_threads()}, [&](const Block& block) {
            for (int64_t i = 0; i < block.rows; i++)
                for (int64_t j = 0; j < block.outputs; j++)
                    narrow(block.at(0, i, j), ((T*)y)[(block.row + i) * matrix.outputs + block.output + j]);
        });
        Kind::end();
    }
}

template <class Kind>
static int64_t bytes_for(const Model& model, const Matrix& head, int64_t n, int threads) {
    Room<Kind> room(model, n, threads, nullptr);
    const int64_t blocks = room.at - (char*)nullptr, product = Kind::size(n, head.inputs) * sizeof(typename Kind::Packed);
    return blocks > product ? blocks : product;
}

static bool tiles_fit(const Model& model, const Matrix& head) {
#if TILES
    bool fit = Tiles::fits(head) && Tiles::available();
    for (int64_t index = 0; index < model.layers; index++) {
        const Layer& layer = model.layer[index];
        for (const Matrix& part : layer.qkv) fit = fit && Tiles::fits(part);
        for (const Matrix& part : {layer.out, layer.gate, layer.up, layer.down}) fit = fit && Tiles::fits(part);
    }
    return fit;
#else
    return false;
#endif
}

#if TILES
#define FOR_KIND(kind, call) \
    (kind == 0 ? call<Vectors<float>> : kind == 1 ? call<Vectors<BFloat16>> : call<Tiles>)
#else
#define FOR_KIND(kind, call) (kind == 0 ? call<Vectors<float>> : call<Vectors<BFloat16>>)
#endif

extern "C" {
// How weights are multiplied: 0 fp32, 1 bf16, 2 bf16 by the CPU's matrix unit.
int64_t decode_kind(const Model* model, const Matrix* head, int64_t half) {
    return !half ? 0 : tiles_fit(*model, *head) ? 2 : 1;
}

// Memory that n tokens need, aligned to 64 bytes.
int64_t decode_bytes(int64_t kind, const Model* model, const Matrix* head, int64_t n, int64_t threads) {
    return FOR_KIND(kind, bytes_for)(*model, *head, n, int(threads));
}

// hidden [n, width] through all blocks, in place; the token in slot i stands at positions[i].
void decode_blocks(int64_t kind, const Model* model, int64_t n, void* hidden, const int64_t* positions, void* memory,
                   int64_t threads) {
    FOR_KIND(kind, run_blocks)(*model, n, hidden, positions, (char*)memory, int(threads));
}

// y [n, outputs] = x [n, inputs] W^T + b.
void decode_product(int64_t kind, const Matrix* matrix, int64_t n, const void* x, void* y, void* memory,
                    int64_t threads) {
    FOR_KIND(kind, run_product)(*matrix, n, x, y, (char*)memory, int(threads));
}
}
