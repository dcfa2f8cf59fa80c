// SPDX-License-Identifier: MIT
#include <ounce/ckpt/names.h>

#include <algorithm>

namespace ounce::ckpt {

bool is_utf8(std::string_view text) {
  for (size_t i = 0; i < text.size();) {
    const auto lead = static_cast<unsigned char>(text[i]);
    const size_t more = lead < 0x80 ? 0 : lead >= 0xF0 ? 3 : lead >= 0xE0 ? 2 : 1;
    if (more > 0 && (lead < 0xC2 || lead > 0xF4 || i + more >= text.size())) return false;
    uint32_t point = more == 0 ? lead : lead & (0x3F >> more);
    for (size_t k = 1; k <= more; ++k) {
      const auto next = static_cast<unsigned char>(text[i + k]);
      if ((next & 0xC0) != 0x80) return false;
      point = point << 6 | (next & 0x3F);
    }
    if ((more == 2 && point < 0x800) || (more == 3 && (point < 0x10000 || point > 0x10FFFF)) ||
        (point >= 0xD800 && point < 0xE000)) {
      return false;
    }
    i += more + 1;
  }
  return true;
}

std::string name_problem(std::string_view name) {
  if (name.empty()) return "is empty";
  if (name.size() > kMostNameBytes) return "is longer than 1024 bytes";
  if (name.find('\0') != std::string_view::npos) return "contains NUL";
  if (!is_utf8(name)) return "is not UTF-8";
  const auto root = name.substr(0, name.find('/'));
  if (root == kReservedGroup) return "uses the reserved group '_ckpt'";
  for (size_t start = 0; start <= name.size();) {
    const auto end = std::min(name.find('/', start), name.size());
    const auto component = name.substr(start, end - start);
    if (component.empty() || component == "." || component == "..") {
      return "has the component '" + std::string(component) + "'";
    }
    start = end + 1;
  }
  return "";
}

std::string one_line(std::string text) {
  for (auto& c : text) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) c = '?';
  }
  return text;
}

int nesting_of(std::string_view json) {
  int depth = 0, most = 0;
  bool quoted = false;
  for (size_t i = 0; i < json.size(); ++i) {
    const char c = json[i];
    if (quoted) {
      if (c == '\\') ++i;
      if (c == '"') quoted = false;
      continue;
    }
    if (c == '"') quoted = true;
    if (c == '[' || c == '{') most = std::max(most, ++depth);
    if (c == ']' || c == '}') --depth;
  }
  return most;
}

std::string step_name(int64_t step) {
  const auto digits = std::to_string(step);
  return "step_" + std::string(digits.size() < 10 ? 10 - digits.size() : 0, '0') + digits;
}

int64_t parse_step_name(std::string_view name) {
  if (name.substr(0, 5) != "step_" || name.size() < 15 || name.size() > 23) return -1;
  int64_t step = 0;
  for (const char digit : name.substr(5)) {
    if (digit < '0' || digit > '9') return -1;
    step = step * 10 + (digit - '0');
  }
  return step_name(step) == name ? step : -1;
}

int64_t parse_replaced_name(std::string_view name) {
  const std::string_view prefix = kReplacedPrefix;
  if (!name.starts_with(prefix)) return -1;
  name.remove_prefix(prefix.size());
  return parse_step_name(name.substr(0, name.rfind('-')));
}

}  // namespace ounce::ckpt
