// SPDX-License-Identifier: MIT
// What the optimizers of Adam's kind share: their keys, their entry in the registry, their bytes.
// Included by their .cpp files alone.
#pragma once

#include <ounce/core/check.h>
#include <ounce/core/registry.h>
#include <ounce/optim/named_optimizer.h>

#include <cstdint>
#include <initializer_list>
#include <memory>

namespace ounce::optim {

// beta1, beta2, eps and weight_decay, in their ranges.
template <class O>
void read_adam_options(const char* optimizer, const Options& options, O& to) {
  to.beta1 = options.number_in("beta1", 0, 1);
  to.beta2 = options.number_in("beta2", 0, 1);
  to.eps = options.number_in("eps", 0, 1);
  to.weight_decay = options.number_in("weight_decay", 0, 1e6);
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

// Of those that are defined.
inline int64_t bytes_of(std::initializer_list<const at::Tensor*> tensors) {
  int64_t bytes = 0;
  for (const auto* tensor : tensors) {
    if (tensor->defined()) bytes += static_cast<int64_t>(tensor->nbytes());
  }
  return bytes;
}

}  // namespace ounce::optim
