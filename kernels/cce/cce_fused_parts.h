// SPDX-License-Identifier: MIT
// What both ways to the gradients share; included by cce_fused_cuda.cpp and cce_early_cuda.cpp
// alone.
#pragma once

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <ounce/kernels/cce/cce_fused.h>
#include <ounce/kernels/cce/cce_rows.h>

#include <string>
#include <vector>

namespace ounce::fused {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kAlignment = 8;                  // elements, of what the copy engine reads
constexpr int64_t kSlabBytes = int64_t{64} << 20;  // of a weight that has to be copied

inline int64_t aligned(int64_t n) { return (n + kAlignment - 1) / kAlignment * kAlignment; }

inline bool is_aligned(const Tensor& t) {
  return t.stride(1) == 1 && t.stride(0) % kAlignment == 0 && t.stride(0) >= t.size(1) &&
         reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

inline int clusters() {
  static const auto counts = [] {
    std::vector<int> all(c10::cuda::device_count());
    for (size_t i = 0; i < all.size(); ++i) {
      const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(i));
      all[i] = cce::clusters_of_device();
    }
    return all;
  }();
  return counts[c10::cuda::current_device()];
}

// x [rows, D] as a matrix of 16 bits that the copy engine reads: itself, or a copy with zeros
// behind D.
inline Tensor operand(const Tensor& x, at::ScalarType type) {
  const auto dim = x.size(1), padding = aligned(dim) - dim;
  if (padding > 0) return at::constant_pad_nd(x.to(type), {0, padding});
  if (x.scalar_type() == type && is_aligned(x)) return x;
  return x.to(x.options().dtype(type), /*non_blocking=*/false, /*copy=*/true,
              at::MemoryFormat::Contiguous);
}

// The classifier, all of it or in slabs of copies.
class Slabs {
 public:
  Slabs(const Tensor& weight, const OptionalTensor& bias, at::ScalarType type, int64_t entries)
      : weight_(weight), type_(type), entries_(entries) {
    if (bias) bias_ = bias->to(at::kFloat).contiguous();
    const bool copies = weight.scalar_type() != type || !is_aligned(weight) ||
                        aligned(weight.size(1)) != weight.size(1);
    const int64_t most = kSlabBytes / (2 * std::max<int64_t>(1, aligned(weight.size(1))));
    constexpr int64_t tiles = 2 * cce::kTileColumns;  // whole tiles of a filter too
    if (copies) entries_ = std::min(entries_, std::max(tiles, most / tiles * tiles));
  }

  // f(first entry, slab [S, D'], its bias or null)
  template <class F>
  void each(const F& f) const {
    for (int64_t from = 0; from < weight_.size(0); from += entries_) {
      const auto slab =
          operand(weight_.narrow(0, from, std::min(entries_, weight_.size(0) - from)), type_);
      f(from, slab, bias_.defined() ? bias_.const_data_ptr<float>() + from : nullptr);
    }
  }
  int64_t entries() const { return std::min(entries_, weight_.size(0)); }

 private:
  const Tensor weight_;
  Tensor bias_;
  at::ScalarType type_;
  int64_t entries_;
};

inline int64_t cache_bytes() { return at::cuda::getCurrentDeviceProperties()->l2CacheSize; }

inline cce::Schedule schedule(int64_t rows, int64_t vocab, int64_t dim) {
  return cce::schedule(rows, vocab, dim, clusters(), cache_bytes());
}

// `target` [N] int32 counts from the slab's first entry; may be undefined.
inline cce::Logits logits_of(const Tensor& x, const Tensor& slab, const float* bias,
                             const Tensor& target, const LinearCrossEntropyOptions& o) {
  return {.hidden = x.const_data_ptr(),
          .weight = slab.const_data_ptr(),
          .is_half = x.scalar_type() == at::kHalf,
          .rows = x.size(0),
          .vocab = slab.size(0),
          .dim = x.size(1),
          .hidden_stride = x.stride(0),
          .weight_stride = slab.stride(0),
          .bias = bias,
          .scale = static_cast<float>(o.logit_scale()),
          .softcap = static_cast<float>(o.softcap()),
          .target = target.defined() ? target.const_data_ptr<int>() : nullptr,
          .schedule = schedule(x.size(0), slab.size(0), x.size(1))};
}

// x [rows, D] as operand() gives it, 0 in rows that do not count: 0 * NaN of such a row would reach
// the weight's gradient.
inline Tensor counted_rows(const Tensor& hidden, const reference::Tokens& tokens) {
  const auto x = hidden.stride(1) == 1 ? hidden : hidden.contiguous();
  auto out = at::empty({x.size(0), aligned(x.size(1))}, x.options());
  C10_CUDA_CHECK(cce::copy_counted(x.size(0), x.size(1), x.const_data_ptr(), x.stride(0),
                                   tokens.counted.const_data_ptr<bool>(), out.data_ptr(),
                                   out.size(1), c10::cuda::getCurrentCUDAStream()));
  return out;
}

// out [M, N] = a b, or + a b; bf16 operands, fp32 or bf16 result, summed in fp32.
inline void multiply(Tensor out, const Tensor& a, const Tensor& b, bool add) {
  const bool fp32 = out.scalar_type() == at::kFloat;
  if (add) {
    fp32 ? at::addmm_out(out, out, a, b, at::kFloat) : at::addmm_out(out, out, a, b);
  } else {
    fp32 ? at::mm_out(out, a, b, at::kFloat) : at::mm_out(out, a, b);
  }
}

// What keeps a call from the fused path whatever its sizes, of the tensor and of the options alone;
// "" = nothing.
inline std::string refusal_of(const Tensor& hidden) {
  if (!hidden.is_cuda()) return c10::str("tensors on ", hidden.device());
  const c10::cuda::CUDAGuard guard(hidden.device());
  if (clusters() == 0) return "a GPU that is not of the Hopper generation";
  const auto type = hidden.scalar_type();
  return type == at::kBFloat16 || type == at::kHalf ? "" : c10::str("hidden in ", type);
}

// class_sum: a scalar, or undefined = V.
inline cce::RowLoss row_loss(const reference::Tokens& tokens, int64_t vocab,
                             const Tensor& class_sum, const LinearCrossEntropyOptions& o) {
  return {.counted = tokens.counted.const_data_ptr<bool>(),
          .weight = tokens.weight.const_data_ptr<float>(),
          .hit_weight = tokens.hit_weight.const_data_ptr<float>(),
          .smoothing = static_cast<float>(o.label_smoothing()),
          .z_loss = static_cast<float>(o.z_loss()),
          .softcap = static_cast<float>(o.softcap()),
          .logit_scale = static_cast<float>(o.logit_scale()),
          .vocab = static_cast<float>(vocab),
          .class_sum = class_sum.defined() ? class_sum.const_data_ptr<float>() : nullptr};
}

inline const float* floats_of(const Tensor& t) {
  return t.defined() ? t.const_data_ptr<float>() : nullptr;
}

// They outlive the call's kernels.
inline cce::RowUpstream row_upstream(const Upstream& u) {
  const auto stride = [](const Tensor& t) {
    return !t.defined() || t.numel() == 1 ? 0 : t.stride(0);
  };
  return {.loss = floats_of(u.loss),
          .loss_stride = stride(u.loss),
          .lse = floats_of(u.lse),
          .lse_stride = stride(u.lse),
          .entropy = floats_of(u.entropy),
          .entropy_stride = stride(u.entropy)};
}

// Empty outputs of forward, to be written by finish_rows.
inline reference::ForwardRows empty_outputs(int64_t rows, const at::TensorOptions& fp32,
                                            const LinearCrossEntropyOptions& o) {
  const auto of_rows = [&](bool full, at::ScalarType type) {
    return at::empty({full ? rows : 0}, fp32.dtype(type));
  };
  return {.loss = of_rows(true, at::kFloat),
          .lse = of_rows(true, at::kFloat),
          .z_loss = of_rows(true, at::kFloat),
          .nll = of_rows(true, at::kFloat),
          .correct = of_rows(o.return_correct(), at::kBool),
          .entropy = of_rows(o.return_entropy(), at::kFloat),
          .dropped_mass = of_rows(o.grad_mode() != GradMode::kExact, at::kFloat)};
}
// Those of the rows from `from` on.
inline cce::RowOutputs row_outputs(const reference::ForwardRows& out, int64_t from) {
  const auto place = [&](const Tensor& t) { return t.data_ptr<float>() + from; };
  return {.lse = place(out.lse),
          .nll = place(out.nll),
          .loss = place(out.loss),
          .z_loss = place(out.z_loss),
          .entropy = out.entropy.numel() > 0 ? place(out.entropy) : nullptr,
          .correct = out.correct.numel() > 0 ? out.correct.data_ptr<bool>() + from : nullptr};
}

inline cce::Type type_of(const Tensor& t) {
  if (t.scalar_type() == at::kFloat) return cce::Type::kFloat;
  return t.scalar_type() == at::kHalf ? cce::Type::kHalf : cce::Type::kBf16;
}

// out [N, D] of 16 bits or fp32 = scale (sum + entry C_y); scale may be undefined. sum [N, >= D]
// fp32, which may be out.
inline void finish_hidden(Tensor out, const Tensor& sum, const Tensor& scale, const Tensor& entry,
                          const Tensor& weight, const Tensor& target) {
  const auto rows = sum.size(0), dim = weight.size(1);
  C10_CUDA_CHECK(cce::finish_hidden(rows, dim,
                                    {.sum = sum.const_data_ptr<float>(),
                                     .sum_stride = sum.stride(0),
                                     .scale = floats_of(scale),
                                     .entry = entry.const_data_ptr<float>(),
                                     .weight = weight.const_data_ptr(),
                                     .weight_type = type_of(weight),
                                     .weight_stride = weight.stride(0),
                                     .weight_column_stride = weight.stride(1),
                                     .target = target.const_data_ptr<int>(),
                                     .out = out.data_ptr(),
                                     .out_type = type_of(out)},
                                    c10::cuda::getCurrentCUDAStream()));
}

}  // namespace ounce::fused
