// SPDX-License-Identifier: MIT
#include <cuda_runtime.h>
#include <ounce/kernels/cce/cce_rows.h>

#include <cuda_bf16.h>

namespace ounce::cce {
namespace {

constexpr int kThreads = 128;
// Sums up to here, and products of them with a classifier, are far from the end of fp32.
constexpr float kLargestPower = 80;

unsigned blocks_of(int64_t count, int64_t each) {
  return static_cast<unsigned>((count + each - 1) / each);
}

// A row's slots: `count` of them, `stride` apart.
template <class T>
struct Slots {
  const T* first;
  int count;
  int64_t stride;

  __device__ Slots(const Schedule& schedule, int64_t row, const T* slots) : first(slots) {
    auto pair = static_cast<int>(row / kPairRows);
    int i = 0;
    for (; pair >= schedule.forms[i].count * schedule.forms[i].pairs; ++i) {
      const Sweeps& form = schedule.forms[i];
      pair -= form.count * form.pairs;
      first += int64_t{form.count} * form.partials();
    }
    const Sweeps& form = schedule.forms[i];
    stride = int64_t{form.pairs} * kPairRows;
    count = form.columns * kLanes;
    first += pair / form.pairs * count * stride + pair % form.pairs * kPairRows + row % kPairRows;
  }
  __device__ const T& operator[](int i) const { return first[i * stride]; }
};

__device__ void add(const Slots<float>& slots, float& sum) {
  for (int i = 0; i < slots.count; ++i) sum += slots[i];
}
__device__ void add(const Slots<Partial>& slots, Partial& sum) {
  float top = sum.largest;
  for (int i = 0; i < slots.count; ++i) top = fmaxf(top, slots[i].largest);
  const float base = top == -INFINITY ? 0 : top;
  float all = sum.sum * exp2f(sum.largest - base);
  for (int i = 0; i < slots.count; ++i) all += slots[i].sum * exp2f(slots[i].largest - base);
  sum = {top, all};
}
__device__ void add(const Slots<AnchoredSum>& slots, AnchoredSum& sum) {
  for (int i = 0; i < slots.count; ++i) {
    const AnchoredSum& slot = slots[i];
    sum = {fmaxf(sum.largest, slot.largest), sum.sum + slot.sum, sum.rounding + slot.rounding};
  }
}

template <class T>
__global__ void add_slots_of(const __grid_constant__ Schedule schedule, int64_t rows,
                             const T* slots, T* sums, const int* only) {
  const int64_t row = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (row >= rows || (only != nullptr && only[row / kPairRows] == 0)) return;
  T sum = sums[row];
  add(Slots<T>(schedule, row, slots), sum);
  sums[row] = sum;
}
template <class T>
cudaError_t launch_add_slots(const Logits& logits, const T* slots, T* sums, const int* only,
                             cudaStream_t stream) {
  add_slots_of<<<blocks_of(logits.rows, kThreads), kThreads, 0, stream>>>(
      logits.schedule, logits.rows, slots, sums, only);
  return cudaGetLastError();
}

// `base` and the target's logit y2 in powers of two. log1p keeps a loss near 0, as the reference
// does; the difference of logarithms cannot overflow.
__device__ void finish_row(float base, float sum, float y2, float* lse, float* nll) {
  const float top = fmaxf(base, y2), others = sum == 0 ? 0 : sum * exp2f(base - top);
  const float hit = exp2f(y2 - top), below = (y2 - top) / kLog2e, total = logf(hit + others);
  *lse = top / kLog2e + total;
  *nll = below > -10 ? log1pf(others / hit) : total - below;
}

__global__ void finish_partial(int64_t rows, const Partial* sums, const float* target_logit,
                               float* lse, float* nll) {
  const int64_t row = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  finish_row(sums[row].largest, sums[row].sum, target_logit[row] * kLog2e, lse + row, nll + row);
}
__global__ void finish_anchored(int64_t rows, const float* anchor, const AnchoredSum* sums,
                                const float* target_logit, float* lse, float* nll) {
  const int64_t row = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  finish_row(anchor[row], sums[row].sum, target_logit[row] * kLog2e, lse + row, nll + row);
}

// A block a pair of tiles.
__global__ void find_overflow_of(int64_t rows, float* anchor, AnchoredSum* sums,
                                 const float* target_logit, int* again) {
  const int64_t row = int64_t{blockIdx.x} * kPairRows + threadIdx.x;
  bool bad = false;
  float top = 0;
  if (row < rows && anchor[row] < INFINITY) {
    const float y2 = target_logit[row] * kLog2e;
    bad = !(sums[row].sum < exp2f(kLargestPower)) || y2 - anchor[row] > kLargestPower;
    top = fmaxf(sums[row].largest, y2);
  }
  const int any = __syncthreads_or(bad);
  if (threadIdx.x == 0) again[blockIdx.x] = any;
  if (any == 0 || row >= rows) return;
  sums[row] = {-INFINITY, 0, 0};
  if (bad) anchor[row] = top;
}

__device__ float to_float(float x) { return x; }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ void assign(float& to, float x) { to = x; }
__device__ void assign(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }

// So many neighbours in one access.
template <class T, int count>
struct alignas(count * sizeof(T)) Pack {
  T of[count];
};

// A block a row.
template <int width>
__global__ void scale_rows_of(const __grid_constant__ Logits p, const __grid_constant__ Scaling s,
                              const __grid_constant__ Exponentials e, __nv_bfloat16* scaled,
                              float* scale, float* entry) {
  const int64_t row = blockIdx.x;
  const float factor = s.factor[row];
  const float hit = exp2f(s.target_logit[row] * kLog2e - s.anchor[row]);
  const float total = s.sums[row].sum + hit;
  const float by = factor == 0 ? 0 : factor / total;
  if (threadIdx.x == 0) {
    const int target = p.target[row];
    const float at_target = factor == 0 ? 0 : s.at_target[row] * total / factor;
    if (target >= 0) {
      auto* out = static_cast<__nv_bfloat16*>(e.out);
      out[row * e.out_stride + target] = __float2bfloat16_rn(at_target);
    }
    scale[row] = by;
    entry[row] = factor == 0 ? 0 : at_target - s.sums[row].rounding;
  }
  using Wide = Pack<__nv_bfloat16, width>;
  const auto* x = static_cast<const __nv_bfloat16*>(p.hidden) + row * p.hidden_stride;
  for (int64_t i = threadIdx.x * width; i < p.dim; i += blockDim.x * width) {
    Wide pack = *reinterpret_cast<const Wide*>(x + i);
    for (auto& value : pack.of) value = __float2bfloat16_rn(__bfloat162float(value) * by);
    *reinterpret_cast<Wide*>(scaled + row * p.dim + i) = pack;
  }
}

// A block a row.
template <class Weight, class Out, int width>
__global__ void finish_hidden_of(int64_t dim, const __grid_constant__ HiddenGradient g) {
  const int64_t row = blockIdx.x;
  const float by = g.scale == nullptr ? 1 : g.scale[row];
  const int target = g.target[row];
  const float entry = target < 0 ? 0 : g.entry[row];
  const auto* c = static_cast<const Weight*>(g.weight) + max(target, 0) * g.weight_stride;
  for (int64_t i = threadIdx.x * width; i < dim; i += blockDim.x * width) {
    const auto sum = *reinterpret_cast<const Pack<float, width>*>(g.sum + row * g.sum_stride + i);
    const auto weight = *reinterpret_cast<const Pack<Weight, width>*>(c + i);
    Pack<Out, width> out;
    for (int j = 0; j < width; ++j) {
      assign(out.of[j], by * fmaf(entry, to_float(weight.of[j]), sum.of[j]));
    }
    *reinterpret_cast<Pack<Out, width>*>(static_cast<Out*>(g.out) + row * dim + i) = out;
  }
}

template <class T>
__global__ void scale_in_place_of(T* x, int64_t count, const float* factor) {
  const float by = *factor;
  if (by == 1) return;
  constexpr int width = 16 / sizeof(T);
  using Wide = Pack<T, width>;
  const int64_t first = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t step = int64_t{gridDim.x} * blockDim.x, wide = count / width;
  for (int64_t i = first; i < wide; i += step) {
    Wide pack = reinterpret_cast<const Wide*>(x)[i];
    for (auto& value : pack.of) assign(value, to_float(value) * by);
    reinterpret_cast<Wide*>(x)[i] = pack;
  }
  for (int64_t i = wide * width + first; i < count; i += step) assign(x[i], to_float(x[i]) * by);
}

bool divides(int64_t width, std::initializer_list<int64_t> all) {
  for (const auto n : all) {
    if (n % width != 0) return false;
  }
  return true;
}

template <class Weight, class Out>
void launch_finish_hidden(int64_t rows, int64_t dim, const HiddenGradient& g, cudaStream_t stream) {
  constexpr int width = 4;
  const auto places = reinterpret_cast<uintptr_t>(g.sum) | reinterpret_cast<uintptr_t>(g.weight) |
                      reinterpret_cast<uintptr_t>(g.out);
  const bool wide = divides(width, {dim, g.sum_stride, g.weight_stride}) && places % 16 == 0;
  const auto blocks = static_cast<unsigned>(rows);
  if (wide) {
    finish_hidden_of<Weight, Out, width><<<blocks, kThreads, 0, stream>>>(dim, g);
  } else {
    finish_hidden_of<Weight, Out, 1><<<blocks, kThreads, 0, stream>>>(dim, g);
  }
}

template <class T>
void launch_scale_in_place(void* x, int64_t count, const float* factor, cudaStream_t stream) {
  constexpr int64_t kMost = 8 * 132;
  const auto blocks = blocks_of(count, kThreads * 16 / sizeof(T));
  scale_in_place_of<<<static_cast<unsigned>(std::min<int64_t>(blocks, kMost)), kThreads, 0,
                      stream>>>(static_cast<T*>(x), count, factor);
}

}  // namespace

cudaError_t add_slots(const Logits& logits, const Partial* slots, Partial* sums, const int* only,
                      cudaStream_t stream) {
  return launch_add_slots(logits, slots, sums, only, stream);
}
cudaError_t add_slots(const Logits& logits, const float* slots, float* sums, const int* only,
                      cudaStream_t stream) {
  return launch_add_slots(logits, slots, sums, only, stream);
}
cudaError_t add_slots(const Logits& logits, const AnchoredSum* slots, AnchoredSum* sums,
                      const int* only, cudaStream_t stream) {
  return launch_add_slots(logits, slots, sums, only, stream);
}

cudaError_t finish_rows(int64_t rows, const Partial* sums, const float* target_logit, float* lse,
                        float* nll, cudaStream_t stream) {
  finish_partial<<<blocks_of(rows, kThreads), kThreads, 0, stream>>>(rows, sums, target_logit, lse,
                                                                     nll);
  return cudaGetLastError();
}
cudaError_t finish_rows(int64_t rows, const float* anchor, const AnchoredSum* sums,
                        const float* target_logit, float* lse, float* nll, cudaStream_t stream) {
  finish_anchored<<<blocks_of(rows, kThreads), kThreads, 0, stream>>>(rows, anchor, sums,
                                                                      target_logit, lse, nll);
  return cudaGetLastError();
}

cudaError_t find_overflow(int64_t rows, float* anchor, AnchoredSum* sums, const float* target_logit,
                          int* again, cudaStream_t stream) {
  find_overflow_of<<<blocks_of(rows, kPairRows), kPairRows, 0, stream>>>(rows, anchor, sums,
                                                                         target_logit, again);
  return cudaGetLastError();
}

cudaError_t scale_rows(const Logits& logits, const Scaling& scaling, const Exponentials& e,
                       void* scaled, float* scale, float* entry, cudaStream_t stream) {
  // Rows of what the copy engine reads: 8 elements fit.
  scale_rows_of<8><<<static_cast<unsigned>(logits.rows), kThreads, 0, stream>>>(
      logits, scaling, e, static_cast<__nv_bfloat16*>(scaled), scale, entry);
  return cudaGetLastError();
}

cudaError_t finish_hidden(int64_t rows, int64_t dim, const HiddenGradient& gradient,
                          cudaStream_t stream) {
  using bf16 = __nv_bfloat16;
  const auto launch = gradient.weight_is_fp32 ? gradient.out_is_fp32
                                                    ? launch_finish_hidden<float, float>
                                                    : launch_finish_hidden<float, bf16>
                      : gradient.out_is_fp32 ? launch_finish_hidden<bf16, float>
                                              : launch_finish_hidden<bf16, bf16>;
  launch(rows, dim, gradient, stream);
  return cudaGetLastError();
}

cudaError_t scale_in_place(void* x, bool is_fp32, int64_t count, const float* factor,
                           cudaStream_t stream) {
  if (is_fp32) {
    launch_scale_in_place<float>(x, count, factor, stream);
  } else {
    launch_scale_in_place<__nv_bfloat16>(x, count, factor, stream);
  }
  return cudaGetLastError();
}

}  // namespace ounce::cce
