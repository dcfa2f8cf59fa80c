// SPDX-License-Identifier: MIT
// NamedOptimizer: the base of every optimizer here. A torch::optim::Optimizer whose state is keyed by
// parameter name, whose groups are made by matching names, and whose step takes device tensors.
#pragma once

#include <ounce/core/options.h>
#include <ounce/core/stateful.h>
#include <ounce/core/step_control.h>
#include <torch/nn/module.h>
#include <torch/optim/optimizer.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace ounce::optim {

using NamedParameters = std::vector<std::pair<std::string, at::Tensor>>;

// Every parameter that requires a gradient, under its dotted PyTorch name; a tensor registered twice
// appears once, under its first name.
NamedParameters named_parameters(const torch::nn::Module& module);
// The same for a plain list: names are "0", "1", ...
NamedParameters named_parameters(const std::vector<at::Tensor>& parameters);

class NamedOptimizer : public torch::optim::Optimizer, public Stateful {
 public:
  static constexpr const char* kKind = "optimizer";
  struct Context {
    NamedParameters parameters;
  };

  // One rule of [[optimizer.group]]: `match` is a glob over names ('*' any run, '?' one character);
  // the remaining keys override options for the parameters it matches. The first rule that matches
  // wins; parameters that none matches use `defaults`.
  struct GroupRule {
    std::string match;
    Options overrides;
  };

  // torch::optim::Optimizer's step: reads .grad, uses each group's own lr. Closure as in LibTorch.
  at::Tensor step(LossClosure closure = nullptr) override;
  // The same with device-side control: parameters of a group step with control.lr times the group's
  // `lr_scale`, gradients times control.grad_scale, and nothing at all changes where control.skip is
  // nonzero (the step count does not advance either). No host synchronisation.
  virtual void step(const StepControl& control) = 0;

  const std::string& name_of(const at::Tensor& parameter) const;  // unknown: Fault::kUsage
  const NamedParameters& parameters() const;
  // Bytes of optimizer state, all of it; state exists from construction on.
  virtual int64_t state_bytes() const = 0;

  // visit_state() of a subclass presents "<parameter name>/<slot>" and its counters.
};

}  // namespace ounce::optim
