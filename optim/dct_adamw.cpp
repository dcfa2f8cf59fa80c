// SPDX-License-Identifier: MIT
#include <ounce/optim/adam_options.h>
#include <ounce/optim/dct_adamw.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>

namespace ounce::optim {

namespace {

using at::Tensor;

constexpr const char* kDefaults =
    R"(lr = 1e-3               # base learning rate; a schedule multiplies it
beta1 = 0.9             # decay of the first moment
beta2 = 0.999           # decay of the second moment
eps = 1e-8              # added to the root of the second moment
weight_decay = 0.01     # decoupled; norms, biases and embeddings take 0 unless a group says otherwise
rank = 256              # columns kept of the smaller side
rank_fraction = 0.0     # that share of it instead; 0 = rank
update_interval = 1     # gradients between choices of the columns
basis = "dct2"          # dct2 | dct3 | identity | hadamard | random
norm = 2                # 1 | 2: by which columns are ranked
side = "auto"           # auto | left | right: which side is projected
rotate = true           # moments follow their basis vectors
residual = "none"       # none | ef | sign | fira: what becomes of what the projection leaves out
residual_scale = 1.0    # of the signs' step
estimate_fresh_columns = true  # a new column's second moment begins with its mean square, not with 0
project = true          # false: AdamW
min_dim = 0             # matrices with a smaller side take AdamW; 0 = twice the rank
max_dim = 32000         # so do those with a larger one
group = []              # tables: match = "*norm*", and what differs: lr_scale or any key above
)";

const std::vector<std::string> kResiduals = {"none", "ef", "sign", "fira"};
constexpr double kNormGrowth = 1.01;  // of a Fira step

Options to_options(const DctAdamWOptions& from) {
  Options options;
  options.set("lr", from.lr);
  options.set("beta1", from.beta1);
  options.set("beta2", from.beta2);
  options.set("eps", from.eps);
  options.set("weight_decay", from.weight_decay);
  options.set("rank", from.rank);
  options.set("rank_fraction", from.rank_fraction);
  options.set("update_interval", from.update_interval);
  options.set("basis", std::string(text(from.basis)));
  options.set("norm", from.norm);
  options.set("side", std::string(text(from.side)));
  options.set("rotate", from.rotate);
  options.set("residual", kResiduals[static_cast<size_t>(from.residual)]);
  options.set("residual_scale", from.residual_scale);
  options.set("estimate_fresh_columns", from.estimate_fresh_columns);
  options.set("project", from.project);
  options.set("min_dim", from.min_dim);
  options.set("max_dim", from.max_dim);
  return options;
}

// Of one group, whose lr is kept by the group itself; checks the ranges.
DctAdamWOptions from_options(const Options& options) {
  DctAdamWOptions to;
  read_adam_options("dct_adamw", options, to);
  to.rank = options.positive("rank");
  to.rank_fraction = options.number_in("rank_fraction", 0, 1);
  to.update_interval = options.positive("update_interval");
  to.basis = parse_basis(options.text("basis"));
  to.norm = options.positive("norm");
  to.side = parse_side(options.text("side"));
  to.rotate = options.flag("rotate");
  const auto& residual = options.choice("residual", kResiduals);
  to.residual = static_cast<Residual>(std::find(kResiduals.begin(), kResiduals.end(), residual) -
                                      kResiduals.begin());
  to.residual_scale = options.number_in("residual_scale", 0, 1e6);
  to.estimate_fresh_columns = options.flag("estimate_fresh_columns");
  to.project = options.flag("project");
  to.min_dim = options.non_negative("min_dim");
  to.max_dim = options.positive("max_dim");
  OUNCE_CHECK(to.norm <= 2, "[dct_adamw] expected norm = 1 or 2, got ", to.norm);
  return to;
}

// [d_0, the rest]
Tensor matrix(const Tensor& t) { return t.dim() == 2 ? t : t.flatten(1); }

int64_t rank_of(int64_t n, const DctAdamWOptions& o) {
  if (o.rank_fraction == 0) return o.rank;
  return std::max<int64_t>(1, std::llround(o.rank_fraction * static_cast<double>(n)));
}

bool projects(const Tensor& parameter, const DctAdamWOptions& o) {
  if (!o.project || parameter.dim() < 2 || parameter.numel() == 0) return false;
  const auto rows = parameter.size(0), columns = parameter.numel() / rows;
  const auto [small, large] = std::minmax(rows, columns);
  return small >= (o.min_dim > 0 ? o.min_dim : 2 * rank_of(small, o)) && large <= o.max_dim;
}

}  // namespace

// t, m, v and the rest of one parameter after a step, where `skip` is not set.
struct DctAdamW::Step {
  const DctAdamWOptions& o;
  Tensor lr, grad_scale, skip;  // scalars on the device; the last two may be undefined

  void assign(Tensor to, const Tensor& value) const {
    to.copy_(skip.defined() ? at::where(skip, to, value) : value);
  }

  // The moments of this gradient (or its projection) -> the direction of the step.
  Tensor adam(Slot& slot, Tensor m, Tensor v, const Tensor& a) const {
    const auto t = slot.step + 1;
    m = m * o.beta1 + a * (1 - o.beta1);
    v = v * o.beta2 + a.square() * (1 - o.beta2);
    const auto exact = t.to(a.scalar_type());
    const auto first = 1 - at::pow(o.beta1, exact), second = 1 - at::pow(o.beta2, exact);
    const auto direction = (m / first) / ((v / second).sqrt_() + o.eps);
    assign(slot.exp_avg, m);
    assign(slot.exp_avg_sq, v);
    assign(slot.step, t);
    return direction;
  }

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

  Tensor projected(Slot& slot, const Tensor& gradient) const {
    auto g = slot.transposed ? gradient.t() : gradient;
    const auto n = g.size(1);
    if (slot.residual.defined()) {
      g = g + (slot.transposed ? matrix(slot.residual).t() : matrix(slot.residual));
    }
    auto indices = slot.indices;
    const bool chooses = slot.gradients++ % o.update_interval == 0;
    if (chooses) {
      indices = std::get<0>(dct_select(g, indices.size(0), Side::kRight, o.norm, o.basis));
    }
    const auto a = dct_project(g, indices, Side::kRight, o.basis);
    auto m = slot.exp_avg, v = slot.exp_avg_sq;
    if (chooses && o.rotate) follow(slot, indices, a, m, v);
    const auto back = [&](const Tensor& low) {
      const auto full = dct_backproject(low, indices, n, Side::kRight, o.basis);
      return slot.transposed ? full.t() : full;
    };
    const auto low = adam(slot, m, v, a);
    if (chooses) assign(slot.indices, indices);
    auto direction = back(low);
    if (o.residual == Residual::kNone) return direction;
    const auto rest = (slot.transposed ? g.t() : g) - back(a);
    if (o.residual == Residual::kErrorFeedback) {
      assign(matrix(slot.residual), rest);
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

  void operator()(const Tensor& parameter, Slot& slot) const {
    auto gradient = parameter.grad().to(parameter.scalar_type());
    if (grad_scale.defined()) gradient = gradient * grad_scale;
    const auto direction = slot.indices.defined()
                               ? projected(slot, matrix(gradient)).reshape(parameter.sizes())
                               : adam(slot, slot.exp_avg, slot.exp_avg_sq, gradient);
    const auto p = parameter.detach();
    assign(p, p * (1 - lr * o.weight_decay) - direction * lr);
  }
};

DctAdamW::DctAdamW(NamedParameters parameters, const DctAdamWOptions& options)
    : NamedOptimizer(std::move(parameters), to_options(options), options.groups) {
  OUNCE_CHECK(options.lr >= 0, "[dct_adamw] expected lr >= 0, got ", options.lr);
  refuse_16_bit("dct_adamw");
  slots_.resize(this->parameters().size());
  for (const auto& group : param_groups()) {
    settings_.push_back(from_options(static_cast<const GroupOptions&>(group.options()).values));
    const auto& o = settings_.back();
    for (const auto& parameter : group.params()) {
      auto& slot = slots_[index_of(parameter)];
      const auto fresh = parameter.options().requires_grad(false);
      slot.step = at::zeros({}, fresh.dtype(at::kFloat));
      if (!projects(parameter, o)) {
        slot.exp_avg = at::zeros(parameter.sizes(), fresh);
        slot.exp_avg_sq = at::zeros(parameter.sizes(), fresh);
        continue;
      }
      const auto rows = parameter.size(0), columns = parameter.numel() / rows;
      slot.transposed = o.side == Side::kAuto ? rows < columns : o.side == Side::kLeft;
      const auto n = slot.transposed ? rows : columns, rank = rank_of(std::min(rows, columns), o);
      OUNCE_CHECK(rank <= n, "[dct_adamw] '", name_of(parameter), "' ", parameter.sizes(),
                  ": expected a rank of at most ", n, ", got ", rank,
                  "; lower rank, raise min_dim, or set project = false in a group of its own");
      OUNCE_CHECK(o.basis != Basis::kHadamard || (n & (n - 1)) == 0, "[dct_adamw] '",
                  name_of(parameter), "' ", parameter.sizes(),
                  ": expected a power of two for a hadamard basis, got ", n);
      slot.exp_avg = at::zeros({rows + columns - n, rank}, fresh);
      slot.exp_avg_sq = at::zeros_like(slot.exp_avg);
      slot.indices = at::arange(rank, fresh.dtype(at::kInt));
      if (o.residual == Residual::kErrorFeedback) {
        slot.residual = at::zeros(parameter.sizes(), fresh);
      }
      if (o.residual == Residual::kFira) slot.residual_norm = at::zeros({}, fresh);
    }
  }
}

void DctAdamW::update(const StepControl& control) {
  const at::NoGradGuard no_grad;
  for (size_t g = 0; g < param_groups().size(); ++g) {
    const auto& options = static_cast<const GroupOptions&>(param_groups()[g].options());
    for (const auto& parameter : param_groups()[g].params()) {
      const auto& gradient = parameter.grad();
      if (!gradient.defined() || parameter.numel() == 0) continue;
      auto& slot = slots_[index_of(parameter)];
      OUNCE_CHECK(gradient.layout() == at::kStrided && gradient.sizes() == parameter.sizes(),
                  "[dct_adamw] '", name_of(parameter), "': expected a dense gradient of ",
                  parameter.sizes(), ", got ", gradient.toString(), gradient.sizes());
      OUNCE_CHECK(slot.exp_avg.device() == parameter.device(), "[dct_adamw] '", name_of(parameter),
                  "' was on ", slot.exp_avg.device(), " when the optimizer was made and is on ",
                  parameter.device(), "; move a model before making its optimizer");
      const auto scalar = [&](const Tensor& t) {
        return t.defined() ? t.to(parameter.device(), parameter.scalar_type()) : Tensor();
      };
      const auto lr = control.lr.defined()
                          ? scalar(control.lr) * options.lr_scale
                          : at::full({}, options.lr, parameter.options().requires_grad(false));
      const auto skip = control.skip.defined() ? scalar(control.skip).ne(0) : Tensor();
      Step{settings_[g], lr, scalar(control.grad_scale), skip}(parameter, slot);
    }
  }
}

Tensor DctAdamW::indices_of(const Tensor& parameter) const {
  return slots_[index_of(parameter)].indices;
}

void DctAdamW::visit_state(StateVisitor& visitor) {
  for (size_t i = 0; i < slots_.size(); ++i) {
    const auto scope = visitor.scope(parameters()[i].first);
    auto& slot = slots_[i];
    visitor.tensor("step", slot.step, StateClass::kStep);
    visitor.tensor("exp_avg", slot.exp_avg, StateClass::kStep);
    visitor.tensor("exp_avg_sq", slot.exp_avg_sq, StateClass::kStep);
    if (!slot.indices.defined()) continue;
    visitor.tensor("indices", slot.indices, StateClass::kStep);
    visitor.integer("gradients", slot.gradients);
    if (slot.residual.defined()) visitor.tensor("residual", slot.residual, StateClass::kStep);
    if (slot.residual_norm.defined()) {
      visitor.tensor("residual_norm", slot.residual_norm, StateClass::kStep);
    }
  }
  visit_groups(visitor);
}

int64_t DctAdamW::state_bytes() const {
  int64_t bytes = 0;
  for (const auto& slot : slots_) {
    bytes += bytes_of({&slot.step, &slot.exp_avg, &slot.exp_avg_sq, &slot.indices, &slot.residual,
                       &slot.residual_norm});
  }
  return bytes;
}

void register_dct_adamw() {
  add_optimizer<DctAdamW>("dct_adamw", "AdamW in the DCT columns that hold most of each gradient",
                          kDefaults, from_options);
}

}  // namespace ounce::optim
