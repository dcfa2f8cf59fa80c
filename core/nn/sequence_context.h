// SPDX-License-Identifier: MIT
// What a mixer is told about the sequences of one forward pass, and the state it keeps when tokens
// come in pieces (generation).
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <string>

namespace ounce {

// State of one mixer between calls: named tensors (a KV cache, a recurrent state). Value semantics
// are shallow; clone() copies the tensors.
struct MixerState {
  int64_t length = 0;  // tokens seen so far
  std::map<std::string, at::Tensor> tensors;

  MixerState clone() const {
    MixerState copy{length, {}};
    for (const auto& [name, tensor] : tensors) copy.tensors.emplace(name, tensor.clone());
    return copy;
  }
};

struct SequenceContext {
  // int32 [n + 1] on the device, undefined = every row is one document. Boundaries of packed
  // documents over the flattened batch * length tokens: starts at 0, ends at batch * length, and
  // contains every row's start, so that no document crosses a row. State and attention do not cross
  // a boundary.
  at::Tensor cu_seqlens;
  // int64 [batch, length], undefined = 0 .. length - 1 (plus state->length). Positions restart at
  // document boundaries.
  at::Tensor positions;
  // The state of the mixer being called, or null in training. A mixer reads it, appends the tokens
  // it is given and advances `length`. Not combined with cu_seqlens.
  MixerState* state = nullptr;
};

}  // namespace ounce
