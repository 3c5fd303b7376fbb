// Number formats, and vectors of fp32 in the width of this CPU. GNU C++: vector extensions, no intrinsics.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int CHUNK = 2 * LANES;  // Numbers that are read from a row of weights at once.

typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));

struct BFloat16 {
    uint16_t bits;
};

static inline float wide(float x) { return x; }

static inline float wide(BFloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

static inline void narrow(float x, float& to) { to = x; }

// To the nearest, ties to even, as torch does.
static inline void narrow(float x, BFloat16& to) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bool nan = (bits & 0x7fffffff) > 0x7f800000;
    to.bits = nan ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// What is left of x in format T: activations are rounded where the model's own code rounds them.
template <class T>
static inline float rounded(float x) {
    T there;
    narrow(x, there);
    return wide(there);
}

static inline Lanes lanes(const float* from) {
    Lanes result;
    memcpy(&result, from, sizeof result);
    return result;
}

// How the CHUNK numbers of a row become two vectors, and where the number at k stands then.
template <class T>
struct Chunk;

template <>
struct Chunk<float> {
    static inline Lanes first(const float* from) { return lanes(from); }
    static inline Lanes second(const float* from) { return lanes(from + LANES); }
    static inline int64_t place(int64_t k) { return k; }
};

template <>
struct Chunk<BFloat16> {  // Even numbers, then odd ones: no shuffle is needed to widen them.
    static inline Bits load(const BFloat16* from) {
        Bits bits;
        memcpy(&bits, from, sizeof bits);
        return bits;
    }
    static inline Lanes first(const BFloat16* from) { return (Lanes)(load(from) << 16); }
    static inline Lanes second(const BFloat16* from) { return (Lanes)(load(from) & 0xffff0000u); }
    static inline int64_t place(int64_t k) { return k / CHUNK * CHUNK + k % 2 * LANES + k % CHUNK / 2; }
};

static inline int64_t padded(int64_t count) { return (count + CHUNK - 1) / CHUNK * CHUNK; }

// x with the lanes of each pair of neighbouring groups of WIDTH exchanged.
template <int WIDTH, int... LANE>
static inline Lanes exchanged(Lanes x, std::integer_sequence<int, LANE...>) {
    return __builtin_shuffle(x, Bits{uint32_t(LANE ^ WIDTH)...});
}

template <int WIDTH = LANES / 2>
static inline float total(Lanes x) {
    if constexpr (WIDTH == 0)
        return x[0];
    else
        return total<WIDTH / 2>(x + exchanged<WIDTH>(x, std::make_integer_sequence<int, LANES>()));
}

template <int WIDTH = LANES / 2>
static inline float highest(Lanes x) {
    if constexpr (WIDTH == 0) {
        return x[0];
    } else {
        const Lanes other = exchanged<WIDTH>(x, std::make_integer_sequence<int, LANES>());
        return highest<WIDTH / 2>(x > other ? x : other);
    }
}

// exp(x) to about one unit in the last place (Cephes' polynomial); below -87 it stays what it is there. NaN stays NaN.
static inline Lanes exponential(Lanes x) {
    const Lanes low = Lanes{} - 87.f, high = Lanes{} + 88.f;
    x = x < low ? low : x > high ? high : x;
    const float shift = 12582912.f;  // 1.5 * 2^23: what is added to it is rounded to a whole number.
    const Lanes moved = x * 1.44269504f + shift, n = moved - shift;
    const Lanes r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    return p * (Lanes)(((Bits)moved + 127) << 23);
}

enum Activation : int64_t { RELU, SILU, GELU, GELU_TANH };

// In place; what stands behind `count`, up to a whole vector, is changed, too.
static inline void activate(int64_t kind, float* x, int count) {
    for (int k = 0; k < count; k += LANES) {
        Lanes y = lanes(x + k);
        if (kind == RELU) {
            y = y < 0.f ? Lanes{} : y;  // NaN stays.
        } else if (kind == SILU) {
            y = y / (exponential(-y) + 1.f);
        } else if (kind == GELU) {
            for (int lane = 0; lane < LANES; lane++) y[lane] *= 0.5f + 0.5f * erff(y[lane] * 0.70710678f);
        } else {
            Lanes inner = (y + y * y * y * 0.044715f) * 0.79788456f;
            y = y - y / (exponential(inner * 2.f) + 1.f);
        }
        memcpy(x + k, &y, sizeof y);
    }
}
