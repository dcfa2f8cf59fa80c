// SPDX-License-Identifier: MIT
#include <ATen/CPUGeneratorImpl.h>
#include <ounce/core/check.h>
#include <ounce/core/model/generate.h>
#include <torch/torch.h>

namespace ounce {

namespace {

// Puts a module in eval mode while it lives.
class EvalGuard {
 public:
  explicit EvalGuard(torch::nn::Module& module) : module_(module), training_(module.is_training()) {
    module_.eval();
  }
  ~EvalGuard() { module_.train(training_); }

 private:
  torch::nn::Module& module_;
  bool training_;
};

int64_t draw(const at::Tensor& logits_v, const GenerateOptions& options, at::Generator& generator) {
  if (options.temperature == 0) return logits_v.argmax().item<int64_t>();
  auto scaled = logits_v / options.temperature;
  if (options.top_k > 0 && options.top_k < scaled.numel()) {
    const auto smallest_kept = std::get<0>(scaled.topk(options.top_k)).min();
    scaled = scaled.masked_fill(scaled < smallest_kept, -std::numeric_limits<double>::infinity());
  }
  return at::multinomial(at::softmax(scaled, -1), 1, false, generator).item<int64_t>();
}

}  // namespace

std::vector<int64_t> generate(Model& model, const std::vector<int64_t>& prompt,
                              const GenerateOptions& options,
                              const std::function<bool(int64_t)>& on_token) {
  OUNCE_CHECK(!prompt.empty(), "[generate] the prompt needs at least one token");
  OUNCE_CHECK(options.temperature >= 0, "[generate] temperature: expected at least 0, got ",
              options.temperature);
  OUNCE_CHECK(options.tokens >= 0, "[generate] tokens: expected at least 0, got ", options.tokens);
  const torch::NoGradGuard no_grad;
  const EvalGuard eval(model);
  const auto device = model.head_weight().device();
  auto generator = at::make_generator<at::CPUGeneratorImpl>(options.seed);
  auto states = model.make_states(1, static_cast<int64_t>(prompt.size()) + options.tokens);
  std::vector<int64_t> produced;
  auto input = torch::tensor(prompt, at::kLong).unsqueeze(0);
  for (int64_t i = 0; i < options.tokens; ++i) {
    SequenceContext context;
    const auto hidden = model.hidden(input.to(device), context, &states);
    const auto last = hidden.select(1, hidden.size(1) - 1).squeeze(0);
    const auto logits = at::linear(last, model.head_weight()).to(at::kCPU, at::kFloat);
    const auto token = draw(logits, options, generator);
    produced.push_back(token);
    if (on_token && !on_token(token)) break;
    input = at::full({1, 1}, token, at::kLong);
  }
  return produced;
}

}  // namespace ounce
