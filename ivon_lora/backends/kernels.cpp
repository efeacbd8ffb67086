// The equations of functional/ over many tensors, for the CPU. Every operation stands in the order of its namesake
// there and rounds on its own (-ffp-contract=off), so the bits are those of the eager backend.
//
// Loops are plain and free of branches, over chunks that stay in the first-level cache: compilers turn them into vector
// instructions.

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t CHUNK = 128;  // so short that a processor takes roots and divides while it draws noise

// Rows of the table: one column per parameter.
enum Row {
    NUMEL, INDEX, OFFSET, RANKS, INNER,                                      // numbers
    PARAM, MEAN, MOMENTUM, HESS, GRAD, BANKED_GRAD, BANKED_CURVATURE,        // addresses, 0 for none
    RANK_MASK
};

enum Curvature { NONE, PRICE, GRADSQ, FISHER };
enum Criterion { SNR_ABS, SNR, MAGNITUDE, INVERSE_STD };

// functional.ivon.Hyper, rounded to fp32; `complement` is 1 - beta1.
struct Hyper {
    float ess, weight_decay, lr, beta1, complement, rho, clip_radius, debias, square_scale, inverse_batch, noise_ess,
        prior_weight, grad_scale, n_samples;
};

// functional.noise.NoiseKey: the halves of the seed, counter word 1 without element bits, counter word 3.
struct Key {
    uint32_t k0, k1, c1, step;
};

struct bf16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
    uint32_t word = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &word, 4);
    return y;
}
inline void round_to(float &to, float x) { to = x; }
inline void round_to(bf16 &to, float x) {  // to nearest even, as torch does
    uint32_t word;
    std::memcpy(&word, &x, 4);
    uint32_t rounded = (word + 0x7FFF + ((word >> 16) & 1)) >> 16;
    to.bits = uint16_t(x != x ? 0x7FC0 : rounded);
}

inline bool is_finite(float x) { return std::fabs(x) <= FLT_MAX; }
inline float clamp(float x, float low, float high) {  // NaN stays NaN
    x = x < low ? low : x;
    return x > high ? high : x;
}

// ---------------------------------------------------------------- functional.noise

constexpr uint32_t M0 = 0xD2511F53, M1 = 0xCD9E8D57, W0 = 0x9E3779B9, W1 = 0xBB67AE85;

template <int N>
inline float horner(float x, const float (&c)[N]) {
    float y = x * c[N - 1] + c[N - 2];
    for (int i = N - 3; i >= 0; --i) y = y * x + c[i];
    return y;
}

inline int32_t as_int(float x) {
    int32_t y;
    std::memcpy(&y, &x, 4);
    return y;
}
inline float as_float(int32_t x) {
    float y;
    std::memcpy(&y, &x, 4);
    return y;
}

constexpr float LOG_P[] = {0.3333390951156616f,   -0.2500133812427521f, 0.19963063299655914f, -0.1657758355140686f,
                           0.14914768934249878f,  -0.14267492294311523f, 0.08700437843799591f};
constexpr float SIN_P[] = {1.5707963705062866f, -0.6459634900093079f, 0.07968003302812576f, -0.004601659718900919f};
constexpr float COS_P[] = {-1.2336976528167725f, 0.2536032199859619f, -0.020417282357811928f};

// Two words -> two independent standard normals.
inline void box_muller(uint32_t radius_word, uint32_t angle_word, float &first, float &second) {
    int32_t pattern = as_int(float(int32_t((radius_word >> 1) | 1)));
    int32_t exponent = (pattern - 0x3F3504F3) >> 23;
    float x = as_float(pattern - int32_t(uint32_t(exponent) << 23)) - 1.0f;
    float square = x * x;
    float log_u = (horner(x, LOG_P) * x) * square - square * 0.5f + x + float(exponent - 31) * 0.693147182464599609375f;
    float radius = std::sqrt(log_u * -2.0f);
    int32_t angle = int32_t(angle_word);
    float t = float((angle & 0x3FFFFFFF) - 0x20000000) * 0x1p-30f;
    square = t * t;
    int32_t sine = as_int(radius * (horner(square, SIN_P) * t));
    int32_t cosine = as_int(radius * (horner(square, COS_P) * square + 1.0f)) ^ int32_t((angle_word << 1) & 0x80000000u);
    int32_t exchange = (sine ^ cosine) & (angle >> 31);
    first = as_float(cosine ^ exchange);
    second = as_float(sine ^ exchange);
}

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "two words of 32 bits are stored as one of 64: the lower half first"
#endif

// Words of 32 bits, each in the lower half of 64, and their products; what is in the upper halves does not matter.
#if defined(__AVX512F__)
typedef uint64_t Words __attribute__((vector_size(64)));
inline Words multiply(Words a, Words b) { return Words(_mm512_mul_epu32(__m512i(a), __m512i(b))); }
#elif defined(__AVX2__)
typedef uint64_t Words __attribute__((vector_size(32)));
inline Words multiply(Words a, Words b) { return Words(_mm256_mul_epu32(__m256i(a), __m256i(b))); }
#else
typedef uint64_t Words __attribute__((vector_size(8)));
inline Words multiply(Words a, Words b) { return (a & 0xFFFFFFFF) * b; }
#endif
constexpr int64_t LANES = sizeof(Words) / sizeof(uint64_t);
const Words LANE = [] {
    Words number;
    for (int64_t lane = 0; lane < LANES; ++lane) number[lane] = uint64_t(lane);
    return number;
}();

// Normals of the elements first .. first + n - 1 of a parameter, n <= CHUNK; returns where the first one is in `room`.
struct Normals {
    alignas(64) uint32_t words[4][CHUNK / 4 + 2 * LANES];
    alignas(64) float room[CHUNK + 4];

    const float *draw(const Key &key, uint32_t parameter, int64_t first, int64_t n) {
        const int64_t begin = first >> 2, quads = ((first + n + 3) >> 2) - begin;
        Words keys[10][2];  // those of the rounds, in memory: a loop would broadcast them anew for every vector
        for (uint32_t round = 0; round < 10; ++round) {
            keys[round][0] = Words{} + uint32_t(key.k0 + round * W0);
            keys[round][1] = Words{} + uint32_t(key.k1 + round * W1);
        }
        for (int64_t i = 0; i < quads; i += 2 * LANES) {  // Philox4x32-10 of even and odd quads, whose products overlap
            Words c[2][4];
            for (int64_t odd = 0; odd < 2; ++odd) {
                c[odd][0] = LANE * 2 + uint64_t(begin + i + odd);
                c[odd][1] = (c[odd][0] >> 32) | key.c1;
                c[odd][2] = Words{} + parameter;
                c[odd][3] = Words{} + key.step;
            }
            for (const auto &k : keys)
                for (auto &x : c) {
                    Words product0 = multiply(x[0], Words{} + M0), product1 = multiply(x[2], Words{} + M1);
                    x[0] = (product1 >> 32) ^ x[1] ^ k[0];
                    x[1] = product1;
                    x[2] = (product0 >> 32) ^ x[3] ^ k[1];
                    x[3] = product0;
                }
            for (int word = 0; word < 4; ++word) {
                Words pairs = (c[1][word] << 32) | (c[0][word] & 0xFFFFFFFF);
                std::memcpy(&words[word][i], &pairs, sizeof pairs);
            }
        }
        for (int64_t i = 0; i < quads; ++i) {
            float a, b, c, d;
            box_muller(words[0][i], words[1][i], a, b);
            box_muller(words[2][i], words[3][i], c, d);
            room[4 * i] = a, room[4 * i + 1] = b, room[4 * i + 2] = c, room[4 * i + 3] = d;
        }
        return room + (first & 3);
    }
};

// ---------------------------------------------------------------- functional.ivon

inline float root_precision(float hess, float ess, float weight_decay) { return std::sqrt((hess + weight_decay) * ess); }

template <int CURVATURE>
inline float estimate_curvature(float grad, float root, float eps, const Hyper &h) {
    if (CURVATURE == PRICE) return grad * (eps * root);
    return (grad * grad) * h.square_scale;
}

template <int CURVATURE>
inline float update_hessian(float hess, float curvature, const Hyper &h) {
    if (CURVATURE == NONE) return hess;
    if (CURVATURE == FISHER) {
        float updated = hess + (curvature - hess) * h.rho;
        return is_finite(updated) ? updated : hess;
    }
    float precision = hess + h.weight_decay;
    float u = ((curvature - hess) * h.rho) / precision;
    float updated = hess + precision * (u + (u * 0.5f) * u);
    float next = updated + h.weight_decay;
    updated = is_finite(next) ? updated : hess;
    return next > 0.0f ? updated : hess;
}

template <bool ADAM>
inline float update_mean(float mean, float momentum, float hess, const Hyper &h) {
    float divisor, pull;
    if (ADAM) {
        divisor = std::sqrt(hess * h.inverse_batch) + 1e-8f;
        pull = mean * clamp(divisor, 0.0f, h.weight_decay) * h.prior_weight;
    } else {
        divisor = hess + h.weight_decay;
        pull = mean * h.weight_decay;
    }
    float direction = (momentum / h.debias + pull) / divisor;
    return mean - clamp(direction, -h.clip_radius, h.clip_radius) * h.lr;
}

// ---------------------------------------------------------------- functional.importance

constexpr float SNR_ABS_P[] = {1.3236068487167358f,  -0.25040578842163086f, 1.8665770292282104f,   -0.2552284300327301f,
                               0.4326359033584595f,  0.021922320127487183f, -0.022468378767371178f, 0.018016662448644638f};
constexpr float SNR_ABS_Q[] = {1.0f,                -0.18929044902324677f, 1.4122387170791626f, -0.20743189752101898f,
                               0.14897313714027405f, -0.03520124778151512f, 0.01852859929203987f};

template <int CRITERION>
inline float importance(float mean, float hess, const Hyper &h) {
    if (CRITERION == MAGNITUDE) return std::fabs(mean);
    float root = root_precision(hess, h.ess, h.weight_decay);
    if (CRITERION == INVERSE_STD) return root;
    float a = std::fabs(mean) * root;
    if (CRITERION == SNR) return a;
    float small = clamp(a, 0.0f, 6.0f);
    float ratio = horner(small, SNR_ABS_P) / horner(small, SNR_ABS_Q);
    return a < 6.0f ? ratio : a;
}

// ---------------------------------------------------------------- tensors of a batch

struct Tensor {
    const int64_t *table;
    int64_t n, i;

    int64_t operator[](Row row) const { return table[row * n + i]; }
    template <typename T>
    T *at(Row row) const {
        return reinterpret_cast<T *>((*this)[row]);
    }
};

// 1 where an element's rank is alive, else 0: elements first .. first + n - 1 of the whole parameter.
void fill_active(const Tensor &t, int64_t first, int64_t n, float *active) {
    const bool *mask = t.at<bool>(RANK_MASK);
    const int64_t ranks = t[RANKS], inner = t[INNER];
    int64_t rank = (first / inner) % ranks, left = inner - first % inner;
    for (int64_t j = 0; j < n; ++j) {
        active[j] = mask[rank] ? 1.0f : 0.0f;
        if (--left == 0) {
            left = inner;
            rank = rank + 1 == ranks ? 0 : rank + 1;
        }
    }
}

template <typename T>
void sample_tensor(const Tensor t, const Hyper h, const Key &key) {
    Normals normals;
    float active[CHUNK], root[CHUNK];
    T *param = t.at<T>(PARAM);
    float *mean = t.at<float>(MEAN);
    const float *hess = t.at<float>(HESS);
    const bool noisy = is_finite(h.noise_ess);
    for (int64_t begin = 0; begin < t[NUMEL]; begin += CHUNK) {
        const int64_t n = t[NUMEL] - begin < CHUNK ? t[NUMEL] - begin : CHUNK, first = t[OFFSET] + begin;
        T *p = param + begin;
        float *m = mean + begin;
        const float *g = hess + begin;
        for (int64_t j = 0; j < n; ++j) {
            float now = to_float(p[j]);
            T rounded;
            round_to(rounded, m[j]);
            m[j] = sizeof(T) < 4 && to_float(rounded) == now ? m[j] : now;
        }
        if (!noisy) {
            for (int64_t j = 0; j < n; ++j) round_to(p[j], m[j]);
            continue;
        }
        for (int64_t j = 0; j < n; ++j) root[j] = root_precision(g[j], h.noise_ess, h.weight_decay);
        const float *eps = normals.draw(key, uint32_t(t[INDEX]), first, n);
        if (t[RANK_MASK]) {
            fill_active(t, first, n, active);
            for (int64_t j = 0; j < n; ++j) round_to(p[j], m[j] + (eps[j] * active[j]) / root[j]);
        } else {
            for (int64_t j = 0; j < n; ++j) round_to(p[j], m[j] + eps[j] / root[j]);
        }
    }
}

// With n_samples 0 gradient and curvature are only added to the banked sums: there are samples to come.
// Returns how many elements were skipped because they, or their update, were not finite.
template <typename T, typename G, int CURVATURE, bool ADAM>
int64_t step_tensor(const Tensor t, const Hyper h, const Key &key) {
    Normals normals;
    alignas(64) float grad[CHUNK], curvature[CHUNK], active[CHUNK];
    int64_t skipped = 0;
    for (float &one : active) one = 1.0f;
    for (int64_t begin = 0; begin < t[NUMEL]; begin += CHUNK) {
        const int64_t n = t[NUMEL] - begin < CHUNK ? t[NUMEL] - begin : CHUNK, first = t[OFFSET] + begin;
        const G *observed = t.at<G>(GRAD) + begin;
        float *hess = t.at<float>(HESS) + begin, *momentum = t.at<float>(MOMENTUM) + begin;
        float *mean = t.at<float>(MEAN) + begin;
        T *param = t.at<T>(PARAM) + begin;
        for (int64_t j = 0; j < n; ++j) grad[j] = to_float(observed[j]) * h.grad_scale;
        if (CURVATURE != NONE) {
            const float *eps = normals.room;
            if (CURVATURE == PRICE) {
                for (int64_t j = 0; j < n; ++j) curvature[j] = root_precision(hess[j], h.ess, h.weight_decay);
                eps = normals.draw(key, uint32_t(t[INDEX]), first, n);
            }
            for (int64_t j = 0; j < n; ++j)
                curvature[j] = estimate_curvature<CURVATURE>(grad[j], curvature[j], eps[j], h);
        }
        if (t[BANKED_GRAD]) {
            float *other = t.at<float>(BANKED_GRAD) + begin, *others = t.at<float>(BANKED_CURVATURE) + begin;
            if (h.n_samples == 0.0f) {
                for (int64_t j = 0; j < n; ++j) other[j] = other[j] + grad[j];
                for (int64_t j = 0; j < n; ++j) others[j] = others[j] + curvature[j];
                continue;
            }
            for (int64_t j = 0; j < n; ++j) grad[j] = (grad[j] + other[j]) / h.n_samples;
            if (CURVATURE != NONE)
                for (int64_t j = 0; j < n; ++j) curvature[j] = (curvature[j] + others[j]) / h.n_samples;
        }
        if (t[RANK_MASK]) fill_active(t, first, n, active);
        int32_t left_out = 0;
        for (int64_t j = 0; j < n; ++j) {
            float new_momentum = momentum[j] * h.beta1 + grad[j] * h.complement;
            float new_hess = update_hessian<CURVATURE>(hess[j], curvature[j], h);
            float new_mean = update_mean<ADAM>(mean[j], new_momentum, new_hess, h);
            float finite = is_finite(new_momentum) ? 1.0f : 0.0f;
            finite = is_finite(new_mean) ? finite : 0.0f;
            float moves = finite * active[j];
            left_out += int32_t(active[j] - moves);
            momentum[j] = moves != 0.0f ? new_momentum : momentum[j];
            hess[j] = moves != 0.0f ? new_hess : hess[j];
            grad[j] = moves != 0.0f ? new_mean : mean[j];
        }
        skipped += left_out;
        for (int64_t j = 0; j < n; ++j) round_to(param[j], grad[j]);
        if (sizeof(T) < 4) std::memcpy(mean, grad, sizeof(float) * n);
    }
    return skipped;
}

// Adds the importance of every element to the sum of its rank.
template <int CRITERION>
void sum_ranks(const Tensor t, const Hyper h, double *sums) {
    float values[CHUNK];
    const float *mean = t.at<float>(MEAN), *hess = t.at<float>(HESS);
    const int64_t ranks = t[RANKS], inner = t[INNER];
    int64_t rank = 0, left = inner;
    for (int64_t begin = 0; begin < t[NUMEL]; begin += CHUNK) {
        const int64_t n = t[NUMEL] - begin < CHUNK ? t[NUMEL] - begin : CHUNK;
        for (int64_t j = 0; j < n; ++j)
            values[j] = importance<CRITERION>(mean[begin + j], hess[begin + j], h);
        for (int64_t j = 0; j < n;) {
            const int64_t run = left < n - j ? left : n - j;
            double total = 0.0;
            for (int64_t k = 0; k < run; ++k) total += double(values[j + k]);
            sums[rank] += total;
            j += run;
            left -= run;
            if (left == 0) {
                left = inner;
                rank = rank + 1 == ranks ? 0 : rank + 1;
            }
        }
    }
}

// Calls f.run<T>() for the type that a number stands for: 0 float, 1 bf16.
template <typename F>
int64_t with_dtype(int64_t dtype, const F &f) {
    return dtype == 0 ? f(float()) : f(bf16());
}

}  // namespace

extern "C" {

void ivon_sample(const int64_t *table, int64_t n, int64_t dtype, const Hyper *h, const Key *key) {
    for (int64_t i = 0; i < n; ++i)
        with_dtype(dtype, [&](auto t) {
            sample_tensor<decltype(t)>({table, n, i}, *h, *key);
            return 0;
        });
}

// Returns the number of elements that were skipped.
int64_t ivon_step(const int64_t *table, int64_t n, int64_t dtype, int64_t grad_dtype, int64_t curvature, const Hyper *h,
                  const Key *key) {
    int64_t skipped = 0;
    for (int64_t i = 0; i < n; ++i)
        skipped += with_dtype(dtype, [&](auto p) {
            using P = decltype(p);
            return with_dtype(grad_dtype, [&](auto g) {
                using G = decltype(g);
                const Tensor t{table, n, i};
                switch (curvature) {
                    case PRICE: return step_tensor<P, G, PRICE, false>(t, *h, *key);
                    case GRADSQ: return step_tensor<P, G, GRADSQ, false>(t, *h, *key);
                    case FISHER: return step_tensor<P, G, FISHER, true>(t, *h, *key);
                    default: return step_tensor<P, G, NONE, false>(t, *h, *key);
                }
            });
        });
    return skipped;
}

// sums: one double per rank of every tensor, tensor after tensor.
void ivon_rank_sums(const int64_t *table, int64_t n, int64_t criterion, const Hyper *h, double *sums) {
    for (int64_t i = 0; i < n; ++i) {
        const Tensor t{table, n, i};
        switch (criterion) {
            case SNR_ABS: sum_ranks<SNR_ABS>(t, *h, sums); break;
            case SNR: sum_ranks<SNR>(t, *h, sums); break;
            case MAGNITUDE: sum_ranks<MAGNITUDE>(t, *h, sums); break;
            default: sum_ranks<INVERSE_STD>(t, *h, sums); break;
        }
        sums += t[RANKS];
    }
}

}  // extern "C"
