// SPDX-License-Identifier: MIT
#pragma once

#include <ounce/core/stateful.h>

#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace ounce::test {

// The tensors that an object presents, by the names they have in their scopes, in order.
inline std::vector<std::pair<std::string, at::Tensor>> state_tensors(Stateful& object) {
  struct Visitor : StateVisitor {
    std::vector<std::pair<std::string, at::Tensor>> all;
    void tensor(std::string_view name, at::Tensor& value, StateClass) override {
      all.emplace_back(name, value);
    }
    void integer(std::string_view, int64_t&) override {}
    void number(std::string_view, double&) override {}
    void text(std::string_view, std::string&) override {}
    bool loading() const override { return false; }
  } visitor;
  object.visit_state(visitor);
  return visitor.all;
}

// The first of this name, or undefined.
inline at::Tensor state_tensor(Stateful& object, std::string_view wanted) {
  for (const auto& [name, value] : state_tensors(object)) {
    if (name == wanted) return value;
  }
  return {};
}

}  // namespace ounce::test
