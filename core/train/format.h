// SPDX-License-Identifier: MIT
// Numbers as people read them, in a few characters.
#pragma once

#include <cstdint>
#include <string>

namespace ounce {

std::string format_bytes(int64_t bytes);       // "512 B", "8.1 GiB": powers of 1024
std::string format_count(double count);        // "999", "1.23k", "142k", "1.5M": three digits, powers of 1000
std::string format_duration(double seconds);   // "0.4s", "42s", "1m22s", "2h05m", "3d04h"
std::string format_scientific(double value);   // "5.8e-4": two digits
std::string format_fixed(double value, int digits);  // "3.412"; "nan" and "inf" as they are

}  // namespace ounce
