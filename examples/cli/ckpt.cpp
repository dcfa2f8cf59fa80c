// SPDX-License-Identifier: MIT
// `ounce ckpt ls|show|verify|diff`. Exit code 1 when verify or diff found something; paths that
// hold nothing and damage where a value was asked for are thrown as ounce::Error.
#include "commands.h"

#include <ounce/ckpt/restore.h>
#include <ounce/ckpt/scan.h>
#include <ounce/core/train/format.h>
#include <torch/torch.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <iostream>
#include <nlohmann/json.hpp>

namespace ounce::cli {
namespace {

using namespace ounce::ckpt;
using Json = nlohmann::ordered_json;

void print(const Json& json) {
  std::cout << json.dump(1, ' ', false, Json::error_handler_t::replace) << "\n";
}

Json number_json(double value) {
  if (std::isfinite(value)) return value;
  return std::isnan(value) ? "nan" : value > 0 ? "inf" : "-inf";
}

Json metrics_json(const std::map<std::string, double>& metrics) {
  Json json = Json::object();
  for (const auto& [name, value] : metrics) json[name] = number_json(value);
  return json;
}

Json scalar_json(const Scalar& scalar) {
  if (const auto* integer = std::get_if<int64_t>(&scalar)) return *integer;
  if (const auto* number = std::get_if<double>(&scalar)) return number_json(*number);
  return std::get<std::string>(scalar);
}

std::string metrics_text(const std::map<std::string, double>& metrics) {
  std::string text;
  for (const auto& [name, value] : metrics) text += c10::str("  ", name, " ", value);
  return text;
}

// ---- ls

void list_steps(const std::vector<std::string>& roots, bool as_json) {
  auto all = Json::array();
  size_t count = 0;
  std::vector<std::string> problems;
  for (const auto& root : roots) {
    for (const auto& info : list_checkpoints(root, &problems)) {
      ++count;
      if (as_json) {
        all.push_back({{"step", info.step},
                       {"path", info.path},
                       {"uuid", info.uuid},
                       {"bytes", info.bytes},
                       {"metrics", metrics_json(info.metrics)}});
      } else {
        std::printf("step %-10ld %10s  %s%s\n", static_cast<long>(info.step),
                    format_bytes(info.bytes).c_str(), info.path.c_str(),
                    metrics_text(info.metrics).c_str());
      }
    }
  }
  if (as_json) {
    print({{"steps", all}, {"problems", problems}});
  } else {
    for (const auto& problem : problems) std::cout << "bad: " << problem << "\n";
  }
  if (count == 0 && problems.empty()) {
    fail(Fault::kNotFound, "[ckpt] no checkpoint in '", c10::Join("', '", roots), "'");
  }
}

// ---- show

Json tensor_json(const TensorRecord& tensor) {
  Json json = {{"name", tensor.name},         {"dtype", tensor.dtype}, {"shape", tensor.shape},
               {"class", tensor.state_class}, {"bytes", tensor.bytes}, {"offset", tensor.offset}};
  if (!tensor.tied_to.empty()) json["tied_to"] = tensor.tied_to;
  return json;
}

void show_json(const Manifest& manifest, const CheckpointInfo& info, bool tensors) {
  Json scalars = Json::object();
  for (const auto& [name, value] : manifest.scalars) scalars[name] = scalar_json(value);
  Json json = {{"step", info.step},
               {"path", info.path},
               {"uuid", info.uuid},
               {"sequence", manifest.sequence},
               {"format", manifest.format},
               {"bytes", info.bytes},
               {"metrics", metrics_json(info.metrics)},
               {"notes", info.notes},
               {"scalars", scalars},
               {"tensor_count", manifest.tensors.size()}};
  if (tensors) {
    json["tensors"] = Json::array();
    for (const auto& tensor : manifest.tensors) json["tensors"].push_back(tensor_json(tensor));
  }
  print(json);
}

void show_step(const std::string& path, bool tensors, bool as_json) {
  const auto files = posix_file_system();
  const auto folder = resolve_step(*files, path);
  const auto manifest = with_faults([&] { return read_manifest(*files, folder); });
  const auto info = info_of(manifest, folder);
  if (as_json) return show_json(manifest, info, tensors);
  std::cout << "step " << info.step << "  " << info.path << "\n"
            << manifest.tensors.size() << " tensors, " << format_bytes(info.bytes) << ", format "
            << manifest.format << ", uuid " << info.uuid << "\n";
  for (const auto& [name, value] : info.metrics)
    std::cout << "metric " << name << " = " << value << "\n";
  for (const auto& [name, value] : manifest.scalars) {
    std::cout << "scalar " << name << " = "
              << scalar_json(value).dump(-1, ' ', false, Json::error_handler_t::replace) << "\n";
  }
  if (tensors) {
    for (const auto& tensor : manifest.tensors) {
      std::cout << "tensor " << tensor.name << "  " << tensor.dtype << "["
                << c10::Join(", ", tensor.shape) << "]  " << tensor.state_class
                << (tensor.tied_to.empty() ? "" : "  tied to " + tensor.tied_to) << "\n";
    }
  }
  for (const auto& [name, text] : info.notes) std::cout << "--- " << name << "\n" << text << "\n";
}

// ---- verify

int verify(const std::vector<std::string>& paths, bool containers, bool as_json) {
  const auto files = posix_file_system();
  auto all = Json::array();
  bool good = true;
  const auto report_on = [&](const std::string& folder, const VerifyReport& report) {
    good = good && report.problems.empty();
    if (as_json) {
      all.push_back({{"path", folder},
                     {"blocks", report.blocks},
                     {"bytes", report.bytes},
                     {"problems", report.problems}});
      return;
    }
    std::cout << (report.problems.empty() ? "good  " : "BAD   ") << folder << "  " << report.blocks
              << " blocks, " << format_bytes(report.bytes) << "\n";
    for (const auto& problem : report.problems) std::cout << "      " << problem << "\n";
  };
  for (const auto& path : paths) {
    const auto root = root_of(*files, path);
    std::vector<std::string> folders;
    if (is_step_folder(*files, root)) {
      folders = {root};
    } else {
      std::vector<std::string> problems;
      for (const auto& info : list_checkpoints(root, &problems)) folders.push_back(info.path);
      if (folders.empty() && problems.empty()) {
        fail(Fault::kNotFound, "[ckpt] no checkpoint in '", root, "'");
      }
      for (const auto& problem : problems) {
        VerifyReport report;
        report.problems = {problem};
        report_on(root, report);
      }
    }
    for (const auto& folder : folders) {
      report_on(folder, with_faults([&] { return verify_step(files, folder, containers); }));
    }
  }
  if (as_json) print({{"good", good}, {"steps", all}});
  return good ? 0 : 1;
}

// ---- diff

struct Difference {
  std::string name;
  std::string what;
  double largest = NAN;  // of the absolute differences; NAN where there is no such thing
};

double largest_difference(const at::Tensor& a, const at::Tensor& b) {
  const auto dtype = a.is_complex() ? at::kComplexDouble : at::kDouble;
  return a.to(dtype).sub(b.to(dtype)).abs().max().item<double>();
}

void compare_tensor(const StepReader& a, const StepReader& b, const TensorRecord& first,
                    const TensorRecord& second, std::vector<Difference>& found) {
  if (first.dtype != second.dtype || first.shape != second.shape) {
    found.push_back({first.name, c10::str(first.dtype, "[", c10::Join(", ", first.shape), "] and ",
                                          second.dtype, "[", c10::Join(", ", second.shape), "]")});
    return;
  }
  const auto x = read_tensor(a, first), y = read_tensor(b, second);
  const auto bytes = [](const at::Tensor& t) { return t.reshape({-1}).view(at::kByte); };
  if (x.numel() == 0 || at::equal(bytes(x), bytes(y))) return;
  const auto unequal = bytes(x).ne(bytes(y)).view({x.numel(), -1}).any(1).sum().item<int64_t>();
  found.push_back(
      {first.name, c10::str(unequal, " of ", x.numel(), " elements"), largest_difference(x, y)});
}

bool same(const Scalar& a, const Scalar& b) {
  const auto* x = std::get_if<double>(&a);
  const auto* y = std::get_if<double>(&b);
  return x && y ? std::bit_cast<uint64_t>(*x) == std::bit_cast<uint64_t>(*y) : a == b;
}

std::vector<Difference> compare(const StepReader& a, const StepReader& b) {
  std::vector<Difference> found;
  const auto &first = a.manifest(), &second = b.manifest();
  if (first.step != second.step) {
    found.push_back({"step", c10::str(first.step, " and ", second.step)});
  }
  for (const auto& [name, value] : first.scalars) {
    const auto other = second.scalars.find(name);
    if (other == second.scalars.end()) {
      found.push_back({name, "only in the first"});
    } else if (!same(value, other->second)) {
      const auto text = [](const Scalar& scalar) {
        return scalar_json(scalar).dump(-1, ' ', false, Json::error_handler_t::replace);
      };
      found.push_back({name, text(value) + " and " + text(other->second)});
    }
  }
  for (const auto& [name, value] : second.scalars) {
    if (!first.scalars.contains(name)) found.push_back({name, "only in the second"});
  }
  for (const auto& tensor : first.tensors) {
    const auto* other = b.find(tensor.name);
    if (other == nullptr) {
      found.push_back({tensor.name, "only in the first"});
    } else {
      compare_tensor(a, b, tensor, *other, found);
    }
  }
  for (const auto& tensor : second.tensors) {
    if (a.find(tensor.name) == nullptr) found.push_back({tensor.name, "only in the second"});
  }
  return found;
}

int diff(const std::vector<std::string>& paths, bool as_json) {
  const auto files = posix_file_system();
  const auto first = resolve_step(*files, paths[0]), second = resolve_step(*files, paths[1]);
  return with_faults([&] {
    const StepReader a(files, first), b(files, second);
    const auto found = compare(a, b);
    const auto values = a.manifest().tensors.size() + a.manifest().scalars.size();
    if (as_json) {
      auto list = Json::array();
      for (const auto& item : found) {
        list.push_back(
            {{"name", item.name},
             {"what", item.what},
             {"max_abs", std::isnan(item.largest) ? Json() : number_json(item.largest)}});
      }
      print({{"first", first}, {"second", second}, {"compared", values}, {"differences", list}});
      return found.empty() ? 0 : 1;
    }
    std::cout << first << " and " << second << ": " << values << " values compared, "
              << (found.empty() ? "no difference" : std::to_string(found.size()) + " differ")
              << "\n";
    constexpr size_t kMostShown = 20;
    for (size_t i = 0; i < std::min(found.size(), kMostShown); ++i) {
      std::cout << "  " << found[i].name << ": " << found[i].what;
      if (!std::isnan(found[i].largest)) std::cout << ", largest difference " << found[i].largest;
      std::cout << "\n";
    }
    if (found.size() > kMostShown) {
      std::cout << "  and " << found.size() - kMostShown << " more (--json lists all)\n";
    }
    return found.empty() ? 0 : 1;
  });
}

}  // namespace

void add_ckpt(CLI::App& app, int& exit_code) {
  struct Arguments {
    std::vector<std::string> paths;
    bool json = false, tensors = false, h5 = false;
  };
  auto arguments = std::make_shared<Arguments>();
  auto* ckpt = app.add_subcommand("ckpt", "Look at checkpoints");
  ckpt->require_subcommand(1);
  const auto add = [&](const char* name, const char* what, int least, int most) {
    auto* command = ckpt->add_subcommand(name, what);
    command->add_option("path", arguments->paths, "run folder, checkpoint folder or step folder")
        ->required()
        ->expected(least, most);
    command->add_flag("--json", arguments->json, "print JSON");
    return command;
  };
  add("ls", "list the steps, newest first", 1, 1 << 20)->callback([=] {
    list_steps(arguments->paths, arguments->json);
  });
  auto* show = add("show", "what the newest step, or the step given, holds", 1, 1);
  show->add_flag("--tensors", arguments->tensors, "list every tensor");
  show->callback([=] { show_step(arguments->paths[0], arguments->tensors, arguments->json); });
  auto* check = add("verify", "read everything and compare it with its sums", 1, 1 << 20);
  check->add_flag("--h5", arguments->h5, "let libhdf5 read the files too, in a child process");
  check->callback(
      [=, &exit_code] { exit_code = verify(arguments->paths, arguments->h5, arguments->json); });
  add("diff", "compare two steps bit by bit", 2, 2)->callback([=, &exit_code] {
    exit_code = diff(arguments->paths, arguments->json);
  });
}

}  // namespace ounce::cli
