// SPDX-License-Identifier: MIT
#include <ATen/CPUGeneratorImpl.h>
#include <ounce/optim/adam_options.h>
#include <ounce/optim/composed_step.h>
#include <ounce/optim/galore.h>

#include <algorithm>

namespace ounce::optim {

namespace {

using at::Tensor;

const std::string kDefaults =
    std::string(
        R"(lr = 0.01               # base learning rate; a schedule multiplies it
beta1 = 0.9             # decay of the first moment
beta2 = 0.999           # decay of the second moment
eps = 1e-8              # added to the root of the second moment
weight_decay = 0.0      # decoupled; norms, biases and embeddings take 0 unless a group says otherwise
check_finite = "off"    # off | skip | raise: of a step whose gradients hold an infinity or a NaN
rank = 128              # columns kept of the smaller side
rank_fraction = 0.0     # that share of it instead; 0 = rank
update_interval = 200   # gradients between choices of the subspace
scale = 0.25            # of the projected step
subspace = "svd"        # svd | randomized: how the singular vectors are found
side = "auto"           # auto | left | right: which side is projected
)") +
    kProjectionDefaults +
    R"(group = []              # tables: match = "*norm*", and what differs: lr_scale or any key above
)";

const std::vector<std::string> kSubspaces = {"svd", "randomized"};
constexpr int64_t kOversampling = 8;

Options to_options(const GaLoreOptions& from) {
  auto options = write_adam_options("galore", from);
  options.set("scale", from.scale);
  options.set("subspace", kSubspaces[static_cast<size_t>(from.subspace)]);
  write_projection_options(from, options);
  return options;
}

// Of one group, whose lr is kept by the group itself; checks the ranges.
GaLoreOptions from_options(const Options& options) {
  GaLoreOptions to;
  read_adam_options("galore", options, to);
  to.scale = options.number_in("scale", 0, 1e6);
  to.subspace = choice_of<Subspace>(options, "subspace", kSubspaces);
  read_projection_options(options, to);
  return to;
}

// The right singular vectors of the `rank` largest singular values of g [R, n], as columns. What is
// not finite counts as 0: such a step is skipped, and a decomposition would not come back from it.
Tensor leading_vectors(const Tensor& g, int64_t rank, Subspace subspace, int64_t seed) {
  auto x = g.nan_to_num(0, 0, 0);
  if (subspace == Subspace::kRandomized) {
    // The same draw on every device.
    const auto generator = at::make_generator<at::CPUGeneratorImpl>(static_cast<uint64_t>(seed));
    const auto width = std::min({rank + kOversampling, x.size(0), x.size(1)});
    const auto draw =
        at::randn({x.size(1), width}, generator, at::TensorOptions(x.scalar_type())).to(x.device());
    // One power step: what is sampled falls off as the cube of the singular values.
    const auto sample = at::matmul(x, at::matmul(x.t(), at::matmul(x, draw)));
    x = at::matmul(std::get<0>(at::linalg_qr(sample)).t(), x);
  }
  return std::get<2>(at::linalg_svd(x, /*full_matrices=*/x.size(0) < rank)).slice(0, 0, rank).t();
}

}  // namespace

GaLore::GaLore(NamedParameters parameters, const GaLoreOptions& options)
    : NamedOptimizer(std::move(parameters), to_options(options), options.groups) {
  slots_.resize(this->parameters().size());
  for (const auto& group : param_groups()) {
    settings_.push_back(from_options(static_cast<const GroupOptions&>(group.options()).values));
    for (const auto& parameter : group.params()) {
      auto& slot = slots_[index_of(parameter)];
      const auto fresh = parameter.options().requires_grad(false).dtype(
          state_type("galore", name_of(parameter), parameter, settings_.back().state_dtype));
      const auto projection =
          projection_of("galore", name_of(parameter), parameter, settings_.back());
      make_moments(slot, moment_sizes(parameter, projection), fresh);
      if (!projection) {
        takes_fused_adamw("galore", name_of(parameter),
                          fused_tensor(parameter, slot, settings_.back(), index_of(parameter)),
                          settings_.back());
        continue;
      }
      slot.transposed = projection->transposed;
      slot.basis = at::eye(projection->n, projection->rank,
                           fresh.dtype(step_type("galore", name_of(parameter), parameter)));
    }
  }
  if (std::none_of(slots_.begin(), slots_.end(), [](const Slot& s) { return s.basis.defined(); }))
    warn_of_no_projection("galore", param_groups(), settings_);
}

void GaLore::update(const StepControl& control) {
  const at::NoGradGuard no_grad;
  for (size_t i = 0; i < param_groups().size(); ++i) {
    const auto& o = settings_[i];
    const auto& group = static_cast<const GroupOptions&>(param_groups()[i].options());
    FusedAdamWSteps fused;
    for (const auto& parameter : param_groups()[i].params()) {
      const auto index = index_of(parameter);
      auto& slot = slots_[index];
      if (!has_gradient("galore", name_of(parameter), parameter, slot.exp_avg)) continue;
      if (!slot.basis.defined() &&
          fused.take("galore", name_of(parameter), parameter, slot, o, index)) {
        continue;
      }
      const ComposedStep step(control, group, parameter,
                              step_type("galore", name_of(parameter), parameter));
      auto g = step.scaled(parameter.grad());
      if (!slot.basis.defined()) {
        const auto direction = step.adam(slot, slot.exp_avg, slot.exp_avg_sq, g, o, index);
        step.move(parameter.detach(), direction, o, slot.step, index);
        continue;
      }
      g = slot.transposed ? as_matrix(g).t() : as_matrix(g);
      auto basis = slot.basis;
      if (slot.gradients % o.update_interval == 0) {
        basis = leading_vectors(g, basis.size(1), o.subspace, slot.gradients);
        step.assign(slot.basis, basis);
      }
      ++slot.gradients;
      const auto low =
          step.adam(slot, slot.exp_avg, slot.exp_avg_sq, at::matmul(g, basis), o, index) * o.scale;
      const auto direction = at::matmul(low, basis.t());
      step.move(parameter.detach(),
                (slot.transposed ? direction.t() : direction).reshape(parameter.sizes()), o,
                slot.step, index);
    }
    fused.step(fused_,
               [&](const at::Device& device) { return fused_settings(control, group, o, device); });
  }
}

Tensor GaLore::basis_of(const Tensor& parameter) const { return slots_[index_of(parameter)].basis; }

void GaLore::visit_state(StateVisitor& visitor) {
  for (size_t i = 0; i < slots_.size(); ++i) {
    const auto scope = visitor.scope(parameters()[i].first);
    auto& slot = slots_[i];
    visit_moments(visitor, slot);
    if (!slot.basis.defined()) continue;
    visitor.tensor("basis", slot.basis, StateClass::kStep);
    visitor.integer("gradients", slot.gradients);
  }
  visit_groups(visitor);
}

void register_galore() {
  add_optimizer<GaLore>("galore", "AdamW in the leading singular vectors of each gradient",
                        kDefaults.c_str(), from_options);
}

}  // namespace ounce::optim
