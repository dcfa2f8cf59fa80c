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
// this throws. `name`: of x, if it has one.
inline bool takes_fused(const char* op, std::string_view how, const at::Tensor& x,
                        const std::string& why_not, std::string_view name = {}) {
  if (how == "reference") return false;
  if (why_not.empty()) return true;
  const auto message = [&](const char* what_then) {
    const auto of = name.empty() ? "" : c10::str("'", name, "' ", x.scalar_type(), x.sizes(), ": ");
    return c10::str("[", op, "] ", of, "expected what the fused path takes, got ", why_not,
                    what_then);
  };
  OUNCE_CHECK(how != "fused", message("; use 'auto' or 'reference'"));
  if (!x.is_cuda()) return false;
  static std::mutex mutex;
  static std::set<std::string> said;
  const std::lock_guard lock(mutex);
  const char* strict = std::getenv("OUNCE_STRICT");
  const bool throws = strict != nullptr && std::string_view(strict) == "1";
  if (!throws && !said.insert(op + why_not).second) return false;
  const auto composed =
      message("; the composed path runs, which implementation = 'reference' asks for");
  OUNCE_CHECK(!throws, composed);
  TORCH_WARN(composed);
  return false;
}

inline constexpr const char* kNotBuilt = "a build without one";

}  // namespace ounce
