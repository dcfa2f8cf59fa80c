// SPDX-License-Identifier: MIT
// Which names can be stored, and what a text may look like before a parser sees it. No Torch here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace ounce::ckpt {

inline constexpr size_t kMostNameBytes = 1024;
inline constexpr const char* kReservedGroup = "_ckpt";

bool is_utf8(std::string_view text);

// "" or why a name cannot be stored: empty, too long, NUL, not UTF-8, an empty, "." or ".."
// component, the reserved group.
std::string name_problem(std::string_view name);

// How deep brackets nest in a JSON text; a parser follows any nesting, so this is asked before it.
int nesting_of(std::string_view json);

// "step_0000001000" and back; -1 for any other name.
std::string step_name(int64_t step);
int64_t parse_step_name(std::string_view name);

}  // namespace ounce::ckpt
