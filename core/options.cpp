// SPDX-License-Identifier: MIT
#include <ounce/core/check.h>
#include <ounce/core/options.h>
#include <toml++/toml.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <sstream>

namespace ounce {

namespace {

Value from_node(const toml::node& node, std::string_view source);

Options from_table(const toml::table& table, std::string_view source) {
  // toml++ sorts keys; the order of the source is kept for printing.
  std::vector<std::pair<toml::source_position, std::string>> order;
  for (const auto& [key, node] : table) {
    order.emplace_back(key.source().begin, std::string(key.str()));
  }
  std::sort(order.begin(), order.end());
  Options options;
  for (const auto& [position, key] : order) {
    // Keys of the file may hold dots; paths cannot reach them, so they are refused.
    OUNCE_CHECK(key.find('.') == std::string::npos && !key.empty(), "[config] ", source, ": key '",
                key, "' may not be empty or contain a dot");
    options.set(key, from_node(*table.get(key), source));
  }
  return options;
}

Value from_node(const toml::node& node, std::string_view source) {
  if (const auto* table = node.as_table()) return from_table(*table, source);
  if (const auto* array = node.as_array()) {
    Value::Array values;
    for (const auto& element : *array) values.push_back(from_node(element, source));
    return values;
  }
  if (const auto* flag = node.as_boolean()) return flag->get();
  if (const auto* integer = node.as_integer()) return static_cast<int64_t>(integer->get());
  if (const auto* number = node.as_floating_point()) return number->get();
  if (const auto* text = node.as_string()) return std::string(text->get());
  fail(Fault::kUsage, "[config] ", source, ":", node.source().begin.line,
       ": dates and times are not used here; write a string");
}

// A basic string, always on one line.
std::string toml_string(std::string_view text) {
  std::string result = "\"";
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      result += '\\';
      result += c;
    } else if (byte < 0x20 || byte == 0x7f) {
      char buffer[8];
      std::snprintf(buffer, sizeof buffer, "\\u%04X", byte);
      result += buffer;
    } else {
      result += c;
    }
  }
  return result + '"';
}

std::string toml_key(const std::string& key) {
  const auto bare = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' ||
           c == '-';
  };
  return std::all_of(key.begin(), key.end(), bare) ? key : toml_string(key);
}

std::string number_toml(double number) {
  if (std::isnan(number)) return "nan";
  if (std::isinf(number)) return number < 0 ? "-inf" : "inf";
  char buffer[40];
  const auto [end, error] = std::to_chars(buffer, buffer + sizeof buffer, number);
  std::string result(buffer, end);
  if (result.find_first_of(".e") == std::string::npos) result += ".0";
  return result;
}

bool is_part(const Value& value) { return value.is_table() && value.table().contains("name"); }

bool is_part_spec(const Value& value) {
  if (value.is_array()) {
    return std::all_of(value.array().begin(), value.array().end(),
                       [](const Value& item) { return item.is_text() || is_part(item); });
  }
  return value.is_text() || is_part(value);
}

bool same_type(const Value& value, const Value& standard) {
  if (standard.is_flag()) return value.is_flag();
  if (standard.is_integer()) return value.is_integer();
  if (standard.is_number()) return value.is_number();
  if (standard.is_text()) return value.is_text();
  if (standard.is_array()) return value.is_array();
  return value.is_table();
}

size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t substitute = diagonal + (a[i - 1] != b[j - 1]);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, substitute});
    }
  }
  return row.back();
}

}  // namespace

Value::Value(const Options& v) : data_(std::make_shared<const Options>(v)) {}

const char* Value::type_name() const {
  static constexpr const char* names[] = {"a flag",   "an integer", "a number",
                                          "a string", "an array",   "a table"};
  return names[data_.index()];
}

bool Value::flag() const {
  OUNCE_CHECK(is_flag(), "[config] expected true or false, got ", type_name());
  return std::get<bool>(data_);
}

int64_t Value::integer() const {
  OUNCE_CHECK(is_integer(), "[config] expected an integer, got ", type_name());
  return std::get<int64_t>(data_);
}

double Value::number() const {
  if (is_integer()) return static_cast<double>(std::get<int64_t>(data_));
  OUNCE_CHECK(is_number(), "[config] expected a number, got ", type_name());
  return std::get<double>(data_);
}

const std::string& Value::text() const {
  OUNCE_CHECK(is_text(), "[config] expected a string, got ", type_name());
  return std::get<std::string>(data_);
}

const Value::Array& Value::array() const {
  OUNCE_CHECK(is_array(), "[config] expected an array, got ", type_name());
  return std::get<Array>(data_);
}

const Options& Value::table() const {
  OUNCE_CHECK(is_table(), "[config] expected a table, got ", type_name());
  return *std::get<std::shared_ptr<const Options>>(data_);
}

std::string Value::to_toml() const {
  if (is_flag()) return flag() ? "true" : "false";
  if (is_integer()) return std::to_string(integer());
  if (is_number()) return number_toml(number());
  if (is_text()) return toml_string(text());
  std::string result = is_array() ? "[" : "{ ";
  const char* separator = "";
  if (is_array()) {
    for (const auto& item : array()) {
      result += separator + item.to_toml();
      separator = ", ";
    }
    return result + "]";
  }
  for (const auto& [key, value] : table().items()) {
    result += separator + toml_key(key) + " = " + value.to_toml();
    separator = ", ";
  }
  return result + " }";
}

bool Value::operator==(const Value& other) const {
  if (is_table() && other.is_table()) return table() == other.table();
  return data_ == other.data_;
}

Options Options::parse(std::string_view toml, std::string_view source) {
  try {
    return from_table(toml::parse(toml, source), source);
  } catch (const toml::parse_error& error) {
    fail(Fault::kUsage, "[config] ", source, ":", error.source().begin.line, ": ",
         error.description());
  }
}

Options Options::read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream content;
  if (file) content << file.rdbuf();
  // A folder opens as a file and reads as nothing.
  OUNCE_CHECK_AS(Fault::kData, file && !std::filesystem::is_directory(path),
                 "[config] cannot read '", path, "'");
  return parse(content.str(), path);
}

Value Options::parse_value(std::string_view text) {
  try {
    const auto table = toml::parse("value = " + std::string(text));
    const auto* node = table.get("value");
    if (table.size() == 1 && !node->is_date() && !node->is_time() && !node->is_date_time()) {
      return from_node(*node, "--set");
    }
  } catch (const toml::parse_error&) {
  }
  return std::string(text);
}

const Value* Options::find(std::string_view path) const {
  const auto dot = path.find('.');
  const auto key = path.substr(0, dot);
  for (const auto& [name, value] : items_) {
    if (name != key) continue;
    if (dot == std::string_view::npos) return &value;
    return value.is_table() ? value.table().find(path.substr(dot + 1)) : nullptr;
  }
  return nullptr;
}

const Value& Options::at(std::string_view path) const {
  const auto* value = find(path);
  OUNCE_CHECK(value != nullptr, "[config] '", path, "' is missing");
  return *value;
}

#define OUNCE_OPTION(type, name, predicate, wanted)                                    \
  type Options::name(std::string_view path) const {                                    \
    const auto& value = at(path);                                                      \
    OUNCE_CHECK(value.predicate(), "[config] '", path, "': expected " wanted ", got ", \
                value.to_toml());                                                      \
    return value.name();                                                               \
  }
OUNCE_OPTION(bool, flag, is_flag, "true or false")
OUNCE_OPTION(int64_t, integer, is_integer, "an integer")
OUNCE_OPTION(double, number, is_number, "a number")
OUNCE_OPTION(const std::string&, text, is_text, "a string")
OUNCE_OPTION(const Options&, table, is_table, "a table")
#undef OUNCE_OPTION

int64_t Options::positive(std::string_view path) const {
  const auto value = integer(path);
  OUNCE_CHECK(value >= 1, "[config] '", path, "': expected at least 1, got ", value);
  return value;
}

int64_t Options::non_negative(std::string_view path) const {
  const auto value = integer(path);
  OUNCE_CHECK(value >= 0, "[config] '", path, "': expected at least 0, got ", value);
  return value;
}

double Options::number_in(std::string_view path, double low, double high) const {
  const auto value = number(path);
  OUNCE_CHECK(value >= low && value <= high, "[config] '", path, "': expected a number in [", low,
              ", ", high, "], got ", value);
  return value;
}

const std::string& Options::choice(std::string_view path,
                                   const std::vector<std::string>& choices) const {
  const auto& value = text(path);
  OUNCE_CHECK(std::find(choices.begin(), choices.end(), value) != choices.end(), "[config] '", path,
              "': '", value, "' is not a choice", nearest_hint(value, choices));
  return value;
}

std::vector<std::string> Options::texts(std::string_view path) const {
  const auto& value = at(path);
  if (value.is_text()) return {value.text()};
  OUNCE_CHECK(value.is_array(), "[config] '", path,
              "': expected a string or an array of strings, got ", value.to_toml());
  std::vector<std::string> result;
  for (const auto& item : value.array()) {
    OUNCE_CHECK(item.is_text(), "[config] '", path, "': expected strings, got ", item.to_toml());
    result.push_back(item.text());
  }
  return result;
}

void Options::set(std::string_view path, Value value) {
  const auto dot = path.find('.');
  const auto key = path.substr(0, dot);
  OUNCE_CHECK(!key.empty(), "[config] empty key in '", path, "'");
  auto item = std::find_if(items_.begin(), items_.end(),
                           [&](const Item& entry) { return entry.first == key; });
  if (dot != std::string_view::npos) {
    Options inner;
    if (item != items_.end()) {
      // `--set model.mixer.heads=4` where the file says mixer = "gla": the name becomes a table.
      if (item->second.is_text()) {
        inner.set("name", item->second);
      } else {
        OUNCE_CHECK(item->second.is_table(), "[config] '", key, "' is ", item->second.type_name(),
                    ", not a table: cannot set '", path, "'");
        inner = item->second.table();
      }
    }
    inner.set(path.substr(dot + 1), std::move(value));
    value = inner;
  }
  if (item == items_.end()) {
    items_.emplace_back(std::string(key), std::move(value));
  } else {
    item->second = std::move(value);
  }
}

Options Options::over(const Options& defaults, std::string_view where) const {
  std::vector<std::string> known;
  for (const auto& item : defaults.items_) known.push_back(item.first);
  Options result = defaults;
  for (const auto& [key, value] : items_) {
    const auto* standard = defaults.find(key);
    OUNCE_CHECK(standard != nullptr, "[config] unknown key '", key, "' in ", where,
                nearest_hint(key, known));
    if (is_part(*standard)) {
      if (value.is_table() && !is_part(value)) {
        auto refined = standard->table();
        for (const auto& [inner, inner_value] : value.table().items())
          refined.set(inner, inner_value);
        result.set(key, refined);
        continue;
      }
      OUNCE_CHECK(is_part_spec(value), "[config] '", key, "' in ", where,
                  ": expected a name, a table with a name, or an array of those, got ",
                  value.to_toml());
      result.set(key, value);
      continue;
    }
    if (standard->is_array() && standard->array().empty() && value.is_text()) {
      result.set(key, Value::Array{value});
      continue;
    }
    OUNCE_CHECK(same_type(value, *standard), "[config] '", key, "' in ", where, ": expected ",
                standard->type_name(), ", got ", value.to_toml());
    if (standard->is_table() && !standard->table().empty()) {
      result.set(key, value.table().over(standard->table(), std::string(where) + "." + key));
    } else if (standard->is_number() && !standard->is_integer()) {
      result.set(key, value.number());
    } else {
      result.set(key, value);
    }
  }
  return result;
}

std::string Options::to_toml() const {
  // Plain values first, then one section a table: TOML reads it back as the same options.
  std::string result;
  for (const auto& [key, value] : items_) {
    if (!value.is_table()) result += toml_key(key) + " = " + value.to_toml() + "\n";
  }
  for (const auto& [key, value] : items_) {
    if (!value.is_table()) continue;
    if (!result.empty()) result += "\n";
    result += "[" + toml_key(key) + "]\n";
    for (const auto& [inner, inner_value] : value.table().items()) {
      result += toml_key(inner) + " = " + inner_value.to_toml() + "\n";
    }
  }
  return result;
}

bool Options::operator==(const Options& other) const {
  return items_.size() == other.items_.size() &&
         std::all_of(items_.begin(), items_.end(), [&](const Item& item) {
           const auto* value = other.find(item.first);
           return value != nullptr && *value == item.second;
         });
}

std::string nearest_hint(std::string_view name, const std::vector<std::string>& known) {
  const std::string* best = nullptr;
  size_t distance = std::max<size_t>(2, name.size() / 2) + 1;
  for (const auto& candidate : known) {
    const auto d = edit_distance(name, candidate);
    if (d < distance) {
      distance = d;
      best = &candidate;
    }
  }
  if (best != nullptr) return "; did you mean '" + *best + "'?";
  std::string list = "; known: ";
  for (const auto& candidate : known) list += (&candidate == known.data() ? "" : ", ") + candidate;
  return list;
}

}  // namespace ounce
