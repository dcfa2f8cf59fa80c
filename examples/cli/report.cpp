// SPDX-License-Identifier: MIT
#include <ounce/core/check.h>
#include <ounce/core/train/run_folder.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>

#include "commands.h"

namespace ounce::cli {

namespace {

using Json = nlohmann::json;
using Points = std::vector<std::pair<double, double>>;

struct Curve {
  const char* type;   // kind of metrics row
  const char* field;  // its field
  const char* title;
};

constexpr Curve kCurves[] = {{"train", "loss", "training loss (nats a token)"},
                             {"eval", "val_loss", "validation loss (nats a token)"},
                             {"train", "norm", "gradient norm"},
                             {"train", "lr", "learning rate"},
                             {"train", "tok_s", "tokens a second"},
                             {"train", "mfu", "model FLOPs utilisation"},
                             {"train", "mem", "peak bytes"}};

std::string escaped(const std::string& text) {
  std::string result;
  for (const char c : text) {
    result += c == '&' ? "&amp;" : c == '<' ? "&lt;" : c == '>' ? "&gt;" : std::string(1, c);
  }
  return result;
}

std::string number(double value) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "%.4g", value);
  return buffer;
}

std::string svg(const Points& points) {
  constexpr double width = 720, height = 220, left = 64, bottom = 24, top = 8;
  auto [x0, x1] = std::pair{points.front().first, points.back().first};
  double y0 = points.front().second, y1 = y0;
  for (const auto& [x, y] : points) {
    y0 = std::min(y0, y);
    y1 = std::max(y1, y);
  }
  if (x1 <= x0) x1 = x0 + 1;
  if (y1 <= y0) y1 = y0 + std::max(1e-12, std::abs(y0) * 0.1);
  std::string line;
  for (const auto& [x, y] : points) {
    line += number(left + (x - x0) / (x1 - x0) * (width - left - 8)) + "," +
            number(top + (y1 - y) / (y1 - y0) * (height - top - bottom)) + " ";
  }
  const auto text = [](double x, double y, const char* anchor, const std::string& content) {
    return "<text x='" + number(x) + "' y='" + number(y) + "' text-anchor='" + anchor + "'>" +
           content + "</text>";
  };
  return "<svg viewBox='0 0 720 220'><polyline points='" + line + "'/>" +
         text(left - 6, top + 10, "end", number(y1)) +
         text(left - 6, height - bottom, "end", number(y0)) +
         text(left, height - 6, "start", "step " + number(x0)) +
         text(width - 8, height - 6, "end", number(x1)) + "</svg>";
}

std::vector<Json> read_rows(const std::string& path) {
  std::ifstream file(path);
  OUNCE_CHECK_AS(Fault::kNotFound, file.good(), "[report] cannot read '", path, "'");
  std::vector<Json> rows;
  for (std::string line; std::getline(file, line);) {
    auto row = Json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (row.is_object()) rows.push_back(std::move(row));
  }
  OUNCE_CHECK_AS(Fault::kNotFound, !rows.empty(), "[report] '", path, "' holds no rows yet");
  return rows;
}

Points points_of(const std::vector<Json>& rows, const Curve& curve) {
  Points points;
  for (const auto& row : rows) {
    const auto value = row.find(curve.field);
    if (row.value("t", "") == curve.type && value != row.end() && value->is_number()) {
      points.emplace_back(row.value("step", 0.0), value->get<double>());
    }
  }
  return points;
}

std::string page(const std::string& title, const std::vector<Json>& rows) {
  std::string html =
      "<!doctype html><meta charset='utf-8'><title>" + escaped(title) +
      "</title><style>body{font:14px system-ui,sans-serif;max-width:760px;margin:2em auto;"
      "padding:0 1em}svg{width:100%;background:#f7f7f7}polyline{fill:none;stroke:#1769aa;"
      "stroke-width:1.5}text{font-size:11px;fill:#555}pre{background:#f7f7f7;padding:1em;"
      "overflow:auto}</style><h1>" +
      escaped(title) + "</h1>\n";
  for (const auto& curve : kCurves) {
    const auto points = points_of(rows, curve);
    if (points.empty()) continue;
    html += "<h2>" + std::string(curve.title) + ": " + number(points.back().second) + "</h2>" +
            svg(points) + "\n";
  }
  for (const auto& row : rows) {
    if (row.value("t", "") == "sample") {
      html += "<h2>sample, step " + std::to_string(row.value("step", 0)) + "</h2><pre>" +
              escaped(row.value("text", "")) + "</pre>\n";
    }
  }
  for (const auto& row : rows) {
    if (row.value("t", "") == "config") {
      html += "<h2>config</h2><pre>" + escaped(row.value("config", "")) + "</pre>\n";
      break;
    }
  }
  return html;
}

}  // namespace

void add_report(CLI::App& app, int& exit_code) {
  auto* command = app.add_subcommand("report", "one HTML page with a run's curves");
  auto run = std::make_shared<std::string>();
  auto out = std::make_shared<std::string>();
  command->add_option("--run", *run, "run folder")->required();
  command->add_option("--out", *out, "file to write; default <run>/report.html");
  command->callback([run, out, &exit_code] {
    const auto folder = RunFolder::open(*run);
    const auto html = page(folder.path(), read_rows(folder.file("metrics.jsonl")));
    const auto path = out->empty() ? folder.file("report.html") : *out;
    std::ofstream file(path, std::ios::binary | std::ios::trunc);
    file << html;
    file.flush();
    OUNCE_CHECK_AS(Fault::kData, file.good(), "[report] cannot write '", path, "'");
    std::cout << path << std::endl;
    exit_code = 0;
  });
}

}  // namespace ounce::cli
