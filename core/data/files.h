// SPDX-License-Identifier: MIT
// Files of a dataset: finding, reading, checking, and telling them apart.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace ounce::data {

// The files that each pattern (a path, or a glob with * ? [...]; "~/" is the home folder) names, in
// the order of the patterns, bytewise order within one. A pattern without a match is Fault::kData;
// `key` is the option that the patterns are from.
std::vector<std::string> expand_globs(const std::vector<std::string>& patterns,
                                      std::string_view key);

// Fault::kUsage when a file is in both lists, by name.
void check_disjoint(const std::vector<std::string>& files,
                    const std::vector<std::string>& valid_files);

// The whole file. Missing, unreadable or empty is Fault::kData.
std::string read_file(const std::string& path);

// Bytes of the well-formed character (Unicode 15, table 3-7) at `text[at]`, or 0.
size_t utf8_length(std::string_view text, size_t at);

// The offset of the first byte that is not part of well-formed UTF-8.
std::optional<size_t> find_invalid_utf8(std::string_view text);

// 64-bit XXH3.
uint64_t hash64(std::string_view bytes);

// 16 hex digits over a sequence of numbers.
std::string identity_of(const std::vector<uint64_t>& parts);

}  // namespace ounce::data
