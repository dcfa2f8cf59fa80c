// SPDX-License-Identifier: MIT
// The options of trion and muon, as tables have them and as their classes do. Included by trion.cpp
// alone.
#pragma once

#include <ounce/core/check.h>
#include <ounce/core/options.h>
#include <ounce/optim/adam_options.h>
#include <ounce/optim/composed_step.h>
#include <ounce/optim/trion.h>

#include <string>
#include <vector>

namespace ounce::optim {

inline const std::string kMomentumDefaults =
    std::string(
        R"(momentum = 0.95         # decay of the momentum
weight_decay = 0.01     # decoupled; norms, biases and embeddings take 0 unless a group says otherwise
iteration = "quintic"   # quintic | polar_express | gram: how the momentum is orthonormalised
ns_steps = 5            # of it
scale = "original"      # original | match_rms_adamw | spectral | none: of the step, by the matrix's shape
split = []              # rows of the matrices fused in one, as [2048, 512, 512]; [64]: 64 rows each
orthonormalize = true   # false: AdamW
adamw_names = ["*embed*", "head.*", "*.head.*", "*lm_head*"]  # so do these names,
max_dim = 32000         # matrices with a larger side, and vectors
adamw_lr = 3e-4         # theirs; the schedule multiplies it too
beta1 = 0.9
beta2 = 0.95
eps = 1e-8
check_finite = "off"    # off | skip | raise: of a step whose gradients hold an infinity or a NaN
)") +
    kRoundingDefaults +
    R"(group = []              # tables: match = "*qkv*", and what differs: lr_scale or any key above
)";
inline const std::string kTrionDefaults =
    std::string(R"(lr = 0.01               # base learning rate; a schedule multiplies it
nesterov = false        # a step along g + momentum b; of full rank only
rank = 256              # columns kept of the smaller side; 0 = all
rank_fraction = 0.0     # that share of it instead; 0 = rank
basis = "dct2"          # dct2 | dct3 | identity | hadamard | random
norm = 2                # 1 | 2: by which columns are ranked
side = "auto"           # auto | left | right: which side is projected
statistics = false      # log captured_energy and residual_norm
)") +
    kMomentumDefaults;
inline const std::string kMuonDefaults =
    std::string(R"(lr = 0.02               # base learning rate; a schedule multiplies it
nesterov = true         # a step along g + momentum b
)") +
    kMomentumDefaults;

inline const std::vector<std::string> kScales = {"original", "match_rms_adamw", "spectral", "none"};

// What both have.
template <class O>
Options write_options(const char* name, const O& from) {
  auto options = write_adam_options(name, from);
  options.set("momentum", from.momentum);
  options.set("nesterov", from.nesterov);
  options.set("iteration", std::string(text(from.iteration)));
  options.set("ns_steps", from.ns_steps);
  options.set("scale", kScales[static_cast<size_t>(from.scale)]);
  options.set("split", Value::Array(from.split.begin(), from.split.end()));
  options.set("orthonormalize", from.orthonormalize);
  options.set("adamw_names", Value::Array(from.adamw_names.begin(), from.adamw_names.end()));
  options.set("max_dim", from.max_dim);
  options.set("adamw_lr", from.adamw_lr);
  write_rounding_options(from, options);
  return options;
}

template <class O>
void read_options(const char* name, const Options& options, O& to) {
  read_adam_options(name, options, to);
  to.momentum = options.number_in("momentum", 0, 1);
  OUNCE_CHECK(to.momentum < 1, "[", name, "] expected momentum below 1, got ", to.momentum);
  to.nesterov = options.flag("nesterov");
  to.iteration = parse_iteration(options.text("iteration"));
  to.ns_steps = options.positive("ns_steps");
  to.scale = choice_of<StepScale>(options, "scale", kScales);
  to.split.clear();
  for (const auto& rows : options.find("split")->array()) {
    to.split.push_back(rows.integer());
    OUNCE_CHECK(to.split.back() > 0, "[", name,
                "] expected positive numbers of rows in split, got ", to.split.back());
  }
  to.orthonormalize = options.flag("orthonormalize");
  to.adamw_names = options.texts("adamw_names");
  to.max_dim = options.positive("max_dim");
  to.adamw_lr = options.number_in("adamw_lr", 0, 1e6);
  read_rounding_options(options, to);
}

// Of one group, without lr. Muon's have no rank.
inline TrionOptions from_options(const char* name, const Options& options) {
  TrionOptions to;
  read_options(name, options, to);
  if (!options.contains("rank")) {
    to.rank = 0;
    return to;
  }
  to.rank = options.non_negative("rank");
  to.rank_fraction = options.number_in("rank_fraction", 0, 1);
  to.basis = parse_basis(options.text("basis"));
  to.norm = options.positive("norm");
  OUNCE_CHECK(to.norm <= 2, "[", name, "] expected norm = 1 or 2, got ", to.norm);
  to.side = parse_side(options.text("side"));
  to.statistics = options.flag("statistics");
  OUNCE_CHECK(!to.nesterov || (to.rank == 0 && to.rank_fraction == 0), "[", name,
              "] nesterov is for full rank: expected rank = 0 with it, got rank = ", to.rank,
              ", rank_fraction = ", to.rank_fraction);
  return to;
}

inline Options to_options(const TrionOptions& from) {
  auto options = write_options("trion", from);
  options.set("rank", from.rank);
  options.set("rank_fraction", from.rank_fraction);
  options.set("basis", std::string(text(from.basis)));
  options.set("norm", from.norm);
  options.set("side", std::string(text(from.side)));
  options.set("statistics", from.statistics);
  return options;
}

}  // namespace ounce::optim
