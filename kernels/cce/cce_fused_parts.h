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

// x [rows, D] as a bf16 matrix that the copy engine reads: itself, or a copy with zeros behind D.
inline Tensor operand(const Tensor& x) {
  const auto dim = x.size(1), padding = aligned(dim) - dim;
  if (padding > 0) return at::constant_pad_nd(x.to(at::kBFloat16), {0, padding});
  if (x.scalar_type() == at::kBFloat16 && is_aligned(x)) return x;
  return x.to(x.options().dtype(at::kBFloat16), /*non_blocking=*/false, /*copy=*/true,
              at::MemoryFormat::Contiguous);
}

// The classifier, all of it or in slabs of copies.
class Slabs {
 public:
  Slabs(const Tensor& weight, const OptionalTensor& bias, int64_t entries)
      : weight_(weight), entries_(entries) {
    if (bias) bias_ = bias->to(at::kFloat).contiguous();
    const bool copies = weight.scalar_type() != at::kBFloat16 || !is_aligned(weight) ||
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
          operand(weight_.narrow(0, from, std::min(entries_, weight_.size(0) - from)));
      f(from, slab, bias_.defined() ? bias_.const_data_ptr<float>() + from : nullptr);
    }
  }
  int64_t entries() const { return std::min(entries_, weight_.size(0)); }

 private:
  const Tensor weight_;
  Tensor bias_;
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
  if (hidden.scalar_type() != at::kBFloat16) return c10::str("hidden in ", hidden.scalar_type());
  return "";
}
inline std::string refusal_of(const LinearCrossEntropyOptions& o) {
  if (o.return_correct()) return "return_correct";
  return o.return_entropy() ? "return_entropy" : "";
}

inline cce::RowLoss row_loss(const reference::Tokens& tokens, int64_t vocab,
                             const LinearCrossEntropyOptions& o) {
  return {.counted = tokens.counted.const_data_ptr<bool>(),
          .weight = tokens.weight.const_data_ptr<float>(),
          .hit_weight = tokens.hit_weight.const_data_ptr<float>(),
          .smoothing = static_cast<float>(o.label_smoothing()),
          .z_loss = static_cast<float>(o.z_loss()),
          .softcap = static_cast<float>(o.softcap()),
          .logit_scale = static_cast<float>(o.logit_scale()),
          .vocab = static_cast<float>(vocab)};
}

// [N] or a scalar of fp32; both outlive the call's kernels.
inline cce::RowUpstream row_upstream(const Tensor& loss, const Tensor& lse) {
  const auto stride = [](const Tensor& t) { return t.numel() == 1 ? 0 : t.stride(0); };
  return {.loss = loss.const_data_ptr<float>(),
          .loss_stride = stride(loss),
          .lse = lse.defined() ? lse.const_data_ptr<float>() : nullptr,
          .lse_stride = lse.defined() ? stride(lse) : 0};
}

// Empty outputs of forward, to be written by finish_rows.
inline reference::ForwardRows empty_outputs(int64_t rows, const at::TensorOptions& fp32) {
  const auto of_rows = [&] { return at::empty({rows}, fp32); };
  return {.loss = of_rows(),
          .lse = of_rows(),
          .z_loss = of_rows(),
          .nll = of_rows(),
          .correct = at::empty({0}, fp32.dtype(at::kBool)),
          .entropy = at::empty({0}, fp32),
          .dropped_mass = at::empty({0}, fp32)};
}
// Those of the rows from `from` on.
inline cce::RowOutputs row_outputs(const reference::ForwardRows& out, int64_t from) {
  const auto place = [&](const Tensor& t) { return t.data_ptr<float>() + from; };
  return {.lse = place(out.lse),
          .nll = place(out.nll),
          .loss = place(out.loss),
          .z_loss = place(out.z_loss)};
}

// out [N, D] bf16 or fp32 = scale (sum + entry C_y); scale may be undefined. sum [N, >= D] fp32,
// which may be out.
inline void finish_hidden(Tensor out, const Tensor& sum, const Tensor& scale, const Tensor& entry,
                          const Tensor& weight, const Tensor& target) {
  const auto rows = sum.size(0), dim = weight.size(1);
  C10_CUDA_CHECK(
      cce::finish_hidden(rows, dim,
                         {.sum = sum.const_data_ptr<float>(),
                          .sum_stride = sum.stride(0),
                          .scale = scale.defined() ? scale.const_data_ptr<float>() : nullptr,
                          .entry = entry.const_data_ptr<float>(),
                          .weight = weight.const_data_ptr(),
                          .weight_is_fp32 = weight.scalar_type() == at::kFloat,
                          .weight_stride = weight.stride(0),
                          .weight_column_stride = weight.stride(1),
                          .target = target.const_data_ptr<int>(),
                          .out = out.data_ptr(),
                          .out_is_fp32 = out.scalar_type() == at::kFloat},
                         c10::cuda::getCurrentCUDAStream()));
}

}  // namespace ounce::fused
