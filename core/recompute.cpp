// SPDX-License-Identifier: MIT
#include <ounce/core/autocast.h>
#include <ounce/core/check.h>
#include <ounce/core/device.h>
#include <ounce/core/nn/forward_context.h>
#include <ounce/core/recompute.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/torch.h>

#include <algorithm>
#include <mutex>
#include <utility>

namespace ounce {

namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

at::Tensor generator_state(at::Device device) {
  auto generator = default_generator(device);
  const std::lock_guard<std::mutex> lock(generator.mutex());
  return generator.get_state();
}

void set_generator_state(at::Device device, const at::Tensor& state) {
  auto generator = default_generator(device);
  const std::lock_guard<std::mutex> lock(generator.mutex());
  generator.set_state(state);
}

// The generators' states when it is made; restore() puts them back.
class GeneratorStates {
 public:
  explicit GeneratorStates(const std::vector<at::Device>& devices) {
    for (const auto device : devices) states_.emplace_back(device, generator_state(device));
  }
  void restore() const {
    for (const auto& [device, state] : states_) set_generator_state(device, state);
  }

 private:
  std::vector<std::pair<at::Device, at::Tensor>> states_;
};

// Autocast of one kind of device on this thread; kFloat = off, as AutocastGuard takes it.
at::ScalarType autocast_type(at::DeviceType device) {
  return at::autocast::is_autocast_enabled(device) ? at::autocast::get_autocast_dtype(device)
                                                   : at::kFloat;
}

// The cache of cast weights must not be filled without grad mode, where the casts have no history,
// nor be read while recomputing, where they belong to another graph.
class NoAutocastCache {
 public:
  NoAutocastCache() : enabled_(at::autocast::is_autocast_cache_enabled()) {
    at::autocast::set_autocast_cache_enabled(false);
  }
  ~NoAutocastCache() { at::autocast::set_autocast_cache_enabled(enabled_); }
  NoAutocastCache(const NoAutocastCache&) = delete;
  NoAutocastCache& operator=(const NoAutocastCache&) = delete;

 private:
  bool enabled_;
};

class DeterministicGuard {
 public:
  explicit DeterministicGuard(bool on)
      : before_(at::globalContext().deterministicAlgorithms()),
        warn_only_(at::globalContext().deterministicAlgorithmsWarnOnly()) {
    if (on != before_) at::globalContext().setDeterministicAlgorithms(on, warn_only_);
    changed_ = on != before_;
  }
  ~DeterministicGuard() {
    if (changed_) at::globalContext().setDeterministicAlgorithms(before_, warn_only_);
  }
  DeterministicGuard(const DeterministicGuard&) = delete;
  DeterministicGuard& operator=(const DeterministicGuard&) = delete;

 private:
  bool before_, warn_only_, changed_ = false;
};

// Puts generators back also when the function throws.
class GeneratorGuard {
 public:
  explicit GeneratorGuard(const std::vector<at::Device>& devices) : states_(devices) {}
  ~GeneratorGuard() { states_.restore(); }
  GeneratorGuard(const GeneratorGuard&) = delete;
  GeneratorGuard& operator=(const GeneratorGuard&) = delete;

 private:
  GeneratorStates states_;
};

std::vector<at::Device> devices_of(const std::vector<at::Tensor>& inputs) {
  std::vector<at::Device> devices{at::kCPU};
  for (const auto& input : inputs) {
    if (input.defined() && input.is_cuda() &&
        std::find(devices.begin(), devices.end(), input.device()) == devices.end()) {
      devices.push_back(input.device());
    }
  }
  return devices;
}

// A node of the graph made by hand: autograd::Function gives its outputs a history only when an
// input requires a gradient, and here captured parameters may.
class RecomputeNode final : public torch::autograd::Node {
 public:
  RecomputeNode(RecomputeFunction function, const std::vector<at::Tensor>& inputs)
      : Node(torch::autograd::collect_next_edges(inputs)),
        function_(std::move(function)),
        devices_(devices_of(inputs)),
        generators_(devices_),
        cpu_type_(autocast_type(at::kCPU)),
        cuda_type_(autocast_type(at::kCUDA)),
        deterministic_(at::globalContext().deterministicAlgorithms()),
        context_(nn::ForwardContext::current()) {
    for (const auto& input : inputs) {
      saved_.emplace_back(input, /*is_output=*/false);
      requires_grad_.push_back(input.defined() && input.requires_grad());
    }
  }

  std::string name() const override { return "ounce::recompute"; }

  const RecomputeFunction& function() const { return function_; }

  variable_list apply(variable_list&& gradients) override {
    OUNCE_CHECK(
        !at::GradMode::is_enabled(),
        "[recompute] expected one backward pass, got create_graph = true: double backward is "
        "not supported");
    OUNCE_CHECK(
        torch::autograd::Engine::get_default_engine().is_checkpoint_valid(),
        "[recompute] expected backward() without a list of inputs, got torch::autograd::grad or "
        "backward(inputs): gradients of captured parameters would be lost");
    OUNCE_CHECK(!released_,
                "[recompute] a second backward pass through it; use retain_graph = true");
    auto inputs = detached_inputs();
    {
      const at::AutoGradMode with_grad(true);
      const auto outputs = run(inputs);
      OUNCE_CHECK(outputs.size() == gradients.size(), "[recompute] the function gave ",
                  gradients.size(), " outputs first and ", outputs.size(), " when run again");
      variable_list roots, root_gradients;
      for (size_t i = 0; i < outputs.size(); ++i) {
        if (gradients[i].defined() && outputs[i].defined() && outputs[i].requires_grad()) {
          roots.push_back(outputs[i]);
          root_gradients.push_back(std::move(gradients[i]));
        }
      }
      gradients.clear();
      if (!roots.empty()) torch::autograd::backward(roots, root_gradients);
    }
    variable_list result(inputs.size());
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (requires_grad_[i]) result[i] = inputs[i].grad();
    }
    return result;
  }

  void release_variables() override {
    for (auto& saved : saved_) saved.reset_data();
    function_ = nullptr;
    released_ = true;
  }

 private:
  std::vector<at::Tensor> detached_inputs() {
    std::vector<at::Tensor> inputs;
    for (size_t i = 0; i < saved_.size(); ++i) {
      at::Tensor input;
      try {
        input = saved_[i].unpack(shared_from_this());
      } catch (const c10::Error&) {
        fail(Fault::kUsage, "[recompute] input ", i,
             " was modified in place after the forward pass; give recompute a clone");
      }
      if (input.defined()) input = input.detach().requires_grad_(requires_grad_[i]);
      inputs.push_back(std::move(input));
    }
    return inputs;
  }

  std::vector<at::Tensor> run(const std::vector<at::Tensor>& inputs) const {
    const GeneratorGuard keep(devices_);
    generators_.restore();
    const AutocastGuard cpu(at::kCPU, cpu_type_), cuda(at::kCUDA, cuda_type_);
    const NoAutocastCache no_cache;
    const DeterministicGuard deterministic(deterministic_);
    const nn::ForwardContextGuard context(context_);
    return function_(inputs);
  }

  RecomputeFunction function_;
  std::vector<SavedVariable> saved_;
  std::vector<bool> requires_grad_;
  std::vector<at::Device> devices_;
  GeneratorStates generators_;
  at::ScalarType cpu_type_, cuda_type_;
  bool deterministic_;
  nn::ForwardContext* context_;
  bool released_ = false;
};

}  // namespace

std::vector<at::Tensor> recompute(RecomputeFunction function, std::vector<at::Tensor> inputs) {
  if (!at::GradMode::is_enabled()) return function(inputs);
  const std::shared_ptr<RecomputeNode> node(new RecomputeNode(std::move(function), inputs),
                                            torch::autograd::deleteNode);
  std::vector<int64_t> versions;
  for (const auto& input : inputs) versions.push_back(input.defined() ? input._version() : 0);
  std::vector<at::Tensor> outputs;
  {
    const at::NoGradGuard no_grad;
    const NoAutocastCache no_cache;
    outputs = node->function()(inputs);
  }
  for (size_t i = 0; i < inputs.size(); ++i) {
    OUNCE_CHECK(!inputs[i].defined() || inputs[i]._version() == versions[i],
                "[recompute] the function modified input ", i, " in place; let it work on a clone");
  }
  for (auto& output : outputs) {
    // An output may be an input, a parameter, a view of one, or another output: the history goes to
    // a tensor of its own.
    if (output.defined()) output = output.detach();
    const bool differentiable =
        output.defined() && torch::autograd::isDifferentiableType(output.scalar_type());
    torch::autograd::set_history(differentiable ? output : at::Tensor(), node);
  }
  return outputs;
}

}  // namespace ounce
