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
// Of steps and sequences: what 18 digits can say.
inline constexpr int64_t kMostStep = 999'999'999'999'999'999;

// Prefixes of the folders of a root that are being written, removed and replaced.
inline constexpr const char* kTemporaryPrefix = ".tmp-";
inline constexpr const char* kTrashPrefix = ".trash-";
inline constexpr const char* kReplacedPrefix = ".old-";

bool is_utf8(std::string_view text);

// "" or why a name cannot be stored: empty, too long, NUL, not UTF-8, an empty, "." or ".."
// component, the reserved group.
std::string name_problem(std::string_view name);

// The same with '?' for control characters: names of files that others wrote, in errors of one
// line.
std::string one_line(std::string text);

// How deep brackets nest in a JSON text; a parser follows any nesting, so this is asked before it.
int nesting_of(std::string_view json);

// "step_0000001000" and back; -1 for any other name.
std::string step_name(int64_t step);
int64_t parse_step_name(std::string_view name);

// The step that ".old-step_0000001000-<uuid>" was; -1 for any other name.
int64_t parse_replaced_name(std::string_view name);

}  // namespace ounce::ckpt
