// SPDX-License-Identifier: MIT
// The option `implementation` of the operators: auto | fused | reference.
#pragma once

#include <ATen/core/Tensor.h>
#include <ounce/core/check.h>

#include <cstdlib>
#include <mutex>
#include <set>
#include <string>
#include <string_view>

namespace ounce {

// No family has device code yet.
inline void check_implementation(const char* op, std::string_view how) {
  OUNCE_CHECK(how == "auto" || how == "fused" || how == "reference", "[", op,
              "] expected implementation = auto, fused or reference, got '", how, "'");
  OUNCE_CHECK(how != "fused", "[", op,
              "] expected an implementation that is built, got 'fused', of which this build has "
              "none; use 'auto' or 'reference'");
}

// Called where the reference path runs. Whoever has a GPU and asks for "auto" expects the fused
// path: one warning an operator says that it is not taken, and with OUNCE_STRICT=1 this throws.
inline void note_reference(const char* op, std::string_view how, const at::Tensor& x) {
  if (how != "auto" || !x.is_cuda()) return;
  const auto message = c10::str("[", op,
                                "] expected a fused path on a GPU, got none in this build; the "
                                "composed one runs, which implementation = 'reference' asks for");
  const char* strict = std::getenv("OUNCE_STRICT");
  OUNCE_CHECK(strict == nullptr || std::string_view(strict) != "1", message);
  static std::mutex mutex;
  static std::set<std::string> said;
  const std::lock_guard lock(mutex);
  if (said.insert(op).second) TORCH_WARN(message);
}

}  // namespace ounce
