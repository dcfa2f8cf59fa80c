// SPDX-License-Identifier: MIT
// NamedOptimizer: the base of every optimizer here. A torch::optim::Optimizer whose state is keyed
// by parameter name, whose groups are made by matching names, and whose step takes device tensors.
#pragma once

#include <ounce/core/glob.h>
#include <ounce/core/options.h>
#include <ounce/core/stateful.h>
#include <ounce/core/step_control.h>
#include <torch/nn/module.h>
#include <torch/optim/optimizer.h>

#include <functional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace ounce::optim {

using NamedParameters = std::vector<std::pair<std::string, at::Tensor>>;

// Every parameter that requires a gradient, under its dotted PyTorch name; a tensor registered
// twice appears once, under its first name.
NamedParameters named_parameters(const torch::nn::Module& module);
// The same for a plain list: names are "0", "1", ...
NamedParameters named_parameters(const std::vector<at::Tensor>& parameters);

// What step() does where a gradient of a group holds an infinity or a NaN, or their norm is one.
enum class CheckFinite {
  kOff,   // it is not looked for
  kSkip,  // nothing changes, as with control.skip; no host synchronisation
  // Fault::kProblem, which names the parameters, whatever control.skip says; nothing has changed
  // then, but for the parameters that a LayerwiseStepper stepped before.
  kRaise,
};

class NamedOptimizer : public torch::optim::Optimizer, public Stateful {
 public:
  static constexpr const char* kKind = "optimizer";
  struct Context {
    NamedParameters parameters;
  };

  // One rule of [[optimizer.group]]: `match` is a glob over names; the remaining keys override
  // options for the parameters it matches: any option of the optimizer, and `lr_scale` (a factor on
  // the base lr). `lr` in a rule is short for lr_scale = lr / base lr. The first rule that matches
  // wins. Norms, biases and embeddings (names "*norm*", "*bias", "*embed*", and anything of fewer
  // than two dimensions) take weight_decay = 0 unless their rule sets weight_decay.
  struct GroupRule {
    std::string match;
    Options overrides;
  };
  // The rules in the value of the key `group`: an array of tables with `match`.
  static std::vector<GroupRule> parse_groups(const Value& group);

  // What each of param_groups() carries. `values` is the optimizer's complete options for the
  // group, without lr; lr starts at the base lr times lr_scale, and is what StepLR and the like
  // change.
  struct GroupOptions : torch::optim::OptimizerCloneableOptions<GroupOptions> {
    double lr = 0;
    double lr_scale = 1;
    Options values;
    double get_lr() const override { return lr; }
    void set_lr(const double value) override { lr = value; }
  };

  // torch::optim::Optimizer's step: reads .grad, uses each group's own lr. Closure as in LibTorch.
  at::Tensor step(LossClosure closure = nullptr) override;
  // The same with device-side control: parameters of a group step with control.lr times the group's
  // `lr_scale`, gradients times control.grad_scale, and nothing at all changes where control.skip
  // is nonzero (the step count does not advance either). No host synchronisation on a GPU. An
  // undefined control.lr takes each group's own lr. Parameters without a gradient are left alone.
  void step(const StepControl& control);

  // Adds the gradient of `parameter` to that of its next step, in the subspace that the optimizer
  // steps in, so that .grad can go. False, with nothing done, where a step needs all of it.
  virtual bool accumulate(const at::Tensor& parameter);

  // Called before a step changes anything, with the tensors that it is about to change; empty = all
  // of its parameters and state. A checkpoint's gate goes here.
  using UpdateHook = std::function<void(at::TensorList)>;
  void before_update(UpdateHook hook);

  const std::string& name_of(const at::Tensor& parameter) const;  // unknown: Fault::kUsage
  const NamedParameters& parameters() const;
  // Bytes of the tensors of visit_state(); state exists from construction on.
  int64_t state_bytes() const;

  // What the last step measured, where an option `statistics` asked for it: fp32 scalars on the
  // device by name.
  using Statistics = std::vector<std::pair<std::string, at::Tensor>>;
  virtual Statistics statistics() const { return {}; }

  // torch::save and torch::load: everything that visit_state() presents, and each group's lr, by
  // name. Loading checks the names, shapes and dtypes first and lists every difference in one error
  // (Fault::kUsage); then nothing has been changed.
  void save(torch::serialize::OutputArchive& archive) const override;
  void load(torch::serialize::InputArchive& archive) override;

  // visit_state() of a subclass presents "<parameter name>/<slot>" and its counters, and calls
  // visit_groups().

 protected:
  // `options` holds every option of the optimizer, complete, `lr` among them, without `name` and
  // `group`. Groups are made in a fixed order, which does not depend on the order of the
  // parameters: those without a rule, then rule by rule; in each, decayed before not decayed.
  // Fault::kUsage: no parameters, names that are empty or twice there, tensors that are no leaf or
  // not floating point, unknown keys in a rule, a rule that matches nothing.
  NamedOptimizer(NamedParameters parameters, const Options& options,
                 const std::vector<GroupRule>& rules);

  // step() behind its hook.
  virtual void update(const StepControl& control) = 0;
  // Presents "groups/<i>/lr", for checkpoints of a program that changes lr through the groups.
  void visit_groups(StateVisitor& visitor);
  // Position in parameters(); unknown: Fault::kUsage.
  size_t index_of(const at::Tensor& parameter) const;

 private:
  // control.skip, and whether a group's option `check_finite` finds a reason to.
  at::Tensor checked_skip(const StepControl& control) const;

  NamedParameters parameters_;
  size_t made_groups_ = 0;  // at construction; step() refuses what is in later ones
  UpdateHook hook_;
  std::unordered_map<const void*, size_t> index_;
};

}  // namespace ounce::optim
