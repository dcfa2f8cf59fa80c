// SPDX-License-Identifier: MIT
// Options: an ordered table of named values, the form in which every configurable part receives its
// settings. Text form is TOML. A part declares its defaults as TOML text; the defaults are also the
// schema: an unknown key, or a value of another type than the default's, is an error that names the
// place, the key, and the nearest known key.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace ounce {

class Options;

// One TOML value. Integers convert to floating point where a number is asked for, nothing else
// converts.
class Value {
 public:
  using Array = std::vector<Value>;

  Value() : data_(false) {}
  Value(bool v) : data_(v) {}
  Value(int v) : data_(static_cast<int64_t>(v)) {}
  Value(int64_t v) : data_(v) {}
  Value(double v) : data_(v) {}
  Value(const char* v) : data_(std::string(v)) {}
  Value(std::string v) : data_(std::move(v)) {}
  Value(Array v) : data_(std::move(v)) {}
  Value(const Options& v);

  bool is_flag() const { return std::holds_alternative<bool>(data_); }
  bool is_integer() const { return std::holds_alternative<int64_t>(data_); }
  bool is_number() const { return is_integer() || std::holds_alternative<double>(data_); }
  bool is_text() const { return std::holds_alternative<std::string>(data_); }
  bool is_array() const { return std::holds_alternative<Array>(data_); }
  bool is_table() const { return std::holds_alternative<std::shared_ptr<const Options>>(data_); }
  const char* type_name() const;

  // Each throws Fault::kUsage when the value has another type.
  bool flag() const;
  int64_t integer() const;
  double number() const;
  const std::string& text() const;
  const Array& array() const;
  const Options& table() const;

  // TOML source of this value on one line.
  std::string to_toml() const;
  bool operator==(const Value& other) const;

 private:
  std::variant<bool, int64_t, double, std::string, Array, std::shared_ptr<const Options>> data_;
};

class Options {
 public:
  using Item = std::pair<std::string, Value>;

  Options() = default;

  // Parses TOML; `source` names it in errors (file name, "--set", entry name).
  static Options parse(std::string_view toml, std::string_view source);
  static Options read_file(const std::string& path);  // Fault::kData when unreadable
  // A value as written after `--set key=`: TOML where it parses as TOML, else a string.
  static Value parse_value(std::string_view text);

  const std::vector<Item>& items() const { return items_; }
  bool empty() const { return items_.empty(); }
  // The value at a dotted path, or null.
  const Value* find(std::string_view path) const;
  bool contains(std::string_view path) const { return find(path) != nullptr; }

  // The value at a dotted path; absent or of another type is an error that names the path.
  bool flag(std::string_view path) const;
  int64_t integer(std::string_view path) const;
  int64_t positive(std::string_view path) const;      // integer >= 1
  int64_t non_negative(std::string_view path) const;  // integer >= 0
  double number(std::string_view path) const;
  double number_in(std::string_view path, double low, double high) const;  // low <= x <= high
  const std::string& text(std::string_view path) const;
  // The text must be one of `choices`.
  const std::string& choice(std::string_view path, const std::vector<std::string>& choices) const;
  const Options& table(std::string_view path) const;
  std::vector<std::string> texts(std::string_view path) const;  // a string or an array of strings

  // Sets the value at a dotted path, making the tables on the way.
  void set(std::string_view path, Value value);

  // These options laid over `defaults`: every key must exist there with the same type (a number
  // takes an integer). `where` names the place in errors. A default that is an empty array or an
  // empty table takes anything of that type, an empty array also a string, as an array of it. A
  // default that is a part (a table with the key `name`) takes a name, a table with a name, or an
  // array of those, and is left for the registry to resolve; a table without a name changes
  // settings of the default part.
  Options over(const Options& defaults, std::string_view where) const;

  std::string to_toml() const;
  bool operator==(const Options& other) const;

 private:
  const Value& at(std::string_view path) const;

  std::vector<Item> items_;
};

// The known name nearest to `name` by edit distance, as "; did you mean 'x'?", else the whole list
// as
// "; known: a, b, c".
std::string nearest_hint(std::string_view name, const std::vector<std::string>& known);

}  // namespace ounce
