// SPDX-License-Identifier: MIT
// The passes over the logits without Torch: checked against plain kernels, and timed beside cuBLAS,
// which stores the logits. For ncu and compute-sanitizer:
//   cce_driver [check | N D V [rounds]]
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <ounce/kernels/cce/cce_filter.h>
#include <ounce/kernels/cce/cce_rows.h>
#include <ounce/kernels/common/driver.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

using namespace ounce::cce;
using ounce::driver::allocate;

namespace {

__device__ float noise(uint64_t i, uint64_t seed) {  // N(0, 1)
  const auto mix = [](uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
  };
  const uint64_t r = mix(i * 0x9E3779B97F4A7C15ull + seed);
  const float u = ((r >> 40) + 0.5f) / 16777216.f, v = (r & 0xFFFFFF) / 16777216.f;
  return sqrtf(-2 * logf(u)) * cospif(2 * v);
}
__global__ void fill(__nv_bfloat16* out, int64_t count, float scale, uint64_t seed) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    out[i] = __float2bfloat16(noise(i, seed) * scale);
  }
}
template <class T>
__global__ void fill_with(T* out, int64_t count, T value) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    out[i] = value;
  }
}
__global__ void fill_targets(int* out, int64_t count, int64_t vocab) {
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
    out[i] = static_cast<int>((i * 2654435761u + i) % vocab);
  }
}

// One block a row, in double.
__device__ double logit(const Logits& p, int64_t row, int64_t column) {
  const auto* x = static_cast<const __nv_bfloat16*>(p.hidden) + row * p.hidden_stride;
  const auto* c = static_cast<const __nv_bfloat16*>(p.weight) + column * p.weight_stride;
  double sum = 0;
  for (int64_t i = 0; i < p.dim; ++i) {
    sum += static_cast<double>(__bfloat162float(x[i])) * __bfloat162float(c[i]);
  }
  sum = (sum + (p.bias ? p.bias[column] : 0)) * p.scale;
  return p.softcap > 0 ? p.softcap * tanh(sum / p.softcap) : sum;
}
__device__ double over_block(double x, bool largest) {
  __shared__ double all[256];
  all[threadIdx.x] = x;
  __syncthreads();
  for (int step = 128; step > 0; step /= 2) {
    if (threadIdx.x < step) {
      const double other = all[threadIdx.x + step];
      all[threadIdx.x] = largest ? fmax(all[threadIdx.x], other) : all[threadIdx.x] + other;
    }
    __syncthreads();
  }
  const double result = all[0];
  __syncthreads();
  return result;
}
__global__ void plain_rows(Logits p, int64_t step, double* lse, double* nll, double* entropy) {
  const int64_t row = blockIdx.x * step;
  if (row >= p.rows) return;
  double top = -INFINITY, sum = 0;
  for (int64_t j = threadIdx.x; j < p.vocab; j += 256) top = fmax(top, logit(p, row, j));
  top = over_block(top, true);
  for (int64_t j = threadIdx.x; j < p.vocab; j += 256) sum += exp(logit(p, row, j) - top);
  sum = over_block(sum, false);
  double product = 0;
  for (int64_t j = threadIdx.x; j < p.vocab; j += 256) {
    const double d = logit(p, row, j) - top;
    product += exp(d) * d;
  }
  product = over_block(product, false);
  if (threadIdx.x == 0) {
    entropy[blockIdx.x] = log(sum) - product / sum;
    lse[blockIdx.x] = top + log(sum);
    nll[blockIdx.x] = lse[blockIdx.x] - logit(p, row, p.target[row]);
  }
}
// Squares of the error, and of the value.
__global__ void plain_gradient(Logits p, LogitGradient g, int64_t step, double* sums) {
  const int64_t row = blockIdx.x * step;
  if (row >= p.rows) return;
  double error = 0, value = 0;
  for (int64_t j = threadIdx.x; j < p.vocab; j += 256) {
    const double z = logit(p, row, j),
                 slope = p.softcap > 0 ? 1 - z * z / p.softcap / p.softcap : 1;
    const RowFactors f = g.rows[row];
    const double l = z * kLog2e - f.base;
    double v =
        exp2(l) * (f.factor + f.log_factor * l) - (f.flat != 0 ? f.flat * g.class_weight[j] : 0);
    v *= slope;
    if (p.target[row] == j) v = g.at_target[row];
    const double got =
        __bfloat162float(static_cast<const __nv_bfloat16*>(g.out)[row * g.out_stride + j]);
    error += (v - got) * (v - got);
    value += v * v;
  }
  error = over_block(error, false);
  value = over_block(value, false);
  if (threadIdx.x == 0) {
    atomicAdd(sums, error);
    atomicAdd(sums + 1, value);
  }
}

// Squares of the error of e and of its value, and of the errors of the sums.
__global__ void plain_exponentials(Logits p, Exponentials e, const AnchoredSum* got, int64_t step,
                                   double* sums) {
  const int64_t row = blockIdx.x * step;
  if (row >= p.rows) return;
  double error = 0, value = 0, sum = 0, rounded = 0;
  for (int64_t j = threadIdx.x; j < p.vocab; j += 256) {
    if (p.target[row] == j) continue;
    const double z = logit(p, row, j), v = exp2(z * kLog2e - e.anchor[row]),
                 slope = p.softcap > 0 ? 1 - z * z / p.softcap / p.softcap : 1;
    const double made =
        __bfloat162float(static_cast<const __nv_bfloat16*>(e.out)[row * e.out_stride + j]);
    error += (v * slope - made) * (v * slope - made);
    value += v * v * slope * slope;
    sum += v;
    rounded += made - v * slope;
  }
  error = over_block(error, false);
  value = over_block(value, false);
  sum = over_block(sum, false);
  rounded = over_block(rounded, false);
  if (threadIdx.x == 0) {
    atomicAdd(sums, error);
    atomicAdd(sums + 1, value);
    if (p.vocab == 1) return;
    const AnchoredSum& row_got = got[row];
    atomicAdd(sums + 2, pow(row_got.sum / sum - 1, 2));
    atomicAdd(sums + 3, pow((row_got.rounding - rounded) / sum, 2));
  }
}

// Squares of the error of a product over kept tiles and of its value, of every step-th row.
__global__ void plain_product(KeptProduct p, KeptMatrix m, int64_t step, double* sums) {
  const int64_t row = blockIdx.x * step;
  if (row >= p.m) return;
  const auto* left = static_cast<const __nv_bfloat16*>(p.left);
  const auto* right = static_cast<const __nv_bfloat16*>(p.right);
  double error = 0, value = 0;
  for (int64_t n = threadIdx.x; n < p.n; n += 256) {
    double sum = 0, got = 0;
    for (int64_t k = 0; k < p.inner; ++k) {
      if (!m.kept[row / kFilterTile * m.row_stride + k / kFilterTile * m.column_stride]) continue;
      const auto x =
          p.left_is_transposed ? left[k * p.left_stride + row] : left[row * p.left_stride + k];
      sum += static_cast<double>(__bfloat162float(x)) *
             __bfloat162float(right[k * p.right_stride + n]);
    }
    for (int part = 0; part < p.parts; ++part) {
      const int64_t place = (part * p.m + row) * p.n + n;
      got += p.out_is_fp32 ? static_cast<const float*>(p.out)[place]
                           : __bfloat162float(static_cast<const __nv_bfloat16*>(p.out)[place]);
    }
    if (p.add) sum *= 2;  // it was added to itself
    error += (sum - got) * (sum - got);
    value += sum * sum;
  }
  error = over_block(error, false);
  value = over_block(value, false);
  if (threadIdx.x == 0) {
    atomicAdd(sums, error);
    atomicAdd(sums + 1, value);
  }
}

int failures = 0;
void expect(bool good, const char* what, double value) {
  std::printf("  %s %s %.3g\n", good ? "ok  " : "FAIL", what, value);
  failures += !good;
}

__global__ void factors_of(const float* lse, int64_t rows, RowFactors all, RowFactors* out) {
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < rows; i += gridDim.x * blockDim.x) {
    out[i] = all;
    out[i].base = lse[i] * kLog2e;
  }
}

struct Case {
  int64_t rows, dim, vocab;
  bool bias = false;
  float scale = 1, softcap = 0, spread = 0;  // of the classifier; 0 = logits of unit variance
};

struct Data {
  Logits logits;
  Partial *partials, *sums;
  AnchoredSum *anchored_partials, *anchored;
  int* again;
  float *anchor, *target_logit, *lse, *nll, *entropy, *at_target, *rounding;
  Moments *moment_partials, *moments;
  RowFactors* factors;
  float* class_weight;
  float *ones, *losses;
  bool* counted;
  int* target;

  explicit Data(const Case& c) {
    logits.rows = c.rows, logits.vocab = c.vocab, logits.dim = c.dim;
    logits.hidden_stride = logits.weight_stride = (c.dim + 7) / 8 * 8;
    auto* x = allocate<__nv_bfloat16>(c.rows * logits.hidden_stride);
    auto* w = allocate<__nv_bfloat16>(c.vocab * logits.weight_stride);
    fill<<<1024, 256>>>(x, c.rows * logits.hidden_stride, 1, 1);
    const float spread = c.spread > 0 ? c.spread : 1 / std::sqrt(static_cast<float>(c.dim));
    fill<<<1024, 256>>>(w, c.vocab * logits.weight_stride, spread, 2);
    target = allocate<int>(c.rows);
    fill_targets<<<1, 256>>>(target, c.rows, c.vocab);
    logits.hidden = x, logits.weight = w, logits.target = target;
    logits.scale = c.scale, logits.softcap = c.softcap;
    if (c.bias) {
      std::vector<float> host(c.vocab);
      for (int64_t i = 0; i < c.vocab; ++i) host[i] = std::sin(static_cast<float>(i));
      auto* bias = allocate<float>(c.vocab);
      CHECK(cudaMemcpy(bias, host.data(), c.vocab * 4, cudaMemcpyHostToDevice));
      logits.bias = bias;
    }
    cudaDeviceProp properties;
    CHECK(cudaGetDeviceProperties(&properties, 0));
    logits.schedule =
        schedule(c.rows, c.vocab, c.dim, clusters_of_device(), properties.l2CacheSize);
    partials = allocate<Partial>(logits.schedule.partials());
    sums = allocate<Partial>(c.rows);
    anchored_partials = allocate<AnchoredSum>(logits.schedule.partials());
    anchored = allocate<AnchoredSum>(c.rows);
    again = allocate<int>((c.rows + kPairRows - 1) / kPairRows);
    for (auto** rows : {&anchor, &target_logit, &lse, &nll, &entropy, &at_target, &rounding}) {
      *rows = allocate<float>(c.rows);
    }
    counted = allocate<bool>(c.rows);
    ones = allocate<float>(c.rows);
    losses = allocate<float>(c.rows);
    fill_with<<<64, 256>>>(counted, c.rows, true);
    fill_with<<<64, 256>>>(ones, c.rows, 1.f);
    moment_partials = allocate<Moments>(logits.schedule.partials());
    moments = allocate<Moments>(c.rows);
    factors = allocate<RowFactors>(c.rows);
    class_weight = allocate<float>(logits.schedule.tiles * kTileColumns);
    fill_with<<<64, 256>>>(class_weight, logits.schedule.tiles * kTileColumns, 0.7f);
    fill_with<<<64, 256>>>(at_target, c.rows, -1.f / static_cast<float>(c.vocab));
  }
  ~Data() {
    for (const void* memory : {logits.hidden,
                               logits.weight,
                               static_cast<const void*>(logits.bias),
                               static_cast<const void*>(target),
                               static_cast<const void*>(partials),
                               static_cast<const void*>(sums),
                               static_cast<const void*>(anchored_partials),
                               static_cast<const void*>(anchored),
                               static_cast<const void*>(again),
                               static_cast<const void*>(anchor),
                               static_cast<const void*>(counted),
                               static_cast<const void*>(ones),
                               static_cast<const void*>(losses),
                               static_cast<const void*>(rounding),
                               static_cast<const void*>(target_logit),
                               static_cast<const void*>(lse),
                               static_cast<const void*>(nll),
                               static_cast<const void*>(entropy),
                               static_cast<const void*>(at_target),
                               static_cast<const void*>(moment_partials),
                               static_cast<const void*>(moments),
                               static_cast<const void*>(factors),
                               static_cast<const void*>(class_weight)}) {
      cudaFree(const_cast<void*>(memory));
    }
  }
  void forward() {
    fill_with<<<64, 256>>>(sums, logits.rows, Partial{-INFINITY, 0});
    CHECK(add_exponentials(logits, partials, sums, target_logit, nullptr));
    CHECK(finish_rows(logits.rows, {.counted = counted, .weight = ones, .hit_weight = ones}, sums,
                      target_logit, {lse, nll, losses, losses}, nullptr));
  }
  void forward_with_moments() {
    CHECK(start_rows(logits.rows, moments, target_logit, nullptr));
    CHECK(add_moments(logits, class_weight, moment_partials, moments, target_logit, nullptr));
    CHECK(finish_rows(logits.rows, {.counted = counted, .weight = ones, .hit_weight = ones},
                      moments, target_logit, {lse, nll, losses, losses, entropy}, nullptr));
  }
  // dloss/dlogits where every row has these.
  LogitGradient gradient(void* out, int64_t out_stride, float factor, float log_factor,
                         float flat) {
    factors_of<<<64, 256>>>(lse, logits.rows, {0, factor, log_factor, flat}, factors);
    return {.rows = factors,
            .at_target = at_target,
            .general = log_factor != 0 || flat != 0,
            .class_weight = flat != 0 ? class_weight : nullptr,
            .out = out,
            .out_stride = out_stride};
  }
};

// Anchors by `nats` below each row's lse.
__global__ void anchors_below(const float* lse, float nats, int64_t rows, float* anchor) {
  for (int64_t i = threadIdx.x; i < rows; i += blockDim.x) anchor[i] = (lse[i] - nats) * kLog2e;
}

// The exponentials with anchors far too low, so that they are made again, and with good ones.
void check_exponentials(Data& data, const LogitGradient& out, int64_t step, double* plain) {
  const Logits& p = data.logits;
  const auto blocks = static_cast<unsigned>((p.rows + step - 1) / step);
  Exponentials e{.anchor = data.anchor, .out = out.out, .out_stride = out.out_stride};
  for (const float nats : {-2.f, 300.f}) {
    CHECK(cudaMemset(e.out, 0xFF, p.rows * e.out_stride * 2));
    anchors_below<<<1, 256>>>(data.lse, nats, p.rows, data.anchor);
    fill_with<<<64, 256>>>(data.anchored, p.rows, AnchoredSum{-INFINITY, 0, 0});
    for (int pass = 0; pass < 2; ++pass) {
      e.only = pass == 0 ? nullptr : data.again;
      CHECK(exponentials(p, e, data.anchored_partials, data.anchored, data.target_logit, nullptr));
      if (pass == 1) break;
      CHECK(find_overflow(p.rows, data.anchor, data.anchored, data.target_logit, data.again,
                          nullptr));
    }
    CHECK(cudaMemset(plain, 0, 32));
    plain_exponentials<<<blocks, 256>>>(p, e, data.anchored, step, plain);
    double sums[4];
    CHECK(cudaMemcpy(sums, plain, 32, cudaMemcpyDeviceToHost));
    if (p.vocab > 1)
      expect(std::sqrt(sums[0] / sums[1]) < 3e-3, "exponentials", std::sqrt(sums[0] / sums[1]));
    expect(std::sqrt(sums[2] / blocks) < 3e-5, "sum", std::sqrt(sums[2] / blocks));
    expect(std::sqrt(sums[3] / blocks) < 3e-5, "rounding", std::sqrt(sums[3] / blocks));
  }
}

// Both gradients of e over a share of its tiles.
struct Kept {
  KeptMatrix rows, columns;
  KeptProduct hidden, weight;
  int* lists[4];
  bool* kept;

  Kept(const Logits& p, const void* e, int64_t stride, double share, bool weight_is_fp32) {
    const auto m = filter_tiles(p.rows), n = filter_tiles(p.vocab);
    std::vector<char> host(m * n);
    for (int64_t i = 0; i < m * n; ++i) {
      host[i] = static_cast<double>(i * 2654435761u % 1000) < share * 1000;
    }
    kept = allocate<bool>(m * n);
    CHECK(cudaMemcpy(kept, host.data(), m * n, cudaMemcpyHostToDevice));
    rows = {kept, static_cast<int>(m), static_cast<int>(n), static_cast<int>(n), 1};
    columns = {kept, static_cast<int>(n), static_cast<int>(m), 1, static_cast<int>(n)};
    for (int i = 0; i < 4; ++i) lists[i] = allocate<int>(i % 2 == 0 ? m * n : std::max(m, n));
    CHECK(list_kept(rows, lists[0], lists[1], nullptr));
    CHECK(list_kept(columns, lists[2], lists[3], nullptr));
    hidden = {.left = e,
              .right = p.weight,
              .left_stride = stride,
              .right_stride = p.weight_stride,
              .m = p.rows,
              .n = p.hidden_stride,
              .inner = p.vocab,
              .list = lists[0],
              .count = lists[1],
              .list_stride = rows.columns,
              .parts = parts_of(p.rows, p.hidden_stride, p.schedule.clusters)};
    hidden.out = allocate<float>(hidden.parts * p.rows * p.hidden_stride);
    weight = {.left = e,
              .left_is_transposed = true,
              .right = p.hidden,
              .left_stride = stride,
              .right_stride = p.hidden_stride,
              .m = p.vocab,
              .n = p.hidden_stride,
              .inner = p.rows,
              .list = lists[2],
              .count = lists[3],
              .list_stride = columns.columns,
              .out_is_fp32 = weight_is_fp32};
    weight.out = allocate<float>(p.vocab * p.hidden_stride);
  }
  ~Kept() {
    for (auto* list : lists) cudaFree(list);
    cudaFree(kept);
    cudaFree(hidden.out);
    cudaFree(weight.out);
  }
};

void check_kept(const Data& data, const LogitGradient& e, int64_t step, double* plain) {
  const int clusters = data.logits.schedule.clusters;
  for (const bool fp32 : {true, false}) {
    Kept kept(data.logits, e.out, e.out_stride, 0.4, fp32);
    for (auto* p : {&kept.hidden, &kept.weight}) {
      const auto& matrix = p == &kept.hidden ? kept.rows : kept.columns;
      for (const bool add : {false, true}) {
        p->add = add;
        CHECK(multiply_kept(*p, clusters, nullptr));
        CHECK(cudaMemset(plain, 0, 16));
        const auto each = std::max<int64_t>(step, p->m / 64);
        plain_product<<<static_cast<unsigned>((p->m + each - 1) / each), 256>>>(*p, matrix, each,
                                                                                plain);
        double sums[2];
        CHECK(cudaMemcpy(sums, plain, 16, cudaMemcpyDeviceToHost));
        const double error = sums[1] > 0 ? std::sqrt(sums[0] / sums[1]) : sums[0];
        expect(error < (p->out_is_fp32 ? 1e-5 : 4e-3), add ? "kept, added" : "kept", error);
      }
    }
  }
}

// lse, nll and entropy of every step-th row.
void check_rows(Data& data, int64_t step, double* plain) {
  const auto blocks = static_cast<unsigned>((data.logits.rows + step - 1) / step);
  plain_rows<<<blocks, 256>>>(data.logits, step, plain, plain + blocks, plain + 2 * blocks);
  std::vector<double> expected(3 * blocks);
  CHECK(cudaMemcpy(expected.data(), plain, 3 * blocks * 8, cudaMemcpyDeviceToHost));
  const auto compare = [&](const char* name, const float* got, const double* exact) {
    std::vector<float> host(data.logits.rows);
    CHECK(cudaMemcpy(host.data(), got, host.size() * 4, cudaMemcpyDeviceToHost));
    double worst = 0;
    for (unsigned i = 0; i < blocks; ++i) {
      const double far = std::abs(host[i * step] - exact[i]) / std::max(1.0, std::abs(exact[i]));
      if (!(far <= worst)) worst = far;
    }
    expect(worst < 2e-5, name, worst);
  };
  for (const bool moments : {true, false}) {
    moments ? data.forward_with_moments() : data.forward();
    compare("lse", data.lse, expected.data());
    compare("nll", data.nll, expected.data() + blocks);
    if (moments) compare("entropy", data.entropy, expected.data() + 2 * blocks);
  }
}

void check(const Case& c) {
  std::printf("N %ld D %ld V %ld%s scale %g softcap %g spread %g\n", c.rows, c.dim, c.vocab,
              c.bias ? " bias" : "", c.scale, c.softcap, c.spread);
  Data data(c);
  const int64_t step = std::max<int64_t>(1, c.rows / 64);
  const auto blocks = static_cast<unsigned>((c.rows + step - 1) / step);
  auto* plain = allocate<double>(3 * blocks + 4);
  check_rows(data, step, plain);

  const auto stride = (c.vocab + 7) / 8 * 8;
  auto* out = allocate<__nv_bfloat16>(c.rows * stride);
  LogitGradient g;
  for (const bool general : {true, false}) {
    g = data.gradient(out, stride, 0.5f, general ? 0.1f : 0, general ? 0.3f / c.vocab : 0);
    CHECK(cudaMemset(out, 0xFF, c.rows * stride * 2));
    fill_with<<<64, 256>>>(data.rounding, c.rows, 0.f);
    CHECK(logit_gradient(data.logits, g, reinterpret_cast<float*>(data.partials), data.rounding,
                         nullptr));
    CHECK(cudaMemset(plain, 0, 16));
    plain_gradient<<<blocks, 256>>>(data.logits, g, step, plain);
    double sums[2];
    CHECK(cudaMemcpy(sums, plain, 16, cudaMemcpyDeviceToHost));
    const double error = std::sqrt(sums[0] / sums[1]);
    expect(error < 3e-3, general ? "general gradient" : "gradient", error);
  }
  check_kept(data, g, step, plain);
  check_exponentials(data, g, step, plain);
  cudaFree(g.out);
  cudaFree(plain);
}

double milliseconds(const std::function<void()>& body) {
  static cudaEvent_t begin = nullptr, end = nullptr;
  if (begin == nullptr) {
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
  }
  CHECK(cudaEventRecord(begin));
  body();
  CHECK(cudaEventRecord(end));
  CHECK(cudaEventSynchronize(end));
  float taken = 0;
  CHECK(cudaEventElapsedTime(&taken, begin, end));
  return taken;
}

void time(const Case& c, int rounds) {
  Data data(c);
  const Logits& p = data.logits;
  const int64_t slab = std::min<int64_t>(33 * kTileColumns, c.vocab);
  const int64_t stride = (std::max(slab, c.vocab) + 7) / 8 * 8;
  auto* z = allocate<__nv_bfloat16>(c.rows * stride);
  cublasHandle_t blas;
  CHECK(cublasCreate(&blas));
  const float one = 1, zero = 0;
  const auto gemm = [&](int64_t vocab) {
    CHECK(cublasGemmEx(blas, CUBLAS_OP_T, CUBLAS_OP_N, vocab, c.rows, c.dim, &one, p.weight,
                       CUDA_R_16BF, p.weight_stride, p.hidden, CUDA_R_16BF, p.hidden_stride, &zero,
                       z, CUDA_R_16BF, stride, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
  };
  Logits part = p;
  part.vocab = slab;
  cudaDeviceProp properties;
  CHECK(cudaGetDeviceProperties(&properties, 0));
  part.schedule = schedule(c.rows, slab, c.dim, p.schedule.clusters, properties.l2CacheSize);
  struct Timed {
    const char* name;
    std::function<void()> body;
    double flop;
    std::vector<double> taken;
  };
  const double flop = 2.0 * c.rows * c.dim * c.vocab;
  Exponentials e{.anchor = data.anchor, .out = z, .out_stride = stride};
  Exponentials measured = e;
  measured.boxes = allocate<BoxMass>(p.schedule.tiles * (kTileColumns / kBoxColumns) * c.rows);
  const auto exponentials_of = [&](const Exponentials& how) {
    CHECK(exponentials(p, how, data.anchored_partials, data.anchored, data.target_logit, nullptr));
  };
  const Kept kept(p, z, stride, 0.25, false);
  data.forward();
  const auto gradient = data.gradient(z, slab, 0.5f, 0, 0);
  anchors_below<<<1, 256>>>(data.lse, 0, c.rows, data.anchor);
  Timed all[] = {{"cuBLAS logits", [&] { gemm(c.vocab); }, flop, {}},
                 {"exponentials", [&] { exponentials_of(e); }, flop, {}},
                 {"forward", [&] { data.forward(); }, flop, {}},
                 {"with moments", [&] { data.forward_with_moments(); }, flop, {}},
                 {"cuBLAS slab", [&] { gemm(slab); }, flop * slab / c.vocab, {}},
                 {"gradient slab",
                  [&] {
                    CHECK(logit_gradient(part, gradient, reinterpret_cast<float*>(data.partials),
                                         data.rounding, nullptr));
                  },
                  flop * slab / c.vocab,
                  {}},
                 {"measured", [&] { exponentials_of(measured); }, flop, {}},
                 {"kept 1/4, hidden",
                  [&] { CHECK(multiply_kept(kept.hidden, p.schedule.clusters, nullptr)); },
                  flop / 4,
                  {}},
                 {"kept 1/4, weight",
                  [&] { CHECK(multiply_kept(kept.weight, p.schedule.clusters, nullptr)); },
                  flop / 4,
                  {}}};
  for (double soak = 0; soak < 1000;) {
    for (auto& timed : all) soak += milliseconds(timed.body);
  }
  for (int round = 0; round < rounds; ++round) {
    for (auto& timed : all) timed.taken.push_back(milliseconds(timed.body));
    for (auto* timed = std::end(all); timed-- != all;) {
      timed->taken.push_back(milliseconds(timed->body));
    }
  }
  std::printf("N %ld D %ld V %ld\n", c.rows, c.dim, c.vocab);
  for (auto& timed : all) {
    std::sort(timed.taken.begin(), timed.taken.end());
    const double ms = timed.taken[timed.taken.size() / 2];
    std::printf("  %-18s %8.3f ms %7.1f TFLOP/s\n", timed.name, ms, timed.flop / ms / 1e9);
  }
  cublasDestroy(blas);
  cudaFree(measured.boxes);
  cudaFree(z);
}

}  // namespace

int main(int count, char** words) {
  std::printf("%d clusters\n", clusters_of_device());
  if (count >= 4) {
    const Case c{std::atol(words[1]), std::atol(words[2]), std::atol(words[3])};
    if (count > 4) {
      time(c, std::atoi(words[4]));
    } else {
      check(c);
    }
    return failures > 0;
  }
  for (const Case& c :
       {Case{256, 64, 192}, Case{1, 8, 1}, Case{1, 8, 2}, Case{129, 72, 7}, Case{130, 128, 193},
        Case{1000, 200, 1000}, Case{517, 2304, 5003, true}, Case{300, 256, 3000, false, -0.7f},
        Case{300, 256, 3000, true, 0.5f, 3}, Case{300, 256, 3000, false, 1, 0, 1},
        Case{4097, 320, 20000}, Case{8191, 256, 50257}}) {
    check(c);
  }
  if (count == 2) return failures > 0;  // check
  for (const Case& c : {Case{8192, 2304, 256000}, Case{8192, 4096, 128256}, Case{8192, 2048, 32768},
                        Case{16384, 768, 50304}, Case{8191, 2304, 256003}}) {
    time(c, 5);
  }
  return failures > 0;
}
