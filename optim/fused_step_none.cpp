// SPDX-License-Identifier: MIT
#include <ounce/core/check.h>
#include <ounce/optim/fused_step.h>

namespace ounce::optim {

struct FusedSteps::Impl {};

FusedSteps::FusedSteps() = default;
FusedSteps::~FusedSteps() = default;

bool FusedSteps::takes(const FusedTensor&) { return false; }
bool FusedSteps::takes(const FusedTensor&, const FusedLowRank&) { return false; }
bool FusedSteps::takes(const FusedMomentum&, const FusedTrion&) { return false; }

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
