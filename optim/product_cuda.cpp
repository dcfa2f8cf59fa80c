// SPDX-License-Identifier: MIT
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <ounce/core/check.h>
#include <ounce/optim/product.h>
#include <ounce/optim/product_kernels.h>

namespace ounce::optim {

namespace {

using at::Tensor;

bool is_row_major(const Tensor& x) { return x.is_contiguous(); }
bool is_transposed(const Tensor& x) { return !is_row_major(x) && x.mT().is_contiguous(); }
bool is_known(at::ScalarType type) { return type == at::kBFloat16 || type == at::kHalf; }
bool is_known(const Tensor& x) {
  return x.is_cuda() && is_known(x.scalar_type()) && x.dim() == 3 &&
         reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
}

}  // namespace

Tensor fused_product(const Product& p) {
  const auto given = p.a.scalar_type(), type = p.type.value_or(given);
  if (!is_known(p.a) || !is_known(p.b) || p.b.scalar_type() != given || !is_known(type) ||
      at::cuda::getDeviceProperties(p.a.get_device())->major != 9) {
    return {};
  }
  const bool a_fits = is_row_major(p.a) || is_transposed(p.a);
  const bool b_fits = is_row_major(p.b) || is_transposed(p.b);
  if (!a_fits || !b_fits ||
      (p.c.defined() && (!is_known(p.c) || p.c.scalar_type() != given || !is_row_major(p.c))))
    return {};
  OUNCE_CHECK(p.b.size(0) == p.a.size(0) && p.b.size(1) == p.a.size(2) &&
                  p.b.device() == p.a.device() &&
                  (!p.c.defined() ||
                   (p.c.device() == p.a.device() &&
                    p.c.sizes() == at::IntArrayRef{p.a.size(0), p.a.size(1), p.b.size(2)})),
              "[product] expected a [count, m, k], b [count, k, n], c [count, m, n] on one device, "
              "got ",
              p.a.sizes(), " and ", p.b.sizes());
  BatchedProduct kernel = {.count = p.a.size(0),
                           .m = p.a.size(1),
                           .n = p.b.size(2),
                           .k = p.a.size(2),
                           .a = p.a.const_data_ptr(),
                           .b = p.b.const_data_ptr(),
                           .a_transposed = is_transposed(p.a),
                           .b_transposed = is_transposed(p.b),
                           .is_half = given == at::kHalf,
                           .out_is_half = type == at::kHalf,
                           .symmetric = p.symmetric,
                           .alpha = static_cast<float>(p.alpha),
                           .beta = static_cast<float>(p.beta),
                           .diagonal = static_cast<float>(p.diagonal)};
  if (!can_multiply(kernel)) return {};
  const c10::cuda::CUDAGuard guard(p.a.device());
  const auto d = at::empty({kernel.count, kernel.m, kernel.n}, p.a.options().dtype(type));
  kernel.d = d.data_ptr();
  if (p.c.defined()) kernel.c = p.c.const_data_ptr();
  C10_CUDA_CHECK(multiply(kernel, c10::cuda::getCurrentCUDAStream()));
  return d;
}

}  // namespace ounce::optim
