// SPDX-License-Identifier: MIT
#include <ounce/optim/adam_options.h>
#include <ounce/optim/composed_step.h>
#include <ounce/optim/fused_adamw.h>
#include <torch/torch.h>

#include <algorithm>
#include <optional>

namespace ounce::optim {

namespace {

constexpr const char* kDefaults =
    R"(lr = 1e-3            # base learning rate; a schedule multiplies it
beta1 = 0.9          # decay of the first moment
beta2 = 0.95         # decay of the second moment
eps = 1e-8           # added to the root of the second moment
weight_decay = 0.1   # decoupled; norms, biases and embeddings take 0 unless a group says otherwise
check_finite = "off" # off | skip | raise: of a step whose gradients hold an infinity or a NaN
amsgrad = false      # divide by the largest second moment so far
maximize = false     # climb instead of descend
state_dtype = "fp32" # fp32 | bf16, rounded stochastically: in which moments are kept
stochastic_rounding = true  # of bf16 parameters; false: to nearest
seed = 0             # of that
implementation = "auto"  # auto | fused | reference: of bf16 weights or moments
group = []           # tables: match = "*norm*", and what differs: lr_scale or any key above
)";

Options to_options(const AdamWOptions& from) {
  auto options = write_adam_options("adamw", from);
  options.set("amsgrad", from.amsgrad);
  options.set("maximize", from.maximize);
  write_rounding_options(from, options);
  return options;
}

// Of one group, whose lr is kept by the group itself; checks the ranges.
AdamWOptions from_options(const Options& options) {
  AdamWOptions to;
  read_adam_options("adamw", options, to);
  to.amsgrad = options.flag("amsgrad");
  to.maximize = options.flag("maximize");
  read_rounding_options(options, to);
  return to;
}

// The elements in memory order: the CPU kernel walks memory, whatever the strides are.
at::Tensor flat(const at::Tensor& dense) {
  return dense.is_contiguous() ? dense : dense.as_strided({dense.numel()}, {1});
}

// Whether a step of it rounds anything.
bool is_rounded(const at::Tensor& parameter, const at::Tensor& state) {
  return parameter.scalar_type() == at::kBFloat16 || state.scalar_type() == at::kBFloat16;
}

}  // namespace

struct FusedAdamW::Lists {
  at::Device device;
  at::ScalarType type;
  std::vector<at::Tensor> parameters, gradients, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps;
};

FusedAdamW::FusedAdamW(NamedParameters parameters, const AdamWOptions& options)
    : NamedOptimizer(std::move(parameters), to_options(options), options.groups) {
  slots_.resize(this->parameters().size());
  for (const auto& group : param_groups()) {
    settings_.push_back(from_options(static_cast<const GroupOptions&>(group.options()).values));
    for (const auto& parameter : group.params()) {
      OUNCE_CHECK(parameter.layout() == at::kStrided && parameter.is_non_overlapping_and_dense(),
                  "[adamw] '", name_of(parameter), "': expected a dense tensor, got strides ",
                  parameter.strides());
      auto& slot = slots_[index_of(parameter)];
      const auto& o = settings_.back();
      const auto type = state_type("adamw", name_of(parameter), parameter, o.state_dtype);
      slot.step = at::zeros({}, parameter.options().dtype(at::kFloat).requires_grad(false));
      slot.exp_avg = at::zeros_like(parameter.detach(), type);
      slot.exp_avg_sq = at::zeros_like(parameter.detach(), type);
      if (o.amsgrad) slot.max_exp_avg_sq = at::zeros_like(parameter.detach(), type);
      OUNCE_CHECK(!is_rounded(parameter, slot.exp_avg) || (!o.amsgrad && !o.maximize), "[adamw] '",
                  name_of(parameter),
                  "': expected neither amsgrad nor maximize with bf16 parameters or moments");
      if (is_rounded(parameter, slot.exp_avg)) {
        takes_fused_adamw("adamw", name_of(parameter),
                          fused_tensor(parameter, slot, o, index_of(parameter)), o);
      }
    }
  }
}

std::vector<FusedAdamW::Lists> FusedAdamW::gather(
    const torch::optim::OptimizerParamGroup& group) const {
  std::vector<Lists> all;
  for (const auto& parameter : group.params()) {
    auto gradient = parameter.grad();
    if (!gradient.defined() || parameter.numel() == 0) continue;
    const auto& slot = slots_[index_of(parameter)];
    if (is_rounded(parameter, slot.exp_avg)) continue;
    OUNCE_CHECK(slot.exp_avg.sizes() == parameter.sizes() &&
                    slot.exp_avg.strides() == parameter.strides() &&
                    slot.exp_avg.device() == parameter.device() &&
                    slot.exp_avg.scalar_type() == parameter.scalar_type(),
                "[adamw] '", name_of(parameter), "' was ", slot.exp_avg.toString(),
                slot.exp_avg.sizes(), " when the optimizer was made and is ", parameter.toString(),
                parameter.sizes(), "; move or reshape a model before making its optimizer");
    OUNCE_CHECK(
        gradient.layout() == at::kStrided && gradient.scalar_type() == parameter.scalar_type(),
        "[adamw] '", name_of(parameter), "': expected a dense gradient of ",
        parameter.scalar_type(), ", got ", gradient.toString());
    if (gradient.strides() != parameter.strides()) {
      gradient = at::empty_like(parameter.detach()).copy_(gradient);
    }
    auto lists = std::find_if(all.begin(), all.end(), [&](const Lists& candidate) {
      return candidate.device == parameter.device() && candidate.type == parameter.scalar_type();
    });
    if (lists == all.end()) {
      lists = all.insert(
          all.end(), Lists{parameter.device(), parameter.scalar_type(), {}, {}, {}, {}, {}, {}});
    }
    lists->parameters.push_back(flat(parameter));
    lists->gradients.push_back(flat(gradient));
    lists->exp_avgs.push_back(flat(slot.exp_avg));
    lists->exp_avg_sqs.push_back(flat(slot.exp_avg_sq));
    if (slot.max_exp_avg_sq.defined()) lists->max_exp_avg_sqs.push_back(flat(slot.max_exp_avg_sq));
    lists->steps.push_back(slot.step);
  }
  return all;
}

void FusedAdamW::update_rounded(size_t group, const StepControl& control) {
  const auto& o = settings_[group];
  const auto& options = static_cast<const GroupOptions&>(param_groups()[group].options());
  FusedAdamWSteps fused;
  for (const auto& parameter : param_groups()[group].params()) {
    const auto index = index_of(parameter);
    auto& slot = slots_[index];
    const auto& name = name_of(parameter);
    if (!is_rounded(parameter, slot.exp_avg)) continue;
    if (!has_gradient("adamw", name, parameter, slot.exp_avg)) continue;
    if (fused.take("adamw", name, parameter, slot, o, index)) continue;
    const ComposedStep step(control, options, parameter, step_type("adamw", name, parameter));
    const auto direction =
        step.adam(slot, slot.exp_avg, slot.exp_avg_sq, step.scaled(parameter.grad()), o, index);
    step.move(parameter.detach(), direction, o, slot.step, index);
  }
  fused.step(fused_,
             [&](const at::Device& device) { return fused_settings(control, options, o, device); });
}

void FusedAdamW::update(const StepControl& control) {
  const at::NoGradGuard no_grad;
  // The kernel divides by its grad_scale, and skips where its found_inf equals one.
  at::Tensor divisor, skip, lr;
  if (control.grad_scale.defined()) divisor = control.grad_scale.to(at::kFloat).reciprocal();
  if (control.skip.defined()) skip = control.skip.ne(0).to(at::kFloat);
  for (size_t g = 0; g < param_groups().size(); ++g) {
    const auto& settings = settings_[g];
    const auto& options = static_cast<const GroupOptions&>(param_groups()[g].options());
    if (control.lr.defined()) {
      lr = control.lr.to(at::kFloat);
      if (options.lr_scale != 1) lr = lr * options.lr_scale;
    }
    update_rounded(g, control);
    for (auto& lists : gather(param_groups()[g])) {
      const auto on_device = [&](const at::Tensor& scalar) {
        return scalar.defined() ? std::optional(scalar.to(lists.device)) : std::nullopt;
      };
      const auto skip_here = on_device(skip);
      if (skip_here) {
        at::_foreach_add_(lists.steps, 1 - *skip_here);
      } else {
        at::_foreach_add_(lists.steps, 1);
      }
      const auto launch = [&](const auto& rate) {
        at::_fused_adamw_(lists.parameters, lists.gradients, lists.exp_avgs, lists.exp_avg_sqs,
                          lists.max_exp_avg_sqs, lists.steps, rate, settings.beta1, settings.beta2,
                          settings.weight_decay, settings.eps, settings.amsgrad, settings.maximize,
                          on_device(divisor), skip_here);
      };
      if (lr.defined()) {
        launch(lr.to(lists.device));
      } else {
        launch(options.lr);
      }
    }
  }
}

void FusedAdamW::visit_state(StateVisitor& visitor) {
  for (size_t i = 0; i < slots_.size(); ++i) {
    const auto scope = visitor.scope(parameters()[i].first);
    auto& slot = slots_[i];
    visit_moments(visitor, slot);
    if (slot.max_exp_avg_sq.defined()) {
      visitor.tensor("max_exp_avg_sq", slot.max_exp_avg_sq, StateClass::kStep);
    }
  }
  visit_groups(visitor);
}

void register_adamw() {
  add_optimizer<FusedAdamW>("adamw", "AdamW, one fused launch a group", kDefaults, from_options);
}

}  // namespace ounce::optim
