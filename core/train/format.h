// SPDX-License-Identifier: MIT
// Numbers as people read them, in a few characters.
#pragma once

#include <cstdint>
#include <string>

namespace ounce {

// "512 B", "8.1 GiB": powers of 1024.
std::string format_bytes(int64_t bytes);
// "999", "1.23k", "142k", "1.5M": three digits, powers of 1000.
std::string format_count(double count);
// "0.4s", "42s", "1m22s", "2h05m", "3d04h"; "?" where it is negative or not finite.
std::string format_duration(double seconds);
// "5.8e-4": two digits.
std::string format_scientific(double value);
// "3.412"; "nan" and "inf" as they are.
std::string format_fixed(double value, int digits);

// As one word of a shell's command line.
std::string shell_quoted(const std::string& word);

}  // namespace ounce
