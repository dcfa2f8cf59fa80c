// SPDX-License-Identifier: MIT
#include <ounce/core/train/format.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cmath>
#include <cstdio>
#include <cstring>

namespace ounce {

namespace {

template <class... Args>
std::string print(const char* format, Args... args) {
  char buffer[400];  // %.9f of the largest double fits
  std::snprintf(buffer, sizeof buffer, format, args...);
  return buffer;
}

}  // namespace

std::string shell_quoted(const std::string& word) {
  const auto plain = [](char c) {
    return std::isalnum(static_cast<unsigned char>(c)) != 0 ||
           std::strchr("_-./:=,+@%", c) != nullptr;
  };
  if (!word.empty() && std::all_of(word.begin(), word.end(), plain)) return word;
  std::string quoted = "'";
  for (const char c : word) quoted += c == '\'' ? "'\\''" : std::string(1, c);
  return quoted + "'";
}

std::string format_bytes(int64_t bytes) {
  static constexpr std::array units = {"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  auto value = static_cast<double>(bytes);
  if (std::fabs(value) < 1024) return std::to_string(bytes) + " B";
  size_t unit = 0;
  // 1023.95 would be rounded to 1024.0 of the smaller unit.
  for (value /= 1024; std::fabs(value) >= 1023.95 && unit + 1 < units.size(); ++unit) value /= 1024;
  return print("%.1f %s", value, units[unit]);
}

std::string format_count(double count) {
  static constexpr std::array units = {"", "k", "M", "G", "T", "P"};
  if (!std::isfinite(count)) return print("%g", count);
  size_t unit = 0;
  while (std::fabs(count) >= 999.5 && unit + 1 < units.size()) {
    count /= 1000;
    ++unit;
  }
  return print("%.3g%s", count, units[unit]);
}

std::string format_duration(double seconds) {
  if (!std::isfinite(seconds) || seconds < 0) return "?";
  if (seconds < 9.95) return print("%.1fs", seconds);
  if (seconds > 1e15) return "?";
  const auto whole = std::llround(seconds);
  if (whole < 60) return print("%llds", whole);
  if (whole < 3600) return print("%lldm%02llds", whole / 60, whole % 60);
  if (whole < 86400) return print("%lldh%02lldm", whole / 3600, whole % 3600 / 60);
  return print("%lldd%02lldh", whole / 86400, whole % 86400 / 3600);
}

std::string format_scientific(double value) {
  if (value == 0 || !std::isfinite(value)) return print("%g", value);
  const auto text = print("%.1e", value);
  const auto e = text.find('e');
  return text.substr(0, e + 1) + std::to_string(std::stoi(text.substr(e + 1)));
}

std::string format_fixed(double value, int digits) { return print("%.*f", digits, value); }

}  // namespace ounce
