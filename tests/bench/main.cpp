// SPDX-License-Identifier: MIT
// ounce_bench [FAMILY...] [--json F] [--device D] [--seconds S]: a line a case, and the rates of
// this machine that each is compared with, measured in the same run.
#include <ounce/core/check.h>
#include <ounce/core/device.h>
#include <ounce/core/options.h>
#include <ounce/core/version.h>
#include <ounce/ounce.h>
#include <torch/torch.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <fstream>
#include <nlohmann/json.hpp>

#include "bench.h"
#include "bench_ckpt.h"
#include "bench_optim.h"

namespace ounce::bench {
namespace {

struct Arguments {
  std::vector<std::string> families;
  std::string json, device = "auto";
  double seconds = 3;
};

std::string first_line_of(const std::string& command) {
  FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return "";
  std::array<char, 256> line{};
  const bool read = fgets(line.data(), line.size(), pipe) != nullptr;
  pclose(pipe);
  std::string text(read ? line.data() : "");
  text.erase(text.find_last_not_of("\n") + 1);
  return text;
}

// Of the sources: OUNCE_COMMIT where they are without their git, else what git says. Empty = not
// known.
std::string commit() {
  if (const char* given = std::getenv("OUNCE_COMMIT"); given != nullptr && *given != '\0')
    return given;
  return first_line_of("git -C '" OUNCE_SOURCE_DIR "' describe --always --dirty 2>/dev/null");
}

std::string date() {
  const auto now = std::time(nullptr);
  std::array<char, 32> text{};
  std::strftime(text.data(), text.size(), "%Y-%m-%dT%H:%M:%SZ", std::gmtime(&now));
  return text.data();
}

// What every row says of where it was measured.
nlohmann::ordered_json machine(const DeviceFacts& facts, const Rates& rates,
                               const std::string& sources) {
  return {{"device", facts.name},
          {"driver", facts.driver},
          {"version", version_line()},
          {"commit", sources},
          {"date", date()},
          {"threads", at::get_num_threads()},
          {"copy_gb_s", rates.copy_bytes / 1e9},
          {"matmul_tflop_s", rates.matmul_flops / 1e12},
          {"disk_gb_s", rates.disk_bytes / 1e9}};
}

double limit_seconds(const Work& work, const Rates& rates) {
  return std::max(work.flops / rates.matmul_flops, work.bytes / rates.copy_bytes);
}

nlohmann::ordered_json run_case(const Case& item, at::Device device, const Rates& rates,
                                double seconds) {
  torch::manual_seed(1);
  const auto job = item.make(device);
  const auto timing = measure(job, device, seconds);
  const Work both{job.forward_work.flops + job.backward_work.flops,
                  job.forward_work.bytes + job.backward_work.bytes};
  const double share = limit_seconds(both, rates) / timing.both;
  std::printf("%-8s %-22s %-26s %-9s %9.3f %9.3f %9.3f %10.1f %6.1f%%\n", item.family.c_str(),
              item.name.c_str(), item.shape.c_str(), toString(item.dtype), timing.forward * 1e3,
              timing.backward * 1e3, timing.both * 1e3, double(timing.peak_bytes) / (1 << 20),
              100 * share);
  std::fflush(stdout);
  return {{"t", "bench"},
          {"family", item.family},
          {"name", item.name},
          {"shape", item.shape},
          {"dtype", toString(item.dtype)},
          {"forward_ms", timing.forward * 1e3},
          {"backward_ms", timing.backward * 1e3},
          {"both_ms", timing.both * 1e3},
          {"peak_bytes", timing.peak_bytes},
          {"flops", both.flops},
          {"bytes", both.bytes},
          {"share_of_limit", share},
          {"limit",
           both.flops / rates.matmul_flops > both.bytes / rates.copy_bytes ? "matmul" : "copy"},
          {"repeats", timing.repeats}};
}

void run(const Arguments& arguments) {
  using Maker = std::vector<Case> (*)(at::Device);
  const std::vector<std::pair<std::string, Maker>> known{
      {"cce", cce_cases}, {"gla", gla_cases}, {"norm", norm_cases}, {"train", train_cases}};
  std::vector<std::string> names{"ckpt", "optim"};
  for (const auto& item : known) names.push_back(item.first);
  for (const auto& family : arguments.families) {
    OUNCE_CHECK(std::find(names.begin(), names.end(), family) != names.end(), "[bench] no family '",
                family, "'", nearest_hint(family, names));
  }
  const auto sources = commit();
  OUNCE_CHECK(arguments.json.empty() || !sources.empty(),
              "[bench] expected a commit to write beside the results of --json, got none from git; "
              "set OUNCE_COMMIT");
  const auto device = choose_device(arguments.device);
  const auto facts = device_facts(device);
  const auto dtype = device.is_cuda() ? at::kBFloat16 : at::kFloat;
  const auto rates = measure_rates(device, dtype);
  const auto where = machine(facts, rates, sources);
  std::printf("%s, %s, commit %s\ncopy %.1f GB/s, matmul %.2f TFLOP/s (%s), disk %.2f GB/s\n\n",
              facts.name.c_str(), version_line().c_str(),
              sources.empty() ? "unknown" : sources.c_str(), rates.copy_bytes / 1e9,
              rates.matmul_flops / 1e12, toString(dtype), rates.disk_bytes / 1e9);
  std::printf("%-8s %-22s %-26s %-9s %9s %9s %9s %10s %7s\n", "family", "case", "shape", "dtype",
              "fwd ms", "bwd ms", "both ms", "peak MiB", "limit");
  std::ofstream file;
  if (!arguments.json.empty()) {
    file.open(arguments.json, std::ios::app);
    OUNCE_CHECK_AS(Fault::kData, file.good(), "[bench] cannot write '", arguments.json, "'");
  }
  const auto chosen = [&](const std::string& family) {
    const auto& given = arguments.families;
    return given.empty() || std::find(given.begin(), given.end(), family) != given.end();
  };
  for (const auto& [family, cases] : known) {
    if (!chosen(family)) continue;
    for (const auto& item : cases(device)) {
      auto row = run_case(item, device, rates, arguments.seconds);
      row.update(where);
      if (file.is_open()) file << row.dump() << std::endl;
    }
  }
  const auto emit = [&](auto row) {
    row.update(where);
    if (file.is_open()) file << row.dump() << std::endl;
  };
  if (chosen("optim")) run_optim(device, arguments.seconds == 0, emit);
  if (chosen("ckpt")) run_ckpt(device, arguments.seconds == 0, emit);
}

}  // namespace
}  // namespace ounce::bench

int main(int argc, char** argv) {
  ounce::bench::Arguments arguments;
  CLI::App app(
      "Benchmarks: a line a case; limit = least possible time by this machine's rates / time");
  app.add_option("family", arguments.families, "cce, gla, norm, train, optim, ckpt; default all");
  app.add_option(
      "--json", arguments.json,
      "append a JSON object a case to this file; OUNCE_COMMIT names the commit without git");
  app.add_option("--device", arguments.device, "auto, cpu, cuda or cuda:N");
  app.add_option("--seconds", arguments.seconds, "time spent on a case; 0 = one pass")
      ->check(CLI::NonNegativeNumber);
  CLI11_PARSE(app, argc, argv);
  try {
    ounce::count_cpu_memory();
    ounce::register_builtins();
    ounce::bench::run(arguments);
  } catch (const ounce::Error& error) {
    std::fprintf(stderr, "ounce bench: %s\n", error.what_without_backtrace());
    return static_cast<int>(error.fault());
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "ounce bench: %s\n", error.what_without_backtrace());
    return 1;
  }
  return 0;
}
