// SPDX-License-Identifier: MIT
#pragma once

#include <ounce/core/train/learner.h>

#include <cstdint>
#include <string>
#include <vector>

namespace ounce {

// Bytes a step needs, by purpose. Weights, gradients and optimizer state are counted; activations
// and the peak are measured on smaller micro-batches and extrapolated, since both grow linearly in
// rows.
struct MemoryPlan {
  StateBytes state;
  int64_t activations = 0;  // alive between the forward pass and the loss
  int64_t peak = 0;         // predicted peak of a whole step, everything included; 0 = not measured
  int64_t free = 0;         // of the device, beyond the peak; negative where it does not fit

  // What the loss and temporaries add at the peak. Gradients grow while activations are freed, so
  // this can be 0.
  int64_t loss_and_workspace() const;
  // One line a purpose, in MiB or GiB.
  std::vector<std::string> table() const;
  // The three cheapest ways to need less, with what each saves.
  std::vector<std::string> remedies(int64_t accumulate) const;
};

// Runs up to three forward and backward passes on a part of `batch` (the rows of one micro-batch);
// with `accumulates` gradients are alive meanwhile, as in all but the first of several. Parameters
// and state stay as they are; the generators move.
MemoryPlan measure_memory_plan(Learner& learner, const data::Batch& batch, bool accumulates,
                               at::Device device);

// Fault::kProblem where `bytes` more are not free on the device: a CPU's kernel would end the
// process without a word.
void check_fits(int64_t bytes, const char* what, at::Device device);

bool is_out_of_memory(const c10::Error& error);

}  // namespace ounce
