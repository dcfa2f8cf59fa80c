// SPDX-License-Identifier: MIT
// A learner turns batches into better parameters. The trainer knows nothing of gradients: it asks
// for a step and gets device tensors back.
#pragma once

#include <ounce/core/data/dataset.h>
#include <ounce/core/model/model.h>
#include <ounce/core/options.h>
#include <ounce/core/stateful.h>
#include <ounce/core/step_control.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace ounce {

// Of one step; device scalars, nothing has been synchronised.
struct StepReport {
  at::Tensor loss;     // fp32: mean over the targets that count, of all micro-batches
  at::Tensor norm;     // fp32: gradient norm before clipping (or the learner's own measure)
  at::Tensor skipped;  // fp32: nonzero where the step was not finite and changed nothing
  std::vector<std::pair<std::string, at::Tensor>> measured = {};  // fp32: what else was asked for
};

// Bytes by purpose, of everything the learner holds between steps.
struct StateBytes {
  int64_t weights = 0;
  int64_t gradients = 0;  // alive during a step
  int64_t optimizer = 0;
};

class Learner : public Stateful {
 public:
  static constexpr const char* kKind = "learner";
  struct Context {
    std::shared_ptr<Model> model;
    Value optimizer;  // spec of the optimizer to build
    at::Device device = at::kCPU;
    at::ScalarType compute = at::kFloat;  // kFloat, or kBFloat16 under autocast
  };

  // One optimizer step on the micro-batches (CPU tensors; moved here). The loss is divided by the
  // counted targets of all of them.
  virtual StepReport step(const std::vector<data::Batch>& micro_batches,
                          const StepControl& control) = 0;
  // Called in every step before it changes the model or its own state, with the tensors it is about
  // to change; empty = all of them. A checkpoint's gate goes here.
  virtual void before_update(std::function<void(at::TensorList)> hook) = 0;
  // Loss summed over the counted targets, no gradients, eval mode: fp32 device scalar.
  virtual at::Tensor evaluate(const data::Batch& batch) = 0;
  // The forward and backward pass of a step without its update, for the memory plan. Leaves
  // gradients behind on request. Returns the bytes alive after the hidden states, beyond those
  // before.
  virtual int64_t probe(const data::Batch& micro_batch, bool keep_gradients) = 0;

  virtual StateBytes state_bytes() const = 0;
  // Floating-point operations of one step over `batch` rows of `length` tokens.
  virtual double flops(int64_t batch, int64_t length) const = 0;
};

void register_learners();

// Rows [begin, end) of a batch, with the document boundaries that fall inside.
data::Batch slice_rows(const data::Batch& batch, int64_t begin, int64_t end);
// The batch on `device`; pinned and asynchronous for a GPU.
data::Batch to_device(const data::Batch& batch, at::Device device);

}  // namespace ounce
