// SPDX-License-Identifier: MIT
// What the optimizers of Adam's kind share: their keys, their entry in the registry, their moments.
// Included by their .cpp files alone.
#pragma once

#include <ounce/core/check.h>
#include <ounce/core/registry.h>
#include <ounce/optim/named_optimizer.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

namespace ounce::optim {

// The value whose name stands at its place in `names`.
template <class E>
E choice_of(const Options& options, const char* key, const std::vector<std::string>& names) {
  const auto found = std::find(names.begin(), names.end(), options.choice(key, names));
  return static_cast<E>(found - names.begin());
}

inline const std::vector<std::string> kCheckFinite = {"off", "skip", "raise"};

// Of all groups: lr, which is checked here, beta1, beta2, eps, weight_decay and check_finite.
template <class O>
Options write_adam_options(const char* optimizer, const O& from) {
  OUNCE_CHECK(from.lr >= 0, "[", optimizer, "] expected lr >= 0, got ", from.lr);
  Options options;
  options.set("lr", from.lr);
  options.set("beta1", from.beta1);
  options.set("beta2", from.beta2);
  options.set("eps", from.eps);
  options.set("weight_decay", from.weight_decay);
  options.set("check_finite", kCheckFinite[static_cast<size_t>(from.check_finite)]);
  return options;
}
// Of one group, whose lr it keeps itself: the others, in their ranges.
template <class O>
void read_adam_options(const char* optimizer, const Options& options, O& to) {
  to.beta1 = options.number_in("beta1", 0, 1);
  to.beta2 = options.number_in("beta2", 0, 1);
  to.eps = options.number_in("eps", 0, 1);
  to.weight_decay = options.number_in("weight_decay", 0, 1e6);
  to.check_finite = choice_of<CheckFinite>(options, "check_finite", kCheckFinite);
  OUNCE_CHECK(to.beta1 < 1 && to.beta2 < 1, "[", optimizer,
              "] expected beta1 and beta2 below 1, got ", to.beta1, " and ", to.beta2);
  OUNCE_CHECK(to.eps > 0, "[", optimizer, "] expected eps > 0, got ", to.eps);
}

// O is made of parameters and of what from_options() reads, with lr and groups put in.
template <class O, class F>
void add_optimizer(const char* name, const char* doc, const char* defaults, const F& from_options) {
  registry<NamedOptimizer>().add(
      {.name = name, .doc = doc, .defaults = defaults},
      [from_options](const Options& options, const NamedOptimizer::Context& context) {
        auto settings = from_options(options);
        settings.lr = options.number("lr");
        settings.groups = NamedOptimizer::parse_groups(*options.find("group"));
        return std::make_shared<O>(context.parameters, settings);
      });
}

// Step count and moments of a Slot.
template <class Slot>
void make_moments(Slot& slot, at::IntArrayRef sizes, const at::TensorOptions& options) {
  slot.step = at::zeros({}, options.dtype(at::kFloat));
  slot.exp_avg = at::zeros(sizes, options);
  slot.exp_avg_sq = at::zeros(sizes, options);
}
template <class Slot>
void visit_moments(StateVisitor& visitor, Slot& slot) {
  visitor.tensor("step", slot.step, StateClass::kStep);
  visitor.tensor("exp_avg", slot.exp_avg, StateClass::kStep);
  visitor.tensor("exp_avg_sq", slot.exp_avg_sq, StateClass::kStep);
}

}  // namespace ounce::optim
