// SPDX-License-Identifier: MIT
#pragma once

namespace ounce {

// Fills the registries with everything this library brings. Idempotent. The only place that knows
// every family.
void register_builtins();

}  // namespace ounce
