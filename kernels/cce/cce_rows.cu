// SPDX-License-Identifier: MIT
#include <cuda_runtime.h>
#include <ounce/kernels/cce/cce_rows.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <initializer_list>

namespace ounce::cce {
namespace {

constexpr int kThreads = 128;
// Sums up to here, and products of them with a classifier, are far from the end of fp32.
constexpr float kLargestPower = 80;

unsigned blocks_of(int64_t count, int64_t each) {
  return static_cast<unsigned>((count + each - 1) / each);
}

__device__ int64_t row_of_thread() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }

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
// Moments relative to another largest logit.
__device__ float product_from(const Moments& m, float base) {
  if (m.sum == 0) return 0;
  const float distance = m.largest - base;
  return exp2f(distance) * (m.product + distance * m.sum);
}
__device__ void add(const Slots<Moments>& slots, Moments& sum) {
  float largest = sum.largest;
  for (int i = 0; i < slots.count; ++i) largest = fmaxf(largest, slots[i].largest);
  const float base = largest == -INFINITY ? 0 : largest;
  Moments all = {
      largest,   sum.sum * exp2f(sum.largest - base), product_from(sum, base), sum.linear, sum.top,
      sum.before};
  for (int i = 0; i < slots.count; ++i) {
    const Moments& slot = slots[i];
    all.sum += slot.sum * exp2f(slot.largest - base);
    all.product += product_from(slot, base);
    all.linear += slot.linear;
    all.top = fmaxf(all.top, slot.top);
    all.before = fmaxf(all.before, slot.before);
  }
  sum = all;
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
  const int64_t row = row_of_thread();
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

__global__ void describe_tokens_of(int64_t rows, const __grid_constant__ TargetRows in,
                                   const __grid_constant__ TokenRows out) {
  const int64_t row = row_of_thread();
  if (row >= rows) return;
  const int64_t target = in.is_int64 ? static_cast<const int64_t*>(in.target)[row]
                                     : static_cast<const int*>(in.target)[row];
  const bool counted = target != in.ignore_index, known = target >= 0 && target < in.vocab;
  const bool found = counted && known;
  out.place[row] = found ? static_cast<int>(target) : -1;
  out.counted[row] = counted;
  const float weight = in.token_weight == nullptr ? 1 : in.token_weight[row];
  out.weight[row] = !counted ? 0 : known ? weight : NAN;
  out.hit_weight[row] = in.class_weight == nullptr ? 1 : in.class_weight[found ? target : 0];
}

constexpr int kSumThreads = 1024;

// One block, in a fixed order.
__global__ void sum_weights(int64_t rows, const __grid_constant__ TokenRows tokens) {
  __shared__ float parts[kSumThreads];
  float sum = 0;
  for (int64_t row = threadIdx.x; row < rows; row += kSumThreads) {
    sum += tokens.weight[row] * tokens.hit_weight[row];
  }
  parts[threadIdx.x] = sum;
  for (int step = kSumThreads / 2; step > 0; step /= 2) {
    __syncthreads();
    if (threadIdx.x < step) parts[threadIdx.x] += parts[threadIdx.x + step];
  }
  if (threadIdx.x == 0) *tokens.denominator = parts[0] == 0 ? 1 : parts[0];
}

// `base` and the target's logit y2 in powers of two. log1p keeps a loss near 0, as the reference
// does; the difference of logarithms cannot overflow.
__device__ void finish_row(int64_t row, const RowLoss& l, float base, float sum, float y2,
                           const RowOutputs& out) {
  const float top = fmaxf(base, y2), others = sum == 0 ? 0 : sum * exp2f(base - top);
  const float hit = exp2f(y2 - top), below = (y2 - top) / kLog2e, total = logf(hit + others);
  const bool counted = l.counted[row];
  const float lse = counted ? top / kLog2e + total : 0;
  const float nll = !counted ? 0 : below > -10 ? log1pf(others / hit) : total - below;
  const float weight = counted ? l.weight[row] : 0, square = l.z_loss * lse * lse;
  out.lse[row] = lse;
  out.nll[row] = nll;
  out.z_loss[row] = counted ? square * weight : 0;
  out.loss[row] = counted ? (nll * l.hit_weight[row] * (1 - l.smoothing) + square) * weight : 0;
}

// After that. `y`: the target's logit.
__device__ void finish_moments(int64_t row, const RowLoss& l, const Moments& m, float y,
                               const RowOutputs& out) {
  const bool counted = l.counted[row];
  if (out.correct != nullptr) out.correct[row] = counted && y > m.before && y >= m.top;
  if (out.entropy != nullptr) {
    const float y2 = y * kLog2e, top = fmaxf(m.largest, y2);
    const float others = m.sum == 0 ? 0 : m.sum * exp2f(m.largest - top), hit = exp2f(y2 - top);
    const float product = product_from(m, top) + (hit == 0 ? 0 : hit * (y2 - top));
    const float entropy = logf(hit + others) - product / ((hit + others) * kLog2e);
    out.entropy[row] = counted ? entropy : 0;
  }
  if (l.smoothing > 0 && counted) {
    const float mass = l.class_sum == nullptr ? 1 : *l.class_sum / l.vocab;
    out.loss[row] += l.weight[row] * l.smoothing * (mass * out.lse[row] - m.linear / l.vocab);
  }
}

__global__ void finish_partial(int64_t rows, const __grid_constant__ RowLoss loss,
                               const Partial* sums, const float* target_logit,
                               const __grid_constant__ RowOutputs out) {
  const int64_t row = row_of_thread();
  if (row >= rows) return;
  finish_row(row, loss, sums[row].largest, sums[row].sum, target_logit[row] * kLog2e, out);
}
__global__ void finish_with_moments(int64_t rows, const __grid_constant__ RowLoss loss,
                                    const Moments* sums, const float* target_logit,
                                    const __grid_constant__ RowOutputs out) {
  const int64_t row = row_of_thread();
  if (row >= rows) return;
  const float y = target_logit[row];
  finish_row(row, loss, sums[row].largest, sums[row].sum, y * kLog2e, out);
  finish_moments(row, loss, sums[row], y, out);
}
__global__ void finish_anchored(int64_t rows, const __grid_constant__ RowLoss loss,
                                const float* anchor, const AnchoredSum* sums,
                                const float* target_logit, const __grid_constant__ RowOutputs out) {
  const int64_t row = row_of_thread();
  if (row >= rows) return;
  finish_row(row, loss, anchor[row], sums[row].sum, target_logit[row] * kLog2e, out);
}

struct RowGradient {
  float factor = 0, log_factor = 0, at_target = 0, flat = 0, size = 0;
};
__device__ RowGradient gradient_of(int64_t row, const RowLoss& l, const RowUpstream& u,
                                   const RowResults& r) {
  if (!l.counted[row]) return {};
  const float lse = r.lse[row], nll = r.nll[row], hit = expf(-nll);
  const float loss = u.loss[row * u.loss_stride] * l.weight[row] * l.logit_scale;
  const float of_lse = u.lse == nullptr ? 0 : u.lse[row * u.lse_stride] * l.logit_scale;
  const float sharp = loss * l.hit_weight[row] * (1 - l.smoothing);
  const float mass = l.class_sum == nullptr ? 1 : *l.class_sum / l.vocab;
  const float spread = loss * (2 * l.z_loss * lse + l.smoothing * mass) + of_lse;
  RowGradient g;
  g.flat = loss * l.smoothing / l.vocab;
  g.factor = sharp + spread;
  // spread p - sharp (1 - p) without cancellation
  g.at_target = spread * hit + sharp * expm1f(-nll) - g.flat * l.hit_weight[row];
  g.size = fabsf(sharp) + fabsf(spread) + fabsf(loss * l.smoothing * mass);
  if (u.entropy != nullptr) {
    // -p (log p + H)
    const float of_entropy = u.entropy[row * u.entropy_stride] * l.logit_scale;
    const float entropy = r.entropy[row];
    g.factor -= of_entropy * entropy;
    g.log_factor = -of_entropy / kLog2e;
    if (hit > 0) g.at_target += of_entropy * hit * (nll - entropy);
    g.size += fabsf(of_entropy) * (1 + entropy);
  }
  if (l.softcap > 0) {
    const float share = (lse - nll) / l.softcap;
    g.at_target *= 1 - share * share;
  }
  return g;
}

// A base that no logit is near: exponentials 0, and finite whatever they are multiplied with.
constexpr float kFarBase = 1e15f;
constexpr float kLargestHalf = 16384;

__global__ void upstream_of(int64_t rows, const __grid_constant__ RowLoss loss,
                            const __grid_constant__ RowUpstream upstream,
                            const __grid_constant__ RowResults results, RowFactors* factors,
                            float* at_target, float* scale) {
  const int64_t row = row_of_thread();
  if (row >= rows) return;
  const auto g = gradient_of(row, loss, upstream, results);
  float by = 1;
  if (scale != nullptr) {
    by = g.size == 0 ? 0 : kLargestHalf / g.size;
    scale[row] = g.size / kLargestHalf;
  }
  const float base = loss.counted[row] ? results.lse[row] * kLog2e : kFarBase;
  factors[row] = {base, g.factor * by, g.log_factor * by, g.flat * by};
  at_target[row] = g.at_target * by;
}

__global__ void start_rows_of(int64_t rows, Partial* sums, AnchoredSum* anchored,
                              float* target_logit) {
  const int64_t row = row_of_thread();
  if (row >= rows) return;
  sums[row] = {-INFINITY, 0};
  if (anchored != nullptr) anchored[row] = {-INFINITY, 0, 0};
  target_logit[row] = -INFINITY;
}

__global__ void start_moments_of(int64_t rows, Moments* sums, float* target_logit) {
  const int64_t row = row_of_thread();
  if (row >= rows) return;
  sums[row] = {-INFINITY, 0, 0, 0, -INFINITY, -INFINITY};
  target_logit[row] = -INFINITY;
}

__global__ void anchors_of(int64_t rows, const Partial* sums, const bool* counted, float* anchor) {
  const int64_t row = row_of_thread();
  if (row < rows) anchor[row] = counted[row] ? sums[row].largest : INFINITY;
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
__device__ float to_float(__half x) { return __half2float(x); }
__device__ void assign(float& to, float x) { to = x; }
__device__ void assign(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }
__device__ void assign(__half& to, float x) { to = __float2half_rn(x); }

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
  const auto gradient = gradient_of(row, s.loss, s.upstream, s.results);
  // One that the target's entry would overflow with: the row's other entries are next to nothing.
  const float least = 1e-6f * fabsf(gradient.at_target);
  const float factor = fabsf(gradient.factor) < least ? least : gradient.factor;
  const float hit = exp2f(s.target_logit[row] * kLog2e - e.anchor[row]);
  const float total = s.sums[row].sum + hit;
  const float by = factor == 0 ? 0 : factor / total;
  if (threadIdx.x == 0) {
    const int target = p.target[row];
    const float at_target = factor == 0 ? 0 : gradient.at_target * total / factor;
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
template <int width>
__global__ void copy_counted_of(int64_t dim, const __nv_bfloat16* x, int64_t stride,
                                const bool* counted, __nv_bfloat16* out, int64_t out_dim) {
  using Wide = Pack<__nv_bfloat16, width>;
  const int64_t row = blockIdx.x;
  const bool kept = counted[row];
  for (int64_t i = threadIdx.x * width; i < out_dim; i += blockDim.x * width) {
    Wide pack{};
    if (kept && i < dim) pack = *reinterpret_cast<const Wide*>(x + row * stride + i);
    *reinterpret_cast<Wide*>(out + row * out_dim + i) = pack;
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
    const auto weight =
        *reinterpret_cast<const Pack<Weight, width>*>(c + i * g.weight_column_stride);
    Pack<Out, width> out;
    for (int j = 0; j < width; ++j) {
      assign(out.of[j], by * fmaf(entry, to_float(weight.of[j]), sum.of[j]));
    }
    *reinterpret_cast<Pack<Out, width>*>(static_cast<Out*>(g.out) + row * dim + i) = out;
  }
}

// `out` may be x.
template <class From, class To>
__global__ void scale_of(const From* x, int64_t count, const float* factor, To* out) {
  const float by = *factor;
  if (by == 1 && static_cast<const void*>(x) == out) return;
  constexpr int width = 16 / (sizeof(From) > sizeof(To) ? sizeof(From) : sizeof(To));
  const int64_t first = row_of_thread();
  const int64_t step = int64_t{gridDim.x} * blockDim.x, wide = count / width;
  for (int64_t i = first; i < wide; i += step) {
    const auto pack = reinterpret_cast<const Pack<From, width>*>(x)[i];
    Pack<To, width> scaled;
    for (int j = 0; j < width; ++j) assign(scaled.of[j], to_float(pack.of[j]) * by);
    reinterpret_cast<Pack<To, width>*>(out)[i] = scaled;
  }
  for (int64_t i = wide * width + first; i < count; i += step) assign(out[i], to_float(x[i]) * by);
}

bool divides(int64_t width, std::initializer_list<int64_t> all) {
  for (const auto n : all) {
    if (n % width != 0) return false;
  }
  return true;
}

// f(a value of that type)
template <class F>
void with_type(Type type, const F& f) {
  switch (type) {
    case Type::kBf16:
      return f(__nv_bfloat16());
    case Type::kHalf:
      return f(__half());
    default:
      return f(0.f);
  }
}

template <class Weight, class Out>
void launch_finish_hidden(int64_t rows, int64_t dim, const HiddenGradient& g, cudaStream_t stream) {
  constexpr int width = 4;
  const auto places = reinterpret_cast<uintptr_t>(g.sum) | reinterpret_cast<uintptr_t>(g.weight) |
                      reinterpret_cast<uintptr_t>(g.out);
  const bool wide = g.weight_column_stride == 1 &&
                    divides(width, {dim, g.sum_stride, g.weight_stride}) && places % 16 == 0;
  const auto blocks = static_cast<unsigned>(rows);
  if (wide) {
    finish_hidden_of<Weight, Out, width><<<blocks, kThreads, 0, stream>>>(dim, g);
  } else {
    finish_hidden_of<Weight, Out, 1><<<blocks, kThreads, 0, stream>>>(dim, g);
  }
}

template <class From, class To>
cudaError_t launch_scale(const void* x, int64_t count, const float* factor, void* out,
                         cudaStream_t stream) {
  constexpr unsigned kMost = 2048;  // blocks: enough to fill the GPU
  const auto blocks = std::clamp(blocks_of(count, kThreads * 4), 1u, kMost);
  scale_of<<<blocks, kThreads, 0, stream>>>(static_cast<const From*>(x), count, factor,
                                            static_cast<To*>(out));
  return cudaGetLastError();
}

}  // namespace

cudaError_t add_slots(const Logits& logits, const Partial* slots, Partial* sums, const int* only,
                      cudaStream_t stream) {
  return launch_add_slots(logits, slots, sums, only, stream);
}
cudaError_t add_slots(const Logits& logits, const Moments* slots, Moments* sums, const int* only,
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

cudaError_t describe_tokens(int64_t rows, const TargetRows& targets, const TokenRows& tokens,
                            cudaStream_t stream) {
  describe_tokens_of<<<blocks_of(rows, kThreads), kThreads, 0, stream>>>(rows, targets, tokens);
  sum_weights<<<1, kSumThreads, 0, stream>>>(rows, tokens);
  return cudaGetLastError();
}

cudaError_t copy_counted(int64_t rows, int64_t dim, const void* x, int64_t stride,
                         const bool* counted, void* out, int64_t out_dim, cudaStream_t stream) {
  const bool wide = divides(8, {dim, stride}) && reinterpret_cast<uintptr_t>(x) % 16 == 0;
  const auto launch = wide ? copy_counted_of<8> : copy_counted_of<1>;
  launch<<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(
      dim, static_cast<const __nv_bfloat16*>(x), stride, counted, static_cast<__nv_bfloat16*>(out),
      out_dim);
  return cudaGetLastError();
}

cudaError_t finish_rows(int64_t rows, const RowLoss& loss, const Partial* sums,
                        const float* target_logit, const RowOutputs& out, cudaStream_t stream) {
  finish_partial<<<blocks_of(rows, kThreads), kThreads, 0, stream>>>(rows, loss, sums, target_logit,
                                                                     out);
  return cudaGetLastError();
}
cudaError_t finish_rows(int64_t rows, const RowLoss& loss, const Moments* sums,
                        const float* target_logit, const RowOutputs& out, cudaStream_t stream) {
  finish_with_moments<<<blocks_of(rows, kThreads), kThreads, 0, stream>>>(rows, loss, sums,
                                                                          target_logit, out);
  return cudaGetLastError();
}
cudaError_t finish_rows(int64_t rows, const RowLoss& loss, const float* anchor,
                        const AnchoredSum* sums, const float* target_logit, const RowOutputs& out,
                        cudaStream_t stream) {
  finish_anchored<<<blocks_of(rows, kThreads), kThreads, 0, stream>>>(rows, loss, anchor, sums,
                                                                      target_logit, out);
  return cudaGetLastError();
}

cudaError_t upstream_rows(int64_t rows, const RowLoss& loss, const RowUpstream& upstream,
                          const RowResults& results, RowFactors* factors, float* at_target,
                          float* scale, cudaStream_t stream) {
  upstream_of<<<blocks_of(rows, kThreads), kThreads, 0, stream>>>(rows, loss, upstream, results,
                                                                  factors, at_target, scale);
  return cudaGetLastError();
}

cudaError_t start_rows(int64_t rows, Partial* sums, AnchoredSum* anchored, float* target_logit,
                       cudaStream_t stream) {
  start_rows_of<<<blocks_of(rows, kThreads), kThreads, 0, stream>>>(rows, sums, anchored,
                                                                    target_logit);
  return cudaGetLastError();
}

cudaError_t start_rows(int64_t rows, Moments* sums, float* target_logit, cudaStream_t stream) {
  start_moments_of<<<blocks_of(rows, kThreads), kThreads, 0, stream>>>(rows, sums, target_logit);
  return cudaGetLastError();
}

cudaError_t anchor_rows(int64_t rows, const Partial* sums, const bool* counted, float* anchor,
                        cudaStream_t stream) {
  anchors_of<<<blocks_of(rows, kThreads), kThreads, 0, stream>>>(rows, sums, counted, anchor);
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
  with_type(gradient.weight_type, [&](auto weight) {
    with_type(gradient.out_type, [&](auto out) {
      launch_finish_hidden<decltype(weight), decltype(out)>(rows, dim, gradient, stream);
    });
  });
  return cudaGetLastError();
}

cudaError_t scale_in_place(void* x, bool is_fp32, int64_t count, const float* factor,
                           cudaStream_t stream) {
  return is_fp32 ? launch_scale<float, float>(x, count, factor, x, stream)
                 : launch_scale<__nv_bfloat16, __nv_bfloat16>(x, count, factor, x, stream);
}

cudaError_t scale_to_bf16(const float* x, int64_t count, const float* factor, void* out,
                          cudaStream_t stream) {
  return launch_scale<float, __nv_bfloat16>(x, count, factor, out, stream);
}

}  // namespace ounce::cce
