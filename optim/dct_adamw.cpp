// SPDX-License-Identifier: MIT
#include <ounce/optim/adam_options.h>
#include <ounce/optim/composed_step.h>
#include <ounce/optim/dct_adamw.h>
#include <ounce/optim/int8_blocks.h>

#include <algorithm>
#include <map>
#include <tuple>
#include <utility>

namespace ounce::optim {

namespace {

using at::Tensor;

const std::string kDefaults =
    std::string(
        R"(lr = 1e-3               # base learning rate; a schedule multiplies it
beta1 = 0.9             # decay of the first moment
beta2 = 0.999           # decay of the second moment
eps = 1e-8              # added to the root of the second moment
weight_decay = 0.01     # decoupled; norms, biases and embeddings take 0 unless a group says otherwise
check_finite = "off"    # off | skip | raise: of a step whose gradients hold an infinity or a NaN
rank = 256              # columns kept of the smaller side
rank_fraction = 0.0     # that share of it instead; 0 = rank
update_interval = 1     # gradients between choices of the columns
basis = "dct2"          # dct2 | dct3 | identity | hadamard | random
norm = 2                # 1 | 2: by which columns are ranked
side = "auto"           # auto | left | right: which side is projected
rotate = true           # moments follow their basis vectors
residual = "none"       # none | ef | sign | fira: what becomes of what the projection leaves out
residual_scale = 1.0    # of the signs' step
residual_type = "fp32"  # fp32 | bf16 | int8: in which ef is kept
statistics = false      # log captured_energy, index_churn and residual_norm
estimate_fresh_columns = true  # a new column's second moment begins with its mean square, not with 0
)") +
    kProjectionDefaults +
    R"(group = []              # tables: match = "*norm*", and what differs: lr_scale or any key above
)";

const std::vector<std::string> kResiduals = {"none", "ef", "sign", "fira"};
const std::vector<std::string> kResidualTypes = {"fp32", "bf16", "int8"};
constexpr double kNormGrowth = 1.01;  // of a Fira step

Options to_options(const DctAdamWOptions& from) {
  auto options = write_adam_options("dct_adamw", from);
  options.set("basis", std::string(text(from.basis)));
  options.set("norm", from.norm);
  options.set("rotate", from.rotate);
  options.set("residual", kResiduals[static_cast<size_t>(from.residual)]);
  options.set("residual_scale", from.residual_scale);
  options.set("residual_type", kResidualTypes[static_cast<size_t>(from.residual_type)]);
  options.set("estimate_fresh_columns", from.estimate_fresh_columns);
  options.set("statistics", from.statistics);
  write_projection_options(from, options);
  return options;
}

// Of one group, whose lr is kept by the group itself; checks the ranges.
DctAdamWOptions from_options(const Options& options) {
  DctAdamWOptions to;
  read_adam_options("dct_adamw", options, to);
  to.basis = parse_basis(options.text("basis"));
  to.norm = options.positive("norm");
  to.rotate = options.flag("rotate");
  to.residual = choice_of<Residual>(options, "residual", kResiduals);
  to.residual_scale = options.number_in("residual_scale", 0, 1e6);
  to.residual_type = choice_of<ResidualType>(options, "residual_type", kResidualTypes);
  to.estimate_fresh_columns = options.flag("estimate_fresh_columns");
  to.statistics = options.flag("statistics");
  read_projection_options(options, to);
  OUNCE_CHECK(to.norm <= 2, "[dct_adamw] expected norm = 1 or 2, got ", to.norm);
  return to;
}

}  // namespace

struct DctAdamW::Step : ComposedStep {
  const DctAdamWOptions& o;

  // a: of the new columns. m, v of the old ones -> of the new.
  void follow(const Slot& slot, const Tensor& indices, const Tensor& a, Tensor& m,
              Tensor& v) const {
    const auto same = slot.indices.unsqueeze(1).eq(indices.unsqueeze(0));
    const auto kept = same.any(0), source = same.to(at::kByte).argmax(0);
    m = m.index_select(1, source).masked_fill_(kept.logical_not(), 0);
    auto fresh = at::zeros_like(kept, a.options());
    if (o.estimate_fresh_columns) {
      fresh = a.square().mean(0) * (1 - at::pow(o.beta2, slot.step.to(a.scalar_type())));
    }
    v = at::where(kept, v.index_select(1, source), fresh);
  }

  static Tensor kept_residual(const Slot& slot, at::ScalarType type) {
    const auto kept = as_matrix(slot.residual);
    return slot.residual_scales.defined() ? from_int8_blocks(kept, slot.residual_scales, type)
                                          : kept.to(type);
  }
  void keep_residual(const Slot& slot, const Tensor& rest, size_t index) const {
    const auto kept = as_matrix(slot.residual);
    if (!slot.residual_scales.defined()) {
      return keep(kept, rest, slot.step, seed_of(o.seed, index) + kResidualSeed);
    }
    const auto [bytes, scales] = to_int8_blocks(rest);
    assign(kept, bytes);
    assign(slot.residual_scales, scales);
  }

  Tensor projected(Slot& slot, const Tensor& gradient, size_t index) const {
    auto g = slot.transposed ? gradient.t() : gradient;
    const auto n = g.size(1);
    if (slot.residual.defined()) {
      const auto residual = kept_residual(slot, g.scalar_type());
      g = g + (slot.transposed ? residual.t() : residual);
    }
    const bool adds = slot.pending.defined();
    const auto [indices, chooses] = adds ? slot.pending_columns : next_columns(slot, g, o);
    auto a = dct_project(g, indices, Side::kRight, o.basis);
    if (adds) a = a + scaled(std::exchange(slot.pending, Tensor()));
    if (chooses && !adds && o.statistics) {
      const auto kept = slot.indices.unsqueeze(1).eq(indices.unsqueeze(0)).any(0);
      const auto fresh = kept.logical_not().sum().to(a.scalar_type());
      keep_measured(slot.measured,
                    at::stack({a.square().sum(), g.square().sum(), fresh}).to(at::kFloat), skip);
    }
    auto m = slot.exp_avg, v = slot.exp_avg_sq;
    if (chooses && o.rotate) follow(slot, indices, a, m, v);
    const auto back = [&, indices = indices](const Tensor& low) {
      const auto full = dct_backproject(low, indices, n, Side::kRight, o.basis);
      return slot.transposed ? full.t() : full;
    };
    const auto low = adam(slot, m, v, a, o, index);
    if (chooses) assign(slot.indices, indices);
    auto direction = back(low);
    if (o.residual == Residual::kNone) return direction;
    const auto rest = (slot.transposed ? g.t() : g) - back(a);
    if (o.residual == Residual::kErrorFeedback) {
      keep_residual(slot, rest, index);
    } else if (o.residual == Residual::kSign) {
      direction = direction + rest.sign() * o.residual_scale;
    } else {
      direction = direction + fira(slot, rest, low, a);
    }
    return direction;
  }

  Tensor fira(Slot& slot, const Tensor& rest, const Tensor& low, const Tensor& a) const {
    const auto size = a.norm(2, {1});
    const auto factor = low.norm(2, {1}) / size.masked_fill(size.eq(0), 1);
    auto step = rest * factor.unsqueeze(slot.transposed ? 0 : 1);
    const auto norm = step.norm(), most = slot.residual_norm * kNormGrowth;
    const auto limited = at::where(most.gt(0).logical_and_(norm > most), most, norm);
    step = step * (limited / norm.masked_fill(norm.eq(0), 1));
    assign(slot.residual_norm, limited);
    return step;
  }

  void operator()(const Tensor& parameter, Slot& slot, size_t index) const {
    const auto gradient = scaled(parameter.grad());
    const auto direction =
        slot.indices.defined()
            ? projected(slot, as_matrix(gradient), index).reshape(parameter.sizes())
            : adam(slot, slot.exp_avg, slot.exp_avg_sq, gradient, o, index);
    move(parameter.detach(), direction, o, slot.step, index);
  }
};

DctAdamW::DctAdamW(NamedParameters parameters, const DctAdamWOptions& options)
    : NamedOptimizer(std::move(parameters), to_options(options), options.groups) {
  slots_.resize(this->parameters().size());
  for (const auto& group : param_groups()) {
    settings_.push_back(from_options(static_cast<const GroupOptions&>(group.options()).values));
    const auto& o = settings_.back();
    std::map<std::vector<int64_t>, std::vector<size_t>> shapes;  // {}: of what is not projected
    for (const auto& parameter : group.params()) {
      const auto index = index_of(parameter);
      auto& slot = slots_[index];
      slot.group = settings_.size() - 1;
      const auto fresh = parameter.options().requires_grad(false).dtype(
          state_type("dct_adamw", name_of(parameter), parameter, o.state_dtype));
      const auto projection = projection_of("dct_adamw", name_of(parameter), parameter, o);
      make_moments(slot, moment_sizes(parameter, projection), fresh);
      shapes[projection ? parameter.sizes().vec() : std::vector<int64_t>()].push_back(index);
      if (!projection) continue;
      check_basis("dct_adamw", name_of(parameter), parameter, o.basis, projection->n);
      slot.transposed = projection->transposed;
      slot.indices = at::arange(projection->rank, fresh.dtype(at::kInt));
      const auto exact = fresh.dtype(step_type("dct_adamw", name_of(parameter), parameter));
      if (o.residual == Residual::kErrorFeedback) {
        const auto type = o.residual_type == ResidualType::kFp32   ? exact
                          : o.residual_type == ResidualType::kBf16 ? fresh.dtype(at::kBFloat16)
                                                                   : fresh.dtype(at::kChar);
        slot.residual = at::zeros(parameter.sizes(), type);
        if (o.residual_type == ResidualType::kInt8) {
          const auto rows = parameter.size(0);
          slot.residual_scales =
              at::zeros({rows, int8_blocks(parameter.numel() / rows)}, fresh.dtype(at::kFloat));
        }
      }
      if (o.residual == Residual::kFira) slot.residual_norm = at::zeros({}, exact);
    }
    auto& lists = lists_.emplace_back();
    for (auto& [sizes, list] : shapes) lists.push_back(std::move(list));
    std::stable_sort(lists.begin(), lists.end(),
                     [](const auto& a, const auto& b) { return a.size() < b.size(); });
  }
  for (size_t i = 0; i < slots_.size(); ++i) fuses(i, tensor_of(i));
  if (std::none_of(slots_.begin(), slots_.end(), [](const Slot& s) { return s.indices.defined(); }))
    warn_of_no_projection("dct_adamw", param_groups(), settings_);
}

struct DctAdamW::Batch {
  std::vector<FusedTensor> tensors;
  std::vector<Slot*> slots;
};
// What its parameters share.
struct DctAdamW::Alike {
  FusedKind kind;
  bool projected;
  int64_t rows, columns, rank;
  bool transposed, chooses;

  auto operator<=>(const Alike&) const = default;
};

std::map<DctAdamW::Alike, DctAdamW::Batch> DctAdamW::fused_of(const std::vector<size_t>& list,
                                                              size_t group_index,
                                                              const StepControl& control) {
  const auto& o = settings_[group_index];
  const auto& group = static_cast<const GroupOptions&>(param_groups()[group_index].options());
  std::map<Alike, Batch> fused;
  for (const auto index : list) {
    const auto& [name, parameter] = parameters()[index];
    auto& slot = slots_[index];
    if (!has_gradient("dct_adamw", name, parameter, slot.exp_avg)) continue;
    auto tensor = tensor_of(index);
    if (!fuses(index, tensor)) {
      const auto exact = step_type("dct_adamw", name, parameter);
      Step{{control, group, parameter, exact}, o}(parameter, slot, index);
      continue;
    }
    Alike alike{.kind = kind_of(tensor)};
    if (slot.indices.defined()) {
      alike = {alike.kind,
               true,
               parameter.size(0),
               parameter.numel() / parameter.size(0),
               slot.indices.size(0),
               slot.transposed,
               slot.gradients++ % o.update_interval == 0};
    }
    auto& batch = fused[alike];
    batch.tensors.push_back(std::move(tensor));
    batch.slots.push_back(&slot);
  }
  return fused;
}

void DctAdamW::update(const StepControl& control) {
  const at::NoGradGuard no_grad;
  for (size_t g = 0; g < lists_.size(); ++g) {
    const auto& o = settings_[g];
    const auto& group = static_cast<const GroupOptions&>(param_groups()[g].options());
    FusedSettings settings;
    std::vector<Tensor> steps;
    const auto step = [&](const Alike& alike, Batch& batch) {
      const auto device = batch.tensors[0].parameter.device();
      if (!settings.lr.defined() || settings.lr.device() != device) {
        fused_.count(std::exchange(steps, {}), settings);
        settings = fused_settings(control, group, o, device);
      }
      if (!alike.projected) return fused_.adamw(batch.tensors, settings);
      const auto measured = fused_.low_rank(std::move(batch.tensors),
                                            {.basis = o.basis,
                                             .norm = o.norm,
                                             .transposed = alike.transposed,
                                             .chooses = alike.chooses,
                                             .rotate = o.rotate,
                                             .estimate_fresh_columns = o.estimate_fresh_columns,
                                             .measures = o.statistics},
                                            settings);
      for (size_t i = 0; i < batch.slots.size(); ++i) {
        auto& slot = *batch.slots[i];
        steps.push_back(slot.step);
        if (!measured.defined()) continue;
        keep_measured(slot.measured, measured[static_cast<int64_t>(i)], settings.skip);
      }
    };
    try {
      for (const auto& list : lists_[g]) {
        for (auto& [alike, batch] : fused_of(list, g, control)) step(alike, batch);
      }
    } catch (...) {
      fused_.count(steps, settings);  // of what has stepped
      throw;
    }
    fused_.count(steps, settings);
  }
}

bool DctAdamW::accumulate(const Tensor& parameter) {
  const at::NoGradGuard no_grad;
  auto& slot = slots_[index_of(parameter)];
  const auto& name = name_of(parameter);
  if (!slot.indices.defined() || !has_gradient("dct_adamw", name, parameter, slot.exp_avg)) {
    return false;
  }
  const auto& o = settings_[slot.group];
  OUNCE_CHECK(o.residual == Residual::kNone, "[dct_adamw] '", name,
              "': expected residual = none where projected gradients are accumulated, got ",
              kResiduals[static_cast<size_t>(o.residual)]);
  auto g = as_matrix(parameter.grad()).to(step_type("dct_adamw", name, parameter));
  if (slot.transposed) g = g.t();
  const bool first = !slot.pending.defined();
  if (first) slot.pending_columns = next_columns(slot, g, o);
  const auto a = dct_project(g, slot.pending_columns.indices, Side::kRight, o.basis);
  slot.pending = first ? a : slot.pending + a;
  return true;
}

// g: with the projected side last.
DctAdamW::Columns DctAdamW::next_columns(Slot& slot, const Tensor& g, const DctAdamWOptions& o) {
  if (slot.gradients++ % o.update_interval != 0) return {slot.indices, false};
  const auto rank = slot.indices.size(0);
  return {std::get<0>(dct_select(g, rank, Side::kRight, o.norm, o.basis)), true};
}

NamedOptimizer::Statistics DctAdamW::statistics() const {
  std::vector<Tensor> all;
  int64_t columns = 0;
  for (const auto& slot : slots_) {
    if (!slot.measured.defined()) continue;
    all.push_back(all.empty() ? slot.measured : slot.measured.to(all[0].device()));
    columns += slot.indices.size(0);
  }
  if (all.empty()) return {};
  const auto sums = at::stack(all).sum(0), held = sums[0], total = sums[1];
  return {{"captured_energy", captured_energy(held, total)},
          {"index_churn", sums[2] / static_cast<double>(columns)},
          {"residual_norm", residual_norm(held, total)}};
}

FusedTensor DctAdamW::tensor_of(size_t index) const {
  const auto& slot = slots_[index];
  auto tensor = fused_tensor(parameters()[index].second, slot, settings_[slot.group], index);
  tensor.indices = slot.indices;
  tensor.residual = slot.residual;
  tensor.residual_scales = slot.residual_scales;
  return tensor;
}

bool DctAdamW::fuses(size_t index, const FusedTensor& tensor) const {
  const auto& [name, parameter] = parameters()[index];
  const auto& slot = slots_[index];
  const auto& o = settings_[slot.group];
  const auto why_not = [&]() -> std::string {
    if (!slot.indices.defined()) return FusedSteps::why_not(tensor);
    if (o.residual == Residual::kSign || o.residual == Residual::kFira) {
      return "residual = " + kResiduals[static_cast<size_t>(o.residual)];
    }
    if (slot.pending.defined()) return "projected gradients that add up";
    return FusedSteps::why_not(tensor, {.basis = o.basis, .transposed = slot.transposed});
  };
  return takes_fused("dct_adamw", o.implementation, parameter, why_not(), name);
}

Tensor DctAdamW::indices_of(const Tensor& parameter) const {
  return slots_[index_of(parameter)].indices;
}

void DctAdamW::visit_state(StateVisitor& visitor) {
  for (size_t i = 0; i < slots_.size(); ++i) {
    const auto scope = visitor.scope(parameters()[i].first);
    auto& slot = slots_[i];
    visit_moments(visitor, slot);
    if (!slot.indices.defined()) continue;
    visitor.tensor("indices", slot.indices, StateClass::kStep);
    visitor.integer("gradients", slot.gradients);
    if (slot.residual.defined()) visitor.tensor("residual", slot.residual, StateClass::kStep);
    if (slot.residual_scales.defined()) {
      visitor.tensor("residual_scales", slot.residual_scales, StateClass::kStep);
    }
    if (slot.residual_norm.defined()) {
      visitor.tensor("residual_norm", slot.residual_norm, StateClass::kStep);
    }
  }
  visit_groups(visitor);
}

void register_dct_adamw() {
  add_optimizer<DctAdamW>("dct_adamw", "AdamW in the DCT columns that hold most of each gradient",
                          kDefaults.c_str(), from_options);
}

}  // namespace ounce::optim
