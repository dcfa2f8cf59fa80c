// SPDX-License-Identifier: MIT
#include <fcntl.h>
#include <ounce/core/check.h>
#include <ounce/core/train/append_file.h>
#include <ounce/core/train/format.h>
#include <ounce/core/train/sinks.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <ostream>
#include <string_view>

namespace ounce {

namespace {

double number_of(const Record::Data& data) {
  if (const auto* integer = std::get_if<int64_t>(&data)) return static_cast<double>(*integer);
  const auto* number = std::get_if<double>(&data);
  return number != nullptr ? *number : std::nan("");
}

const Record::Data* find(const Record& record, std::string_view name) {
  for (const auto& [key, data] : record.fields) {
    if (key == name) return &data;
  }
  return nullptr;
}

std::string per_step(double milliseconds) {
  if (milliseconds < 9999.95) return format_fixed(milliseconds, 1) + " ms";
  return format_fixed(milliseconds / 1e3, 1) + " s";
}

// What the console says of one field; "" = nothing.
std::string piece(const std::string& name, const Record::Data& data) {
  if (const auto* text = std::get_if<std::string>(&data)) return name + " " + *text;
  const double value = number_of(data);
  if (name == "steps") return "";
  if (name == "loss") return "loss " + format_fixed(value, 3);
  if (name == "norm") return "norm " + format_fixed(value, 2);
  if (name == "lr") return "lr " + format_scientific(value);
  if (name == "ms") return per_step(value);
  if (name == "tok_s") return format_count(value) + " tok/s";
  if (name == "mfu") return format_fixed(100 * value, 1) + "% MFU";
  if (name == "mem" || name == "bytes") return format_bytes(static_cast<int64_t>(value));
  if (name == "ckpt_step") return "ckpt " + format_fixed(value, 0);
  if (name == "ckpt_written") return format_fixed(100 * value, 0) + "%";
  if (name == "gb_s") return format_fixed(value, 2) + " GB/s";
  if (name == "captured_s") return "captured " + format_duration(value);
  if (name == "blocked_ms") return "blocked " + format_fixed(value, 1) + " ms";
  if (name == "retries") return value > 0 ? "retries " + format_fixed(value, 0) : "";
  if (name == "eta_s") return "eta " + format_duration(value);
  if (name == "val_loss") return "validation loss " + format_fixed(value, 4);
  if (name == "best") return "best " + format_fixed(value, 4);
  if (name == "bits") return format_fixed(value, 3) + " bits";
  if (name == "seconds") return format_duration(value);
  if (const auto* integer = std::get_if<int64_t>(&data))
    return name + " " + std::to_string(*integer);
  char buffer[40];
  std::snprintf(buffer, sizeof buffer, "%.4g", value);
  return name + " " + buffer;
}

class ConsoleSink final : public MetricsSink {
 public:
  explicit ConsoleSink(std::ostream& out) : out_(out) {}

  void write(const Record& record) override {
    if (record.type == "config") return;
    if (record.type == "sample") {
      const auto* data = find(record, "text");
      const auto* text = data != nullptr ? std::get_if<std::string>(data) : nullptr;
      out_ << "sample at step " << record.step << ":\n" << (text ? *text : "") << std::endl;
      return;
    }
    std::string line = "step " + std::to_string(record.step);
    if (const auto* steps = find(record, "steps")) {
      line += "/" + format_fixed(number_of(*steps), 0);
    }
    if (record.type == "ckpt") line += " | checkpoint";
    // In the order of the line that people know, whatever the order of the row.
    static constexpr const char* order[] = {"loss", "norm", "lr",        "ms",   "tok_s",
                                            "mfu",  "mem",  "ckpt_step", "eta_s"};
    for (const auto* name : order) {
      const auto* data = find(record, name);
      if (data == nullptr) continue;
      line += " | " + piece(name, *data);
      if (name != std::string_view("ckpt_step")) continue;
      const auto* written = find(record, "ckpt_written");
      line += " " + (written != nullptr ? piece("ckpt_written", *written) : "durable");
    }
    for (const auto& [name, data] : record.fields) {
      if (name == "ckpt_written" ||
          std::find(std::begin(order), std::end(order), name) != std::end(order)) {
        continue;
      }
      const auto text = piece(name, data);
      if (!text.empty()) line += " | " + text;
    }
    out_ << line << std::endl;
  }

 private:
  std::ostream& out_;
};

// Whether a line of the file is a row of a step up to `last`.
bool keeps(const std::string& line, int64_t last) {
  const auto row = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
  if (!row.is_object()) return false;
  const auto step = row.find("step");
  return step != row.end() && step->is_number_integer() && step->get<int64_t>() <= last;
}

// Leaves in the file the rows up to step `last`.
void drop_later_rows(const std::string& path, int64_t last) {
  // A pipe or device has nothing to drop, and may never end.
  if (!std::filesystem::is_regular_file(path)) return;
  std::ifstream file(path, std::ios::binary);
  std::string kept;
  bool dropped = false;
  for (std::string line; std::getline(file, line);) {
    // A last line without its newline was cut short, or would be glued to the next row.
    if (keeps(line, last)) {
      dropped |= file.eof();
      kept += line + "\n";
    } else {
      dropped = true;
    }
  }
  OUNCE_CHECK_AS(Fault::kData, file.eof(), "[metrics] cannot read '", path, "'");
  if (!dropped) return;
  const auto temporary = path + ".tmp";
  AppendFile replacement(temporary, O_TRUNC);
  replacement.append(kept);
  replacement.flush_to_disk();
  OUNCE_CHECK_AS(Fault::kData, std::rename(temporary.c_str(), path.c_str()) == 0,
                 "[metrics] cannot replace '", path, "': ", std::strerror(errno));
}

class JsonLinesSink final : public MetricsSink {
 public:
  JsonLinesSink(const std::string& path, int64_t resumed_step)
      : file_((drop_later_rows(path, resumed_step), path), 0) {}

  void write(const Record& record) override {
    nlohmann::ordered_json row;
    row["t"] = record.type;
    row["step"] = record.step;
    for (const auto& [name, data] : record.fields) {
      std::visit([&row, &name = name](const auto& value) { row[name] = value; }, data);
    }
    file_.append(row.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n");
  }

 private:
  AppendFile file_;
};

}  // namespace

std::unique_ptr<MetricsSink> console_sink(std::ostream& out) {
  return std::make_unique<ConsoleSink>(out);
}

std::unique_ptr<MetricsSink> jsonl_sink(const std::string& path, int64_t resumed_step) {
  return std::make_unique<JsonLinesSink>(path, resumed_step);
}

}  // namespace ounce
