// SPDX-License-Identifier: MIT
#include <ounce/core/check.h>
#include <ounce/kernels/common/implementation.h>
#include <ounce/optim/fused_step.h>

namespace ounce::optim {

struct FusedSteps::Impl {};

FusedSteps::FusedSteps() = default;
FusedSteps::~FusedSteps() = default;

std::string FusedSteps::why_not(const FusedTensor&) { return kNotBuilt; }
std::string FusedSteps::why_not(const FusedTensor&, const FusedLowRank&) { return kNotBuilt; }
std::string FusedSteps::why_not(const FusedMomentum&, const FusedTrion&) { return kNotBuilt; }

void FusedSteps::adamw(const std::vector<FusedTensor>&, const FusedSettings&) {
  fail(Fault::kProblem, "[optim] the fused step is not built");
}
at::Tensor FusedSteps::low_rank(std::vector<FusedTensor>, const FusedLowRank&,
                                const FusedSettings&) {
  fail(Fault::kProblem, "[optim] the fused step is not built");
}
at::Tensor FusedSteps::trion(std::vector<FusedMomentum>, const FusedTrion&, const FusedSettings&) {
  fail(Fault::kProblem, "[optim] the fused step is not built");
}
void FusedSteps::count(const std::vector<at::Tensor>& steps, const FusedSettings&) {
  if (!steps.empty()) fail(Fault::kProblem, "[optim] the fused step is not built");
}

}  // namespace ounce::optim
