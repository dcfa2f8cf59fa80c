// SPDX-License-Identifier: MIT
#include <ounce/core/check.h>
#include <ounce/optim/clip.h>
#include <ounce/optim/named_optimizer.h>
#include <torch/torch.h>

#include <algorithm>
#include <map>
#include <unordered_set>

namespace ounce::optim {

namespace {

bool decays(const std::string& name, const at::Tensor& parameter) {
  return parameter.dim() >= 2 && !glob_matches("*norm*", name) && !glob_matches("*bias", name) &&
         !glob_matches("*embed*", name);
}

// The first few names, for an error.
std::string some_names(const NamedParameters& parameters) {
  std::string result;
  for (size_t i = 0; i < parameters.size() && i < 4; ++i)
    result += " '" + parameters[i].first + "'";
  return result + (parameters.size() > 4 ? " ..." : "");
}

// Values by name, as an archive of LibTorch holds them. Names contain dots, which an archive's own
// keys may not, so they go into dictionaries.
struct Dictionaries {
  c10::Dict<std::string, at::Tensor> tensors;
  c10::Dict<std::string, int64_t> integers;
  c10::Dict<std::string, double> numbers;
  c10::Dict<std::string, std::string> texts;
};

class SaveVisitor final : public StateVisitor {
 public:
  void tensor(std::string_view name, at::Tensor& value, StateClass) override {
    values.tensors.insert(full_name(name), value.detach());
  }
  void integer(std::string_view name, int64_t& value) override {
    values.integers.insert(full_name(name), value);
  }
  void number(std::string_view name, double& value) override {
    values.numbers.insert(full_name(name), value);
  }
  void text(std::string_view name, std::string& value) override {
    values.texts.insert(full_name(name), value);
  }
  bool loading() const override { return false; }

  Dictionaries values;
};

// All of it, sharing memory.
Dictionaries state_of(const NamedOptimizer& optimizer) {
  SaveVisitor visitor;
  // A saving visitor only reads.
  const_cast<NamedOptimizer&>(optimizer).visit_state(visitor);
  return visitor.values;
}

// Compares what is presented with what was saved; says it is not loading, so nothing changes.
class CompareVisitor final : public StateVisitor {
 public:
  explicit CompareVisitor(const Dictionaries& saved) : saved_(saved) {}

  void tensor(std::string_view name, at::Tensor& value, StateClass) override {
    const auto full = full_name(name);
    if (!present(saved_.tensors, full)) return;
    const auto found = saved_.tensors.at(full);
    if (found.sizes() == value.sizes() && found.scalar_type() == value.scalar_type()) return;
    problems += c10::str("; '", full, "' is ", found.scalar_type(), found.sizes(), ", here ",
                         value.scalar_type(), value.sizes());
  }
  void integer(std::string_view name, int64_t&) override {
    present(saved_.integers, full_name(name));
  }
  void number(std::string_view name, double&) override { present(saved_.numbers, full_name(name)); }
  void text(std::string_view name, std::string&) override {
    present(saved_.texts, full_name(name));
  }
  bool loading() const override { return false; }

  // Call last.
  void list_unexpected() {
    unexpected(saved_.tensors);
    unexpected(saved_.integers);
    unexpected(saved_.numbers);
    unexpected(saved_.texts);
  }

  std::string problems;

 private:
  template <class T>
  bool present(const c10::Dict<std::string, T>& saved, const std::string& name) {
    seen_.insert(name);
    if (saved.contains(name)) return true;
    problems += "; '" + name + "' is missing";
    return false;
  }
  template <class T>
  void unexpected(const c10::Dict<std::string, T>& saved) {
    for (const auto& entry : saved) {
      if (!seen_.contains(entry.key())) problems += "; '" + entry.key() + "' is not known here";
    }
  }

  const Dictionaries& saved_;
  std::unordered_set<std::string> seen_;
};

class LoadVisitor final : public StateVisitor {
 public:
  explicit LoadVisitor(const Dictionaries& saved) : saved_(saved) {}

  void tensor(std::string_view name, at::Tensor& value, StateClass) override {
    value.copy_(saved_.tensors.at(full_name(name)));
  }
  void integer(std::string_view name, int64_t& value) override {
    value = saved_.integers.at(full_name(name));
  }
  void number(std::string_view name, double& value) override {
    value = saved_.numbers.at(full_name(name));
  }
  void text(std::string_view name, std::string& value) override {
    value = saved_.texts.at(full_name(name));
  }
  bool loading() const override { return true; }

 private:
  const Dictionaries& saved_;
};

// visit_state() need not call visit_groups(), so the learning rates are kept beside it.
std::vector<double> learning_rates(const torch::optim::Optimizer& optimizer) {
  std::vector<double> rates;
  for (const auto& group : optimizer.param_groups()) rates.push_back(group.options().get_lr());
  return rates;
}

// The options of a rule over those of the optimizer, and the factor on the base lr.
NamedOptimizer::GroupOptions resolve_group(const Options& options,
                                           const NamedOptimizer::GroupRule* rule, bool decayed) {
  auto values = options;
  values.set("lr_scale", 1.0);
  const double base = options.number("lr");
  if (!decayed && options.contains("weight_decay")) values.set("weight_decay", 0.0);
  if (rule != nullptr) {
    const auto where = "the optimizer group '" + rule->match + "'";
    const auto& given = rule->overrides;
    const bool own_lr = given.contains("lr");
    OUNCE_CHECK(!own_lr || !given.contains("lr_scale"), "[optimizer] ", where,
                ": expected lr or lr_scale, got both");
    OUNCE_CHECK(!own_lr || base > 0, "[optimizer] ", where,
                ": lr needs a base lr > 0; use lr_scale");
    values = given.over(values, where);
    if (own_lr) values.set("lr_scale", values.number("lr") / base);
  }
  NamedOptimizer::GroupOptions group;
  group.lr_scale = values.number_in("lr_scale", 0, 1e6);
  group.lr = base * group.lr_scale;
  for (const auto& [key, value] : values.items()) {
    if (key != "lr" && key != "lr_scale") group.values.set(key, value);
  }
  return group;
}

template <class T>
c10::Dict<std::string, T> read_dictionary(torch::serialize::InputArchive& archive,
                                          const std::string& key) {
  c10::IValue value;
  OUNCE_CHECK_AS(Fault::kData, archive.try_read(key, value) && value.isGenericDict(),
                 "[optimizer] the archive has no '", key,
                 "': it was not written by an optimizer of this library");
  return c10::impl::toTypedDict<std::string, T>(value.toGenericDict());
}

}  // namespace

NamedParameters named_parameters(const torch::nn::Module& module) {
  NamedParameters result;
  std::unordered_set<const void*> seen;
  for (const auto& item : module.named_parameters()) {
    const auto& parameter = item.value();
    if (!parameter.defined() || !parameter.requires_grad()) continue;
    if (seen.insert(parameter.unsafeGetTensorImpl()).second) {
      result.emplace_back(item.key(), parameter);
    }
  }
  return result;
}

NamedParameters named_parameters(const std::vector<at::Tensor>& parameters) {
  NamedParameters result;
  std::unordered_set<const void*> seen;
  for (size_t i = 0; i < parameters.size(); ++i) {
    const auto& parameter = parameters[i];
    if (!parameter.defined() || !parameter.requires_grad()) continue;
    if (seen.insert(parameter.unsafeGetTensorImpl()).second) {
      result.emplace_back(std::to_string(i), parameter);
    }
  }
  return result;
}

std::vector<NamedOptimizer::GroupRule> NamedOptimizer::parse_groups(const Value& group) {
  std::vector<GroupRule> rules;
  for (const auto& item : group.array()) {
    OUNCE_CHECK(item.is_table() && item.table().contains("match"),
                "[optimizer] group: expected tables with the key 'match', got ", item.to_toml());
    GroupRule rule{item.table().text("match"), {}};
    for (const auto& [key, value] : item.table().items()) {
      if (key != "match") rule.overrides.set(key, value);
    }
    rules.push_back(std::move(rule));
  }
  return rules;
}

NamedOptimizer::NamedOptimizer(NamedParameters parameters, const Options& options,
                               const std::vector<GroupRule>& rules)
    : torch::optim::Optimizer(std::vector<torch::optim::OptimizerParamGroup>{},
                              std::make_unique<GroupOptions>()) {
  std::unordered_set<std::string> names;
  for (auto& [name, parameter] : parameters) {
    OUNCE_CHECK(!name.empty() && names.insert(name).second, "[optimizer] the parameter name '",
                name, "' is empty or given twice");
    OUNCE_CHECK(parameter.defined() && parameter.is_leaf() && parameter.is_floating_point(),
                "[optimizer] '", name, "': expected a floating-point leaf tensor");
    if (index_.emplace(parameter.unsafeGetTensorImpl(), parameters_.size()).second) {
      parameters_.emplace_back(name, parameter);
    }
  }
  OUNCE_CHECK(!parameters_.empty(),
              "[optimizer] expected parameters, got none that requires a gradient");

  std::map<std::pair<int64_t, bool>, std::vector<at::Tensor>> groups;
  std::vector<bool> used(rules.size(), false);
  for (const auto& [name, parameter] : parameters_) {
    int64_t first = -1;
    for (size_t r = 0; r < rules.size(); ++r) {
      if (!glob_matches(rules[r].match, name)) continue;
      used[r] = true;
      if (first < 0) first = static_cast<int64_t>(r);
    }
    groups[{first, !decays(name, parameter)}].push_back(parameter);
  }
  for (size_t r = 0; r < rules.size(); ++r) {
    OUNCE_CHECK(used[r], "[optimizer] the group '", rules[r].match,
                "' matches no parameter; names are", some_names(parameters_));
  }
  static_cast<GroupOptions&>(*defaults_) = resolve_group(options, nullptr, true);
  for (auto& [key, members] : groups) {
    const auto* rule = key.first < 0 ? nullptr : &rules[static_cast<size_t>(key.first)];
    add_param_group({std::move(members),
                     std::make_unique<GroupOptions>(resolve_group(options, rule, !key.second))});
  }
  made_groups_ = param_groups_.size();
}

at::Tensor NamedOptimizer::step(LossClosure closure) {
  at::Tensor loss;
  if (closure) {
    const at::AutoGradMode with_grad(true);
    loss = closure();
  }
  step(StepControl{});
  return loss;
}

void NamedOptimizer::step(const StepControl& control) {
  // Their slots and settings were never made.
  for (size_t g = made_groups_; g < param_groups_.size(); ++g) {
    for (const auto& parameter : param_groups_[g].params()) index_of(parameter);
  }
  auto checked = control;
  checked.skip = checked_skip(control);
  if (hook_) hook_({});
  update(checked);
}

at::Tensor NamedOptimizer::checked_skip(const StepControl& control) const {
  std::vector<at::Tensor> skipping, raising;
  for (const auto& group : param_groups_) {
    const auto& values = static_cast<const GroupOptions&>(group.options()).values;
    const auto check = values.contains("check_finite") ? values.text("check_finite") : "off";
    if (check == "off") continue;
    for (const auto& parameter : group.params()) {
      const auto& gradient = parameter.grad();
      if (!gradient.defined() || gradient.layout() != at::kStrided) continue;
      (check == "skip" ? skipping : raising).push_back(parameter);
    }
  }
  const auto broken = [](const std::vector<at::Tensor>& parameters) {
    std::vector<at::Tensor> gradients;
    for (const auto& parameter : parameters) gradients.push_back(parameter.grad());
    return clip_by_norm(gradients, 0).found_inf;
  };
  if (!raising.empty() && broken(raising).item<float>() != 0) {
    std::vector<std::string> names;
    for (const auto& parameter : raising) {
      if (broken({parameter}).item<float>() != 0) names.push_back("'" + name_of(parameter) + "'");
    }
    fail(Fault::kProblem, "[optimizer] expected finite gradients, got an infinity or a NaN in ",
         names.empty() ? "the norm of all" : names[0],
         names.size() > 1 ? c10::str(" and ", names.size() - 1, " more") : "",
         "; nothing was changed");
  }
  if (skipping.empty()) return control.skip;
  const auto found = broken(skipping);
  return control.skip.defined() ? at::maximum(control.skip, found.to(control.skip.device()))
                                : found;
}

void NamedOptimizer::before_update(UpdateHook hook) { hook_ = std::move(hook); }

size_t NamedOptimizer::index_of(const at::Tensor& parameter) const {
  const auto found = index_.find(parameter.unsafeGetTensorImpl());
  OUNCE_CHECK(found != index_.end(), "[optimizer] a tensor of shape ", parameter.sizes(),
              " is not a parameter of this optimizer; give all parameters when it is made");
  return found->second;
}

bool NamedOptimizer::accumulate(const at::Tensor& /*parameter*/) { return false; }

const std::string& NamedOptimizer::name_of(const at::Tensor& parameter) const {
  return parameters_[index_of(parameter)].first;
}

const NamedParameters& NamedOptimizer::parameters() const { return parameters_; }

void NamedOptimizer::visit_groups(StateVisitor& visitor) {
  const auto scope = visitor.scope("groups");
  for (size_t i = 0; i < param_groups_.size(); ++i) {
    const auto group = visitor.scope(std::to_string(i));
    auto rate = param_groups_[i].options().get_lr();
    visitor.number("lr", rate);
    if (visitor.loading()) param_groups_[i].options().set_lr(rate);
  }
}

int64_t NamedOptimizer::state_bytes() const {
  int64_t bytes = 0;
  for (const auto& entry : state_of(*this).tensors)
    bytes += static_cast<int64_t>(entry.value().nbytes());
  return bytes;
}

void NamedOptimizer::save(torch::serialize::OutputArchive& archive) const {
  const auto values = state_of(*this);
  archive.write("tensors", c10::IValue(values.tensors));
  archive.write("integers", c10::IValue(values.integers));
  archive.write("numbers", c10::IValue(values.numbers));
  archive.write("texts", c10::IValue(values.texts));
  archive.write("learning_rates", c10::IValue(learning_rates(*this)));
}

void NamedOptimizer::load(torch::serialize::InputArchive& archive) {
  const Dictionaries saved{read_dictionary<at::Tensor>(archive, "tensors"),
                           read_dictionary<int64_t>(archive, "integers"),
                           read_dictionary<double>(archive, "numbers"),
                           read_dictionary<std::string>(archive, "texts")};
  c10::IValue rates_value;
  archive.read("learning_rates", rates_value);
  const auto rates = rates_value.toDoubleVector();

  CompareVisitor compare(saved);
  visit_state(compare);
  compare.list_unexpected();
  if (rates.size() != param_groups_.size()) {
    compare.problems += c10::str("; it has ", rates.size(), " groups, here ", param_groups_.size());
  }
  OUNCE_CHECK(compare.problems.empty(),
              "[optimizer] the saved state is of another optimizer or model", compare.problems);

  const at::NoGradGuard no_grad;
  LoadVisitor load(saved);
  visit_state(load);
  for (size_t i = 0; i < rates.size(); ++i) param_groups_[i].options().set_lr(rates[i]);
}

}  // namespace ounce::optim
