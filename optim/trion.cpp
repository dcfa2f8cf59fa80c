// SPDX-License-Identifier: MIT
#include <ounce/optim/adam_options.h>
#include <ounce/optim/composed_step.h>
#include <ounce/optim/trion.h>
#include <ounce/optim/trion_options.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <tuple>

namespace ounce::optim {

namespace {

using at::Tensor;

constexpr int64_t kBatch = int64_t{1} << 26;  // entries that are orthonormalised together

int64_t rank_of(int64_t rows, int64_t columns, const TrionOptions& o) {
  const auto smaller = std::min(rows, columns);
  const auto rank = optim::rank_of(smaller, o.rank, o.rank_fraction);
  return rank == 0 ? smaller : std::min(rank, smaller);
}

bool projects_columns(int64_t rows, int64_t columns, Side side) {
  return side == Side::kAuto ? rows >= columns : side == Side::kRight;
}

// sums += part
void add_measured(Tensor& sums, const Tensor& part) {
  sums = sums.defined() ? sums + part.to(sums.device()) : part;
}

double scale_of(int64_t rows, int64_t columns, StepScale scale) {
  const auto r = static_cast<double>(rows), c = static_cast<double>(columns);
  switch (scale) {
    case StepScale::kOriginal:
      return std::sqrt(std::max(1.0, r / c));
    case StepScale::kMatchRmsAdamW:
      return 0.2 * std::sqrt(std::max(r, c));
    case StepScale::kSpectral:
      return std::sqrt(r / c);
    case StepScale::kNone:
      return 1;
  }
  return 1;
}

bool takes_adamw(const std::string& name, const Tensor& parameter, const TrionOptions& o) {
  if (!o.orthonormalize || parameter.dim() < 2 || parameter.numel() == 0) return true;
  const auto rows = parameter.size(0);
  return std::max(rows, parameter.numel() / rows) > o.max_dim ||
         std::any_of(o.adamw_names.begin(), o.adamw_names.end(),
                     [&](const auto& glob) { return glob_matches(glob, name); });
}

// Rows of the matrices in one parameter.
std::vector<int64_t> split_of(int64_t rows, const std::vector<int64_t>& split) {
  if (split.empty()) return {rows};
  if (split.size() > 1 || rows % split[0] != 0) return split;
  return std::vector<int64_t>(static_cast<size_t>(rows / split[0]), split[0]);
}

}  // namespace

Trion::Trion(NamedParameters parameters, const TrionOptions& options)
    : Trion("trion", std::move(parameters), to_options(options), options.lr, options.groups) {}

Trion::Trion(const char* name, NamedParameters parameters, const Options& options, double lr,
             const std::vector<GroupRule>& groups)
    : NamedOptimizer(std::move(parameters), options, groups), name_(name), lr_(lr) {
  slots_.resize(this->parameters().size());
  auto stream = slots_.size();  // those before are of what AdamW takes
  std::map<std::tuple<size_t, int64_t, int64_t, at::ScalarType, std::string>, Bucket> buckets;
  for (size_t g = 0; g < param_groups().size(); ++g) {
    const auto& group = param_groups()[g];
    settings_.push_back(
        from_options(name, static_cast<const GroupOptions&>(group.options()).values));
    const auto& o = settings_.back();
    for (const auto& parameter : group.params()) {
      const auto index = index_of(parameter);
      const auto& full_name = name_of(parameter);
      auto& slot = slots_[index];
      const auto fresh = parameter.options().requires_grad(false).dtype(
          state_type(name, full_name, parameter, o.state_dtype));
      if (takes_adamw(full_name, parameter, o)) {
        make_moments(slot, parameter.sizes(), fresh);
        takes_fused_adamw(name, full_name, fused_tensor(parameter, slot, o, index), o);
        continue;
      }
      slot.step = at::zeros({}, fresh.dtype(at::kFloat));
      slot.momentum = at::zeros(parameter.sizes(), fresh);
      const auto columns = parameter.numel() / parameter.size(0);
      const auto split = split_of(parameter.size(0), o.split);
      const auto total = std::accumulate(split.begin(), split.end(), int64_t{0});
      OUNCE_CHECK(total == parameter.size(0), "[", name, "] '", full_name, "' ", parameter.sizes(),
                  ": expected a split into ", parameter.size(0), " rows, got ",
                  at::IntArrayRef(o.split),
                  "; give split in a group that matches what it is meant for");
      int64_t from = 0;
      for (const auto rows : split) {
        const auto n = projects_columns(rows, columns, o.side) ? columns : rows;
        if (rank_of(rows, columns, o) < std::min(rows, columns)) {
          check_basis(name, full_name, parameter, o.basis, n);
        }
        auto& bucket =
            buckets[{g, rows, columns, parameter.scalar_type(), parameter.device().str()}];
        bucket.group = g;
        bucket.rows = rows;
        bucket.columns = columns;
        bucket.pieces.push_back({index, from, stream++});
        from += rows;
      }
    }
  }
  for (auto& [key, bucket] : buckets) {
    const auto how = fused_trion(bucket);
    for (const auto& piece : bucket.pieces) {
      fuses(bucket, piece.parameter, matrix_of(bucket, piece), how);
    }
    buckets_.push_back(std::move(bucket));
  }
}

FusedTrion Trion::fused_trion(const Bucket& bucket) const {
  const auto& o = settings_[bucket.group];
  const auto rank = rank_of(bucket.rows, bucket.columns, o);
  return {.rank = rank == std::min(bucket.rows, bucket.columns) ? 0 : rank,
          .basis = o.basis,
          .norm = o.norm,
          .transposed = !projects_columns(bucket.rows, bucket.columns, o.side),
          .momentum = o.momentum,
          .nesterov = o.nesterov,
          .ns_steps = o.ns_steps,
          .iteration = o.iteration,
          .factor = scale_of(bucket.rows, bucket.columns, o.scale),
          .measures = o.statistics};
}

FusedMomentum Trion::matrix_of(const Bucket& bucket, const Bucket::Piece& piece) const {
  const auto& parameter = parameters()[piece.parameter].second;
  const auto& slot = slots_[piece.parameter];
  const auto part = [&](const Tensor& t) {
    return !t.defined() || bucket.rows == t.size(0) ? t : t.narrow(0, piece.from, bucket.rows);
  };
  return {.parameter = part(parameter),
          .gradient = part(parameter.grad()),
          .momentum = part(slot.momentum),
          .step = slot.step,
          .seed = seed_of(settings_[bucket.group].seed, piece.stream)};
}

bool Trion::fuses(const Bucket& bucket, size_t index, const FusedMomentum& matrix,
                  const FusedTrion& how) const {
  const auto& [name, parameter] = parameters()[index];
  return takes_fused(name_, settings_[bucket.group].implementation, parameter,
                     FusedSteps::why_not(matrix, how), name);
}

void Trion::orthonormal_step(const Bucket& bucket, size_t from, size_t to,
                             const StepControl& control, Measured& measured) {
  const auto& o = settings_[bucket.group];
  const auto& group = static_cast<const GroupOptions&>(param_groups()[bucket.group].options());
  const auto rows = bucket.rows, columns = bucket.columns, rank = rank_of(rows, columns, o);
  const bool full = rank == std::min(rows, columns),
             right = projects_columns(rows, columns, o.side);
  const auto side = right ? Side::kRight : Side::kLeft;
  const auto n = right ? columns : rows;
  const auto back = [&](const Tensor& low, const Tensor& indices) {
    return full ? low : dct_backproject(low, indices, n, side, o.basis);
  };

  struct Moving {
    Tensor parameter, indices, count;
    size_t stream;
    ComposedStep step;
  };
  std::vector<Moving> moving;
  std::vector<Tensor> directions;
  for (size_t i = from; i < to; ++i) {
    const auto& piece = bucket.pieces[i];
    const auto& [name, parameter] = parameters()[piece.parameter];
    auto& slot = slots_[piece.parameter];
    if (!has_gradient(name_, name, parameter, slot.step)) continue;
    const auto piece_of = [&](const Tensor& t) { return t.narrow(0, piece.from, rows); };
    const ComposedStep step(control, group, parameter, step_type(name_, name, parameter));
    const auto m = as_matrix(piece_of(slot.momentum));
    const auto g = as_matrix(step.scaled(piece_of(parameter.grad())));
    const auto b = m + g;
    const auto stream = piece.stream;
    const auto keep = [&](const Tensor& momentum) {
      step.keep(m, momentum, slot.step, seed_of(o.seed, stream) + kExpAvgSeed);
    };
    Tensor indices;
    if (full) {
      const auto kept = b * o.momentum;
      keep(kept);
      directions.push_back(o.nesterov ? g + kept : b);
    } else {
      Tensor share;
      std::tie(indices, share) = dct_select(b, rank, side, o.norm, o.basis);
      if (o.statistics) {
        const auto all = b.square().sum();
        add_measured(measured[piece.parameter],
                     at::stack({share.to(all.scalar_type()) * all, all}).to(at::kFloat));
      }
      directions.push_back(dct_project(b, indices, side, o.basis));
      keep(b - back(directions.back(), indices) * (1 - o.momentum));
    }
    moving.push_back({piece_of(parameter.detach()), indices, slot.step, stream, step});
  }
  if (moving.empty()) return;
  const auto orthonormal = newton_schulz(at::stack(directions), o.ns_steps, o.iteration);
  const auto scale = scale_of(rows, columns, o.scale);
  for (size_t i = 0; i < moving.size(); ++i) {
    const auto& [parameter, indices, count, stream, step] = moving[i];
    const auto direction = back(orthonormal[static_cast<int64_t>(i)], indices) * scale;
    step.move(parameter, direction.reshape(parameter.sizes()), o, count, stream);
  }
}

void Trion::update(const StepControl& control) {
  const at::NoGradGuard no_grad;
  Measured measured;
  // Fused steps read the counts before they advance, composed ones after.
  std::vector<Bucket> composed;
  std::vector<bool> has_composed(slots_.size());
  for (const auto& bucket : buckets_) {
    composed.push_back(fused_step(bucket, control, measured));
    for (const auto& piece : composed.back().pieces) has_composed[piece.parameter] = true;
  }
  for (size_t g = 0; g < param_groups().size(); ++g) update_group(g, control, has_composed);
  for (const auto& bucket : composed) {
    const auto together =
        static_cast<size_t>(std::max<int64_t>(1, kBatch / (bucket.rows * bucket.columns)));
    for (size_t from = 0; from < bucket.pieces.size(); from += together) {
      orthonormal_step(bucket, from, std::min(from + together, bucket.pieces.size()), control,
                       measured);
    }
  }
  for (const auto& [index, sums] : measured) {
    keep_measured(slots_[index].measured, sums, control.skip);
  }
}

NamedOptimizer::Statistics Trion::statistics() const {
  Tensor sums;
  for (const auto& slot : slots_) {
    if (slot.measured.defined()) add_measured(sums, slot.measured);
  }
  if (!sums.defined()) return {};
  const auto held = sums[0], all = sums[1];
  return {{"captured_energy", captured_energy(held, all)},
          {"residual_norm", residual_norm(held, all)}};
}

// The counts of what is orthonormalised, and AdamW.
void Trion::update_group(size_t g, const StepControl& control,
                         const std::vector<bool>& has_composed) {
  const auto& o = settings_[g];
  const auto& group = static_cast<const GroupOptions&>(param_groups()[g].options());
  const double factor = lr_ > 0 ? o.adamw_lr / lr_ : 1;
  FusedAdamWSteps fused;
  std::map<std::string, std::vector<Tensor>> counts;  // by device
  for (const auto& parameter : param_groups()[g].params()) {
    const auto index = index_of(parameter);
    auto& slot = slots_[index];
    const auto& name = name_of(parameter);
    if (!has_gradient(name_, name, parameter, slot.step)) continue;
    if (slot.momentum.defined() && !has_composed[index]) {
      counts[parameter.device().str()].push_back(slot.step);
      continue;
    }
    if (!slot.momentum.defined() && fused.take(name_, name, parameter, slot, o, index)) continue;
    ComposedStep step(control, group, parameter, step_type(name_, name, parameter));
    if (slot.momentum.defined()) {
      step.assign(slot.step, slot.step + 1);
      continue;
    }
    step.lr = step.lr * factor;
    const auto direction =
        step.adam(slot, slot.exp_avg, slot.exp_avg_sq, step.scaled(parameter.grad()), o, index);
    step.move(parameter.detach(), direction, o, slot.step, index);
  }
  for (const auto& [device, steps] : counts) {
    fused_.count(steps, fused_settings(control, group, o, steps[0].device()));
  }
  fused.step(fused_, [&](const at::Device& device) {
    auto settings = fused_settings(control, group, o, device);
    settings.lr = settings.lr * factor;
    return settings;
  });
}

// Steps what can be fused; what is left.
Trion::Bucket Trion::fused_step(const Bucket& bucket, const StepControl& control,
                                Measured& measured) {
  const auto& o = settings_[bucket.group];
  const auto& group = static_cast<const GroupOptions&>(param_groups()[bucket.group].options());
  const auto how = fused_trion(bucket);
  auto rest = bucket;
  rest.pieces.clear();
  struct Batch {
    std::vector<FusedMomentum> matrices;
    std::vector<size_t> parameters;
  };
  std::map<at::ScalarType, Batch> fused;  // by the momentum's type
  for (const auto& piece : bucket.pieces) {
    const auto& [name, parameter] = parameters()[piece.parameter];
    auto& slot = slots_[piece.parameter];
    if (!has_gradient(name_, name, parameter, slot.step)) continue;
    const auto matrix = matrix_of(bucket, piece);
    if (fuses(bucket, piece.parameter, matrix, how)) {
      auto& [matrices, indices] = fused[matrix.momentum.scalar_type()];
      matrices.push_back(matrix);
      indices.push_back(piece.parameter);
    } else {
      rest.pieces.push_back(piece);
    }
  }
  for (auto& [type, batch] : fused) {
    auto& [matrices, indices] = batch;
    const auto settings = fused_settings(control, group, o, matrices[0].parameter.device());
    const auto sums = fused_.trion(std::move(matrices), how, settings);
    for (size_t i = 0; sums.defined() && i < indices.size(); ++i) {
      add_measured(measured[indices[i]], sums[static_cast<int64_t>(i)]);
    }
  }
  return rest;
}

bool Trion::orthonormalizes(const Tensor& parameter) const {
  return slots_[index_of(parameter)].momentum.defined();
}

void Trion::visit_state(StateVisitor& visitor) {
  for (size_t i = 0; i < slots_.size(); ++i) {
    const auto scope = visitor.scope(parameters()[i].first);
    auto& slot = slots_[i];
    if (slot.momentum.defined()) {
      visitor.tensor("step", slot.step, StateClass::kStep);
      visitor.tensor("momentum", slot.momentum, StateClass::kStep);
    } else {
      visit_moments(visitor, slot);
    }
  }
  visit_groups(visitor);
}

Muon::Muon(NamedParameters parameters, const MuonOptions& options)
    : Trion("muon", std::move(parameters), write_options("muon", options), options.lr,
            options.groups) {}

void register_trion() {
  add_optimizer<Trion>("trion", "momentum, orthonormalised in the DCT columns that hold most of it",
                       kTrionDefaults.c_str(),
                       [](const Options& o) { return from_options("trion", o); });
  add_optimizer<Muon>("muon", "momentum, orthonormalised", kMuonDefaults.c_str(),
                      [](const Options& options) {
                        MuonOptions to;
                        read_options("muon", options, to);
                        return to;
                      });
}

}  // namespace ounce::optim
