// SPDX-License-Identifier: MIT
#include <ounce/core/check.h>
#include <ounce/core/stateful.h>
#include <torch/torch.h>

#include <unordered_set>

namespace ounce {

StateVisitor::Scope::Scope(StateVisitor& visitor, std::string_view name)
    : visitor_(visitor), length_(visitor.prefix_.size()) {
  visitor_.prefix_.append(name).push_back('/');
}

StateVisitor::Scope::~Scope() { visitor_.prefix_.resize(length_); }

void StateVisitor::derived(at::Tensor& value, const at::Tensor& source) {
  const at::NoGradGuard guard;
  if (loading()) value.copy_(source);
}

std::string StateVisitor::full_name(std::string_view name) const {
  OUNCE_CHECK(!name.empty() && name.find('\0') == std::string_view::npos,
              "[state] expected a name without NUL under '", prefix_, "'");
  auto full = prefix_;
  full.append(name);
  OUNCE_CHECK(("/" + full + "/").find("/../") == std::string::npos,
              "[state] '..' is not allowed in the name '", full, "'");
  return full;
}

void visit_module(torch::nn::Module& module, StateVisitor& visitor) {
  std::unordered_set<const void*> seen;
  for (auto& item : module.named_parameters()) {
    if (seen.insert(item.value().unsafeGetTensorImpl()).second) {
      visitor.tensor(item.key(), item.value(), StateClass::kStep);
    }
  }
  for (auto& item : module.named_buffers()) {
    if (seen.insert(item.value().unsafeGetTensorImpl()).second) {
      visitor.tensor(item.key(), item.value(), StateClass::kForward);
    }
  }
}

void visit_generator(at::Generator generator, std::string_view name, StateVisitor& visitor) {
  at::Tensor state;
  {
    const std::lock_guard<std::mutex> lock(generator.mutex());
    state = generator.get_state();
  }
  visitor.tensor(name, state, StateClass::kHost);
  if (visitor.loading()) {
    const std::lock_guard<std::mutex> lock(generator.mutex());
    generator.set_state(state);
  }
}

}  // namespace ounce
