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

inline void check_implementation(const char* op, std::string_view how) {
  OUNCE_CHECK(how == "auto" || how == "fused" || how == "reference", "[", op,
              "] expected implementation = auto, fused or reference, got '", how, "'");
}

// Whether a call, of a name that was checked, takes the fused path. `why_not` says what keeps this
// call from it; "" = nothing. "fused" throws then. Whoever has a GPU and asks for "auto" expects
// the fused path: one warning for each reason says that it is not taken, and with OUNCE_STRICT=1
// this throws.
inline bool takes_fused(const char* op, std::string_view how, const at::Tensor& x,
                        const std::string& why_not) {
  if (how == "reference") return false;
  if (why_not.empty()) return true;
  OUNCE_CHECK(how != "fused", "[", op, "] expected a call that the fused path takes, got ", why_not,
              "; use 'auto' or 'reference'");
  if (!x.is_cuda()) return false;
  static std::mutex mutex;
  static std::set<std::string> said;
  const std::lock_guard lock(mutex);
  const char* strict = std::getenv("OUNCE_STRICT");
  const bool throws = strict != nullptr && std::string_view(strict) == "1";
  if (!throws && !said.insert(op + why_not).second) return false;
  const auto message =
      c10::str("[", op, "] expected a call that the fused path takes, got ", why_not,
               "; the composed path runs, which implementation = 'reference' asks for");
  OUNCE_CHECK(!throws, message);
  TORCH_WARN(message);
  return false;
}

inline constexpr const char* kNotBuilt = "a build without one";

}  // namespace ounce
