// SPDX-License-Identifier: MIT
#include <ounce/optim/clip.h>
#include <torch/torch.h>

#include <vector>

namespace ounce::optim {

ClipResult clip_by_norm(at::TensorList gradients, double max_norm) {
  const at::NoGradGuard no_grad;
  // ATen's one-launch path takes tensors of one dtype and device a call.
  std::vector<std::vector<at::Tensor>> batches;
  for (const auto& gradient : gradients) {
    if (!gradient.defined() || gradient.numel() == 0) continue;
    auto batch = batches.begin();
    while (batch != batches.end() && (batch->front().scalar_type() != gradient.scalar_type() ||
                                      batch->front().device() != gradient.device())) {
      ++batch;
    }
    if (batch == batches.end()) batch = batches.insert(batch, std::vector<at::Tensor>{});
    batch->push_back(gradient);
  }
  ClipResult result;
  if (batches.empty()) {
    result.norm = at::zeros({}, at::kFloat);
  } else {
    const auto device = batches.front().front().device();
    std::vector<at::Tensor> norms;
    for (const auto& batch : batches) {
      const auto wide = batch.front().scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
      const auto each = at::stack(at::_foreach_norm(batch, 2, wide));
      norms.push_back(at::linalg_vector_norm(each).to(device, at::kFloat));
    }
    result.norm = norms.size() == 1 ? norms.front() : at::linalg_vector_norm(at::stack(norms));
  }
  const auto finite = at::isfinite(result.norm);
  result.found_inf = finite.logical_not().to(at::kFloat);
  const auto one = at::ones_like(result.norm);
  result.scale =
      max_norm > 0 ? at::where(finite, (max_norm / (result.norm + 1e-6)).clamp_max(1), one) : one;
  return result;
}

}  // namespace ounce::optim
