// SPDX-License-Identifier: MIT
#include <ounce/core/autocast.h>
#include <ounce/core/check.h>
#include <ounce/core/device.h>
#include <ounce/core/registry.h>
#include <ounce/core/train/learner.h>
#include <ounce/optim/clip.h>
#include <ounce/optim/layerwise.h>
#include <ounce/optim/named_optimizer.h>
#include <torch/torch.h>

namespace ounce {

namespace {

// Backpropagation, global norm clipping, and a step of the configured optimizer.
class GradientLearner : public Learner {
 public:
  GradientLearner(const Options& options, const Context& context)
      : model_(context.model),
        device_(context.device),
        compute_(context.compute),
        clip_(options.number_in("clip", 0, 1e30)) {
    const bool layerwise = options.flag("layerwise");
    OUNCE_CHECK(!layerwise || clip_ == 0,
                "[gradient] layerwise: the norm to clip by is known only when all have stepped; "
                "expected clip = 0 with it, got ",
                clip_);
    parameters_ = optim::named_parameters(*model_);
    optimizer_ = registry<optim::NamedOptimizer>().make(context.optimizer, {parameters_});
    for (const auto& [name, parameter] : parameters_) tensors_.push_back(parameter);
    if (layerwise) stepper_ = std::make_unique<optim::LayerwiseStepper>(*optimizer_);
  }

  StepReport step(const std::vector<data::Batch>& micro_batches,
                  const StepControl& control) override {
    int64_t counted = 0;
    for (const auto& batch : micro_batches) counted += batch.counted;
    model_->train();
    optimizer_->zero_grad();
    if (stepper_) return layerwise_step(micro_batches, counted, control);
    at::Tensor total;
    for (const auto& batch : micro_batches) {
      const auto loss = forward(to_device(batch, device_));
      backward(loss / static_cast<double>(std::max<int64_t>(counted, 1)));
      total = total.defined() ? total + loss.detach() : loss.detach();
    }
    const ProfileRange range("optimizer");
    const torch::NoGradGuard no_grad;
    std::vector<at::Tensor> gradients;
    for (const auto& tensor : tensors_) gradients.push_back(tensor.grad());
    const auto clip = optim::clip_by_norm(gradients, clip_);
    auto update = control;
    update.grad_scale = clip.scale;
    update.skip = at::logical_or(clip.found_inf, at::isfinite(total).logical_not()).to(at::kFloat);
    update.consume_gradients = true;
    optimizer_->step(update);
    return {total / static_cast<double>(std::max<int64_t>(counted, 1)), clip.norm, update.skip,
            optimizer_->statistics()};
  }

  void before_update(std::function<void(at::TensorList)> hook) override {
    optimizer_->before_update(std::move(hook));
  }

  at::Tensor evaluate(const data::Batch& batch) override {
    const torch::NoGradGuard no_grad;
    model_->eval();
    const auto loss = forward(to_device(batch, device_));
    model_->train();
    return loss;
  }

  int64_t probe(const data::Batch& micro_batch, bool keep_gradients) override {
    model_->train();
    const auto batch = to_device(micro_batch, device_);
    if (stepper_) stepper_->pause(true);
    const auto before = memory_use(device_).current;
    int64_t activations = 0;
    {
      at::Tensor loss;
      {
        const AutocastGuard autocast(device_.type(), compute_);
        SequenceContext context{batch.cu_seqlens, batch.positions, nullptr};
        const auto hidden = model_->hidden(batch.tokens, context);
        activations = memory_use(device_).current - before;
        loss = model_->loss_sum(hidden, batch.targets);
      }
      loss.backward();
    }
    synchronize(device_);
    if (!keep_gradients) optimizer_->zero_grad();
    return activations;
  }

  StateBytes state_bytes() const override {
    StateBytes bytes;
    for (const auto& tensor : tensors_) bytes.weights += static_cast<int64_t>(tensor.nbytes());
    bytes.gradients = bytes.weights;
    if (stepper_) {
      bytes.gradients = 0;
      for (const auto& tensor : tensors_)
        bytes.gradients = std::max(bytes.gradients, static_cast<int64_t>(tensor.nbytes()));
    }
    bytes.optimizer = optimizer_->state_bytes();
    return bytes;
  }

  double flops(int64_t batch, int64_t length) const override {
    return 3 * model_->flops(batch, length);
  }

  void visit_state(StateVisitor& visitor) override {
    {
      const auto scope = visitor.scope("model");
      visit_module(*model_, visitor);
    }
    const auto scope = visitor.scope("optim");
    optimizer_->visit_state(visitor);
  }

 private:
  at::Tensor forward(const data::Batch& batch) {
    const ProfileRange range("forward");
    const AutocastGuard autocast(device_.type(), compute_);
    SequenceContext context{batch.cu_seqlens, batch.positions, nullptr};
    return model_->loss_sum(model_->hidden(batch.tokens, context), batch.targets);
  }

  // The last backward is the step.
  StepReport layerwise_step(const std::vector<data::Batch>& micro_batches, int64_t counted,
                            const StepControl& control) {
    stepper_->pause(false);
    stepper_->set_control(control);
    at::Tensor total;
    for (size_t i = 0; i < micro_batches.size(); ++i) {
      stepper_->accumulate(i + 1 < micro_batches.size());
      const auto loss = forward(to_device(micro_batches[i], device_)) /
                        static_cast<double>(std::max<int64_t>(counted, 1));
      backward(loss);
      total = total.defined() ? total + loss.detach() : loss.detach();
    }
    stepper_->flush();
    const auto norm = stepper_->take_norm();
    return {total, norm, norm.isfinite().logical_not().to(at::kFloat), optimizer_->statistics()};
  }

  static void backward(const at::Tensor& loss) {
    const ProfileRange range("backward");
    loss.backward();
  }

  std::shared_ptr<Model> model_;
  at::Device device_;
  at::ScalarType compute_;
  double clip_;
  optim::NamedParameters parameters_;
  std::vector<at::Tensor> tensors_;
  std::shared_ptr<optim::NamedOptimizer> optimizer_;
  std::unique_ptr<optim::LayerwiseStepper> stepper_;  // null: steps come after backward
};

}  // namespace

data::Batch slice_rows(const data::Batch& batch, int64_t begin, int64_t end) {
  data::Batch part;
  part.tokens = batch.tokens.slice(0, begin, end);
  part.targets = batch.targets.slice(0, begin, end);
  part.counted = part.targets.ne(data::kIgnoredTarget).sum().item<int64_t>();
  if (batch.cu_seqlens.defined()) {
    const auto length = batch.tokens.size(1);
    const auto& bounds = batch.cu_seqlens;
    const auto inside = bounds.ge(begin * length).logical_and(bounds.le(end * length));
    part.cu_seqlens = bounds.masked_select(inside) - static_cast<int>(begin * length);
    part.positions = batch.positions.slice(0, begin, end);
  }
  return part;
}

data::Batch to_device(const data::Batch& batch, at::Device device) {
  const auto move = [&](const at::Tensor& tensor) {
    if (!tensor.defined() || tensor.device() == device) return tensor;
    return tensor.contiguous().pin_memory().to(device, /*non_blocking=*/true);
  };
  return {move(batch.tokens), move(batch.targets), move(batch.cu_seqlens), move(batch.positions),
          batch.counted};
}

void register_learners() {
  registry<Learner>().add(
      {.name = "gradient",
       .doc = "backpropagation, clipping by global norm, and the configured optimizer",
       .defaults =
           "clip = 1.0         # largest global gradient norm; 0 = no clipping\n"
           "layerwise = false  # step inside backward and free each gradient; needs clip = 0\n"},
      [](const Options& options, const Learner::Context& context) {
        return std::make_shared<GradientLearner>(options, context);
      });
}

}  // namespace ounce
