// SPDX-License-Identifier: MIT
// Stateful: the one way in which anything hands over the state it needs to go on exactly where it
// stopped. Checkpoints, named loads and comparisons all walk it with a StateVisitor.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <string_view>

namespace at {
struct Generator;
}
namespace torch::nn {
class Module;
}

namespace ounce {

// When a tensor may change, which decides when a checkpoint must copy it.
enum class StateClass {
  kStep,     // changes only in the optimizer step: parameters, moments
  kForward,  // changes in a forward pass: running statistics, caches
  kHost,     // small host state: counters, cursors, generators
};

// Visits named values. A saving visitor reads them, a loading visitor overwrites them in place; the
// code that presents the state is the same for both. Names are joined with '/' under the scopes
// that are open; a name must be unique, not empty, and free of NUL and of ".." components.
class StateVisitor {
 public:
  virtual ~StateVisitor() = default;

  // The tensor must be defined and stay the same object: loading copies into it (shape and dtype
  // must match). Lazily created state has to be created before it is presented.
  virtual void tensor(std::string_view name, at::Tensor& value, StateClass cls) = 0;
  virtual void integer(std::string_view name, int64_t& value) = 0;
  virtual void number(std::string_view name, double& value) = 0;  // kept bit for bit
  virtual void text(std::string_view name, std::string& value) = 0;

  // A tensor that follows from one presented before, such as the bf16 copy of fp32 weights: never
  // stored, but made again by a plain cast when its source has been loaded. Not for copies made by
  // stochastic rounding, which do not follow: those are state.
  void derived(at::Tensor& value, const at::Tensor& source);

  // True when values are overwritten. What has to be done after loading (a generator set from its
  // bytes) hangs on this.
  virtual bool loading() const = 0;

  // A scope: names presented while it lives get the prefix "name/".
  class Scope {
   public:
    Scope(StateVisitor& visitor, std::string_view name);
    ~Scope();
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    StateVisitor& visitor_;
    size_t length_;
  };
  [[nodiscard]] Scope scope(std::string_view name) { return Scope(*this, name); }

 protected:
  // The full name under the open scopes.
  std::string full_name(std::string_view name) const;

 private:
  std::string prefix_;
};

class Stateful {
 public:
  virtual ~Stateful() = default;
  virtual void visit_state(StateVisitor& visitor) = 0;
};

// Presents every parameter (kStep) and persistent buffer (kForward) of a module under its PyTorch
// name. A tensor registered under several names (tied weights) is presented once, under the first.
void visit_module(torch::nn::Module& module, StateVisitor& visitor);

// Presents a generator's state as host bytes.
void visit_generator(at::Generator generator, std::string_view name, StateVisitor& visitor);

}  // namespace ounce
