// SPDX-License-Identifier: MIT
#include <ounce/core/data/files.h>
#include <ounce/core/device.h>
#include <ounce/core/train/format.h>
#include <ounce/core/train/run_report.h>
#include <torch/torch.h>

#include <cmath>

namespace ounce {

namespace {

int64_t parameter_count(const Model& model) {
  int64_t count = 0;
  for (const auto& parameter : model.parameters()) count += parameter.numel();
  return count;
}

}  // namespace

std::vector<std::string> start_block(Session& session, const std::optional<MemoryPlan>& plan,
                                     int64_t step, int64_t stop) {
  const auto& config = session.config;
  const auto facts = device_facts(session.device);
  const auto batch = config.integer("data.batch"), length = config.integer("data.sequence");
  std::vector<std::string> lines;
  auto device = "device   " + session.device.str() + ": " + facts.name + ", " +
                format_bytes(facts.total_bytes);
  if (session.device.is_cpu()) device += ", " + std::to_string(at::get_num_threads()) + " threads";
  if (facts.peak_bf16_flops > 0) {
    device += ", " + format_fixed(facts.peak_bf16_flops / 1e12, 0) + " TFLOP/s bf16 (for MFU)";
  }
  lines.push_back(device);
  lines.push_back("model    " + config.text("model.name") + ": " +
                  format_count(parameter_count(*session.model)) + " parameters, vocabulary " +
                  std::to_string(session.dataset->vocab_size()) + ", compute " +
                  config.text("precision.compute"));
  for (const auto& line : session.dataset->describe()) lines.push_back("data     " + line);
  const auto& counts = session.count_models();
  if (!counts.empty()) {
    std::string line = "data     count models, validation nats a token:";
    for (const auto& [name, loss] : counts) line += " " + name + " " + format_fixed(loss, 3);
    lines.push_back(line);
  }
  lines.push_back("run      steps " + std::to_string(step) + " to " + std::to_string(stop) +
                  " of " + std::to_string(config.integer("run.steps")) + ", " +
                  std::to_string(batch) + " x " + std::to_string(length) + " = " +
                  format_count(batch * length) + " tokens a step in " +
                  std::to_string(config.integer("data.accumulate")) + " part(s), optimizer " +
                  config.text("optimizer.name"));
  if (plan) {
    lines.push_back("memory");
    for (const auto& line : plan->table()) lines.push_back(line);
  }
  return lines;
}

std::vector<std::string> end_block(Session& session, const std::optional<MemoryPlan>& plan,
                                   double valid_loss) {
  std::vector<std::string> lines;
  if (!std::isnan(valid_loss)) {
    std::string line = "validation loss " + format_fixed(valid_loss, 4) + " nats a token";
    for (const auto& [name, loss] : session.count_models()) {
      line += " | " + name + " " + format_fixed(loss, 3);
    }
    lines.push_back(line);
  }
  const auto peak = memory_use(session.device).peak;
  if (plan && peak > 0) {
    lines.push_back("memory: peak " + format_bytes(peak) + ", predicted " +
                    format_bytes(plan->peak));
  }
  return lines;
}

std::vector<Record::Field> config_record(Session& session, const std::optional<MemoryPlan>& plan) {
  const auto facts = device_facts(session.device);
  std::vector<Record::Field> fields = {{"config", session.config.to_toml()},
                                       {"device", facts.name},
                                       {"driver", facts.driver},
                                       {"torch", std::string(TORCH_VERSION)},
                                       {"parameters", parameter_count(*session.model)},
                                       {"peak_flops", facts.peak_bf16_flops},
                                       {"train_tokens", session.dataset->train_tokens()},
                                       {"valid_tokens", session.dataset->valid_tokens()},
                                       {"data", session.dataset->identity()}};
  for (const auto& [name, loss] : session.count_models()) fields.emplace_back(name, loss);
  if (plan) {
    fields.emplace_back("plan_weights", plan->state.weights);
    fields.emplace_back("plan_gradients", plan->state.gradients);
    fields.emplace_back("plan_optimizer", plan->state.optimizer);
    fields.emplace_back("plan_activations", plan->activations);
    fields.emplace_back("plan_peak", plan->peak);
  }
  return fields;
}

std::string printable(const std::string& bytes) {
  std::string result;
  for (size_t i = 0; i < bytes.size();) {
    const auto length = data::utf8_length(bytes, i);
    const auto byte = static_cast<unsigned char>(bytes[i]);
    if (length == 0 || (byte < 0x20 && byte != '\n' && byte != '\t') || byte == 0x7f) {
      // A cut or broken character shows as the replacement character, once a byte.
      result += "\xef\xbf\xbd";
      i += 1;
    } else {
      result.append(bytes, i, length);
      i += length;
    }
  }
  return result;
}

}  // namespace ounce
