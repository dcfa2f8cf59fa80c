// SPDX-License-Identifier: MIT
// What the optimizers that are composed of ATen share: one step of one parameter, all of it on the
// device. Included by their .cpp files alone.
#pragma once

#include <ounce/core/check.h>
#include <ounce/kernels/common/implementation.h>
#include <ounce/optim/dct.h>
#include <ounce/optim/fused_step.h>
#include <ounce/optim/named_optimizer.h>
#include <ounce/optim/rounding_streams.h>
#include <ounce/optim/stochastic_rounding.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace ounce::optim {

// [d_0, the rest]
inline at::Tensor as_matrix(const at::Tensor& t) { return t.dim() == 2 ? t : t.flatten(1); }

// Of the smaller side; fraction 0 = rank.
inline int64_t rank_of(int64_t smaller, int64_t rank, double fraction) {
  if (fraction == 0) return rank;
  return std::max<int64_t>(1, std::llround(fraction * static_cast<double>(smaller)));
}

// In which a parameter's step is computed. fp16 has no room for weights that no loss scale
// protects.
inline at::ScalarType step_type(const char* optimizer, const std::string& name,
                                const at::Tensor& parameter) {
  const auto type = parameter.scalar_type();
  OUNCE_CHECK(type == at::kFloat || type == at::kDouble || type == at::kBFloat16, "[", optimizer,
              "] '", name, "' is ", type, ": expected fp32, fp64 or bf16 parameters");
  return type == at::kDouble ? at::kDouble : at::kFloat;
}
// In which its state is kept, `asked` being state_dtype: fp64 of fp64 parameters.
inline at::ScalarType state_type(const char* optimizer, const std::string& name,
                                 const at::Tensor& parameter, at::ScalarType asked) {
  const auto type = step_type(optimizer, name, parameter);
  return type == at::kDouble ? type : asked;
}

// Keys of what is rounded to bf16, and of who computes. O: state_dtype, stochastic_rounding, seed,
// implementation.
inline const std::string kRoundingDefaults =
    R"(state_dtype = "fp32"    # fp32 | bf16, rounded stochastically: in which moments are kept
stochastic_rounding = true  # of bf16 parameters; false: to nearest
seed = 0                # of that
implementation = "auto"  # auto | fused | reference: fused refuses what the fused step does not take
)";
template <class O>
void write_rounding_options(const O& from, Options& options) {
  options.set("state_dtype", std::string(from.state_dtype == at::kFloat ? "fp32" : "bf16"));
  options.set("stochastic_rounding", from.stochastic_rounding);
  options.set("seed", from.seed);
  options.set("implementation", from.implementation);
}
template <class O>
void read_rounding_options(const Options& options, O& to) {
  to.state_dtype =
      options.choice("state_dtype", {"fp32", "bf16"}) == "fp32" ? at::kFloat : at::kBFloat16;
  to.stochastic_rounding = options.flag("stochastic_rounding");
  to.seed = options.integer("seed");
  to.implementation = options.choice("implementation", {"auto", "fused", "reference"});
}

// How a parameter is projected.
struct Projection {
  int64_t n, longer;  // of the side that is projected, and the other
  int64_t rank;
  bool transposed;  // the rows are projected
};
// Its keys, and those of how bf16 parameters are rounded.
inline const std::string kProjectionDefaults = R"(project = true          # false: AdamW
min_dim = 0             # matrices with a smaller side take AdamW; 0 = twice the rank
max_dim = 32000         # so do those with a larger one
)" + kRoundingDefaults;
template <class O>
void write_projection_options(const O& from, Options& options) {
  options.set("rank", from.rank);
  options.set("rank_fraction", from.rank_fraction);
  options.set("update_interval", from.update_interval);
  options.set("side", std::string(text(from.side)));
  options.set("project", from.project);
  options.set("min_dim", from.min_dim);
  options.set("max_dim", from.max_dim);
  write_rounding_options(from, options);
}
template <class O>
void read_projection_options(const Options& options, O& to) {
  to.rank = options.positive("rank");
  to.rank_fraction = options.number_in("rank_fraction", 0, 1);
  to.update_interval = options.positive("update_interval");
  to.side = parse_side(options.text("side"));
  to.project = options.flag("project");
  to.min_dim = options.non_negative("min_dim");
  to.max_dim = options.positive("max_dim");
  read_rounding_options(options, to);
}

// By those keys.
template <class O>
bool asks_for_projection(const at::Tensor& parameter, const O& o) {
  return o.project && parameter.dim() > 1 && parameter.numel() > 0;
}
// That a matrix with this smaller side needs.
template <class O>
int64_t least_side(int64_t smaller, const O& o) {
  return o.min_dim > 0 ? o.min_dim : 2 * rank_of(smaller, o.rank, o.rank_fraction);
}
// Nothing: it takes AdamW.
template <class O>
std::optional<Projection> projection_of(const char* optimizer, const std::string& name,
                                        const at::Tensor& parameter, const O& o) {
  if (!asks_for_projection(parameter, o)) return {};
  const auto rows = parameter.size(0), columns = parameter.numel() / rows;
  const auto [small, large] = std::minmax(rows, columns);
  if (small < least_side(small, o) || large > o.max_dim) return {};
  const auto rank = rank_of(small, o.rank, o.rank_fraction);
  const bool transposed = o.side == Side::kAuto ? rows < columns : o.side == Side::kLeft;
  const auto n = transposed ? rows : columns;
  OUNCE_CHECK(rank <= n, "[", optimizer, "] '", name, "' ", parameter.sizes(),
              ": expected a rank of at most ", n, ", got ", rank,
              "; lower rank, raise min_dim, or set project = false in a group of its own");
  return Projection{n, rows + columns - n, rank, transposed};
}

// At the end of a construction that projected nothing: who asks for a low rank should not get AdamW
// of everything unawares. settings: as groups.
template <class O>
void warn_of_no_projection(const char* optimizer,
                           const std::vector<torch::optim::OptimizerParamGroup>& groups,
                           const std::vector<O>& settings) {
  for (size_t g = 0; g < groups.size(); ++g) {
    for (const auto& parameter : groups[g].params()) {
      if (!asks_for_projection(parameter, settings[g])) continue;
      const auto rows = parameter.size(0);
      const auto small = std::min(rows, parameter.numel() / rows);
      TORCH_WARN("[", optimizer, "] no matrix is projected, all take AdamW: of ", parameter.sizes(),
                 " expected a smaller side of at least ", least_side(small, settings[g]),
                 " and a larger one of at most ", settings[g].max_dim,
                 "; choose a smaller rank or min_dim");
      return;
    }
  }
}

// Of a parameter or of its projection.
inline std::vector<int64_t> moment_sizes(const at::Tensor& parameter,
                                         const std::optional<Projection>& projection) {
  return projection ? std::vector<int64_t>{projection->longer, projection->rank}
                    : parameter.sizes().vec();
}

// Of a parameter's stochastic rounding.
inline uint64_t seed_of(int64_t seed, size_t stream) {
  return (static_cast<uint64_t>(seed) << 32) ^ stream;
}

// The learning rate of a group's step, a scalar.
inline at::Tensor rate_of(const StepControl& control, const NamedOptimizer::GroupOptions& group,
                          const at::Device& device, at::ScalarType type) {
  if (!control.lr.defined()) {
    return at::full({}, group.lr, at::TensorOptions(type).device(device));
  }
  const auto lr = control.lr.to(device, type);
  return group.lr_scale == 1 ? lr : lr * group.lr_scale;
}

struct ComposedStep {
  at::Tensor lr, grad_scale, skip;  // scalars on the device; the last two may be undefined

  ComposedStep(const StepControl& control, const NamedOptimizer::GroupOptions& group,
               const at::Tensor& parameter, at::ScalarType type) {
    const auto scalar = [&](const at::Tensor& t) {
      return t.defined() ? t.to(parameter.device(), type) : at::Tensor();
    };
    lr = rate_of(control, group, parameter.device(), type);
    grad_scale = scalar(control.grad_scale);
    if (control.skip.defined()) skip = scalar(control.skip).ne(0);
  }

  // Where `skip` is not set.
  void assign(at::Tensor to, const at::Tensor& value) const {
    to.copy_(skip.defined() ? at::where(skip, to, value) : value);
  }

  // A moment of step `step`, rounded stochastically where it is kept in bf16.
  void keep(const at::Tensor& to, const at::Tensor& value, const at::Tensor& step,
            uint64_t seed) const {
    const bool rounds = to.scalar_type() == at::kBFloat16;
    assign(to, rounds ? round_stochastically(value.to(at::kFloat), step, seed) : value);
  }

  // Times grad_scale, in the step's dtype.
  at::Tensor scaled(const at::Tensor& gradient) const {
    const auto exact = gradient.to(lr.scalar_type());
    return grad_scale.defined() ? exact * grad_scale : exact;
  }

  // The moments m and v of this gradient (or its projection) a -> the direction of the step; keeps
  // what they become in `slot`. O: beta1, beta2, eps, seed; `stream` differs between parameters.
  template <class Slot, class O>
  at::Tensor adam(Slot& slot, at::Tensor m, at::Tensor v, const at::Tensor& a, const O& o,
                  size_t stream) const {
    const auto t = slot.step + 1;
    m = m.to(a.scalar_type()) * o.beta1 + a * (1 - o.beta1);
    v = v.to(a.scalar_type()) * o.beta2 + a.square() * (1 - o.beta2);
    const auto exact = t.to(a.scalar_type());
    const auto first = 1 - at::pow(o.beta1, exact), second = 1 - at::pow(o.beta2, exact);
    const auto direction = (m / first) / ((v / second).sqrt_() + o.eps);
    const auto seed = seed_of(o.seed, stream);
    keep(slot.exp_avg, m, t, seed + kExpAvgSeed);
    keep(slot.exp_avg_sq, v, t, seed + kExpAvgSqSeed);
    assign(slot.step, t);
    return direction;
  }

  // p = (1 - lr weight_decay) p - lr direction; `step` has been counted, `stream` differs between
  // tensors. O: weight_decay, stochastic_rounding, seed.
  template <class O>
  void move(at::Tensor p, const at::Tensor& direction, const O& o, const at::Tensor& step,
            size_t stream) const {
    auto moved = p.to(lr.scalar_type()) * (1 - lr * o.weight_decay) - direction * lr;
    if (p.scalar_type() == at::kBFloat16) {
      moved = o.stochastic_rounding ? round_stochastically(moved, step, seed_of(o.seed, stream))
                                    : moved.to(at::kBFloat16);
    }
    assign(p, moved);
  }
};

// What a step measured, unless `skip`, which may be undefined: in place, as a CUDA graph repeats
// it.
inline void keep_measured(at::Tensor& kept, const at::Tensor& measured, const at::Tensor& skip) {
  if (!kept.defined()) kept = at::zeros_like(measured);
  kept.copy_(skip.defined() ? at::where(skip.to(kept.device()).ne(0), kept, measured) : measured);
}

// Of sums of squares: of what the columns hold, and of all.
inline at::Tensor captured_energy(const at::Tensor& held, const at::Tensor& all) {
  return held / all.masked_fill(all == 0, 1);
}
inline at::Tensor residual_norm(const at::Tensor& held, const at::Tensor& all) {
  return (all - held).clamp_min(0).sqrt();
}

// A parameter's part of a fused AdamW step.
template <class Slot, class O>
FusedTensor fused_tensor(const at::Tensor& parameter, const Slot& slot, const O& o, size_t index) {
  return {.parameter = parameter,
          .gradient = parameter.grad(),
          .exp_avg = slot.exp_avg,
          .exp_avg_sq = slot.exp_avg_sq,
          .step = slot.step,
          .seed = seed_of(o.seed, index)};
}
// Of one kind, in one launch.
using FusedKind = std::tuple<at::DeviceIndex, at::ScalarType, at::ScalarType>;
inline FusedKind kind_of(const FusedTensor& t) {
  return {t.parameter.device().index(), t.parameter.scalar_type(), t.exp_avg.scalar_type()};
}

// The same for a fused step. O: beta1, beta2, eps, weight_decay, stochastic_rounding.
template <class O>
FusedSettings fused_settings(const StepControl& control, const NamedOptimizer::GroupOptions& group,
                             const O& o, const at::Device& device) {
  const auto scalar = [&](const at::Tensor& t) {
    return t.defined() ? t.to(device, at::kFloat) : at::Tensor();
  };
  return {.lr = rate_of(control, group, device, at::kFloat),
          .grad_scale = scalar(control.grad_scale),
          .skip = scalar(control.skip),
          .beta1 = o.beta1,
          .beta2 = o.beta2,
          .eps = o.eps,
          .weight_decay = o.weight_decay,
          .stochastic_rounding = o.stochastic_rounding,
          .consume_gradients = control.consume_gradients};
}

// Whether AdamW's step of a parameter is fused. Optimizers ask at construction as well: it is there
// that "fused" is refused, if it has to be, and "auto" warns.
template <class O>
bool takes_fused_adamw(const char* optimizer, const std::string& name, const FusedTensor& tensor,
                       const O& o) {
  return takes_fused(optimizer, o.implementation, tensor.parameter, FusedSteps::why_not(tensor),
                     name);
}

// A group's parameters that take a fused AdamW step, a launch for each kind.
class FusedAdamWSteps {
 public:
  // False: it takes the composed step.
  template <class Slot, class O>
  bool take(const char* optimizer, const std::string& name, const at::Tensor& parameter,
            const Slot& slot, const O& o, size_t index) {
    auto tensor = fused_tensor(parameter, slot, o, index);
    if (!takes_fused_adamw(optimizer, name, tensor, o)) return false;
    kinds_[kind_of(tensor)].push_back(std::move(tensor));
    return true;
  }
  // settings(device)
  template <class F>
  void step(FusedSteps& fused, const F& settings) const {
    for (const auto& [kind, tensors] : kinds_) {
      fused.adamw(tensors, settings(tensors[0].parameter.device()));
    }
  }

 private:
  std::map<FusedKind, std::vector<FusedTensor>> kinds_;
};

// At construction, so that no step finds it out.
inline void check_basis(const char* optimizer, const std::string& name, const at::Tensor& parameter,
                        Basis basis, int64_t n) {
  OUNCE_CHECK(basis != Basis::kHadamard || (n & (n - 1)) == 0, "[", optimizer, "] '", name, "' ",
              parameter.sizes(), ": expected a power of two for a hadamard basis, got ", n);
}

// Whether there is a gradient to step along; Fault::kUsage where it is none that can be.
inline bool has_gradient(const char* optimizer, const std::string& name,
                         const at::Tensor& parameter, const at::Tensor& state) {
  const auto& gradient = parameter.grad();
  if (!gradient.defined() || parameter.numel() == 0) return false;
  OUNCE_CHECK(gradient.layout() == at::kStrided && gradient.sizes() == parameter.sizes(), "[",
              optimizer, "] '", name, "': expected a dense gradient of ", parameter.sizes(),
              ", got ", gradient.toString(), gradient.sizes());
  OUNCE_CHECK(state.device() == parameter.device(), "[", optimizer, "] '", name, "' was on ",
              state.device(), " when the optimizer was made and is on ", parameter.device(),
              "; move a model before making its optimizer");
  return true;
}

}  // namespace ounce::optim
