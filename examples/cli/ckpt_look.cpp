// SPDX-License-Identifier: MIT
// `ounce ckpt ls|show|verify`. Exit code 1 when verify found something.
#include <ounce/ckpt/restore.h>
#include <ounce/ckpt/retention.h>
#include <ounce/ckpt/scan.h>
#include <ounce/core/train/format.h>

#include <cstdio>
#include <iostream>

#include "ckpt_commands.h"

namespace ounce::cli {
namespace {

using namespace ounce::ckpt;

Json metrics_json(const std::map<std::string, double>& metrics) {
  Json json = Json::object();
  for (const auto& [name, value] : metrics) json[name] = number_json(value);
  return json;
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
  const auto files = posix_file_system();
  for (const auto& root : roots) {
    for (const auto& info : list_checkpoints(root, &problems)) {
      ++count;
      FileInfo ignored;
      const bool pinned = files->stat(info.path + "/" + kPinName, ignored) == 0;
      if (as_json) {
        all.push_back({{"step", info.step},
                       {"path", info.path},
                       {"uuid", info.uuid},
                       {"bytes", info.bytes},
                       {"pinned", pinned},
                       {"metrics", metrics_json(info.metrics)}});
      } else {
        std::printf("step %-10ld %10s  %s%s%s\n", static_cast<long>(info.step),
                    format_bytes(info.bytes).c_str(), info.path.c_str(), pinned ? "  pinned" : "",
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

void show_note(const CheckpointInfo& info, const std::string& name) {
  const auto note = info.notes.find(name);
  OUNCE_CHECK_AS(Fault::kNotFound, note != info.notes.end(), "[ckpt] no note '", name, "' in '",
                 info.path, "'");
  std::cout << note->second;
}

void show_step(const std::string& path, const std::string& note, bool tensors, bool as_json) {
  const auto files = posix_file_system();
  const auto folder = resolve_step(*files, path);
  const auto manifest = with_faults([&] { return read_manifest(*files, folder); });
  const auto info = info_of(manifest, folder);
  if (!note.empty()) return show_note(info, note);
  if (as_json) return show_json(manifest, info, tensors);
  std::cout << "step " << info.step << "  " << info.path << "\n"
            << manifest.tensors.size() << " tensors, " << format_bytes(info.bytes) << ", format "
            << manifest.format << ", uuid " << info.uuid << "\n";
  for (const auto& [name, value] : info.metrics)
    std::cout << "metric " << name << " = " << value << "\n";
  for (const auto& [name, value] : manifest.scalars) {
    std::cout << "scalar " << name << " = " << scalar_text(value) << "\n";
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

}  // namespace

void add_ckpt_look(CLI::App& ckpt, int& exit_code) {
  struct Arguments {
    std::vector<std::string> paths;
    std::string note;
    bool json = false, tensors = false, h5 = false;
  };
  auto arguments = std::make_shared<Arguments>();
  const auto add = [&](const char* name, const char* what, int most) {
    auto* command = ckpt.add_subcommand(name, what);
    command->add_option("path", arguments->paths, "run folder, checkpoint folder or step folder")
        ->required()
        ->expected(1, most);
    command->add_flag("--json", arguments->json, "print JSON");
    return command;
  };
  add("ls", "list the steps, newest first", 1 << 20)->callback([=] {
    list_steps(arguments->paths, arguments->json);
  });
  auto* show = add("show", "what the newest step, or the step given, holds", 1);
  show->add_flag("--tensors", arguments->tensors, "list every tensor");
  show->add_option("--note", arguments->note, "print this note alone, as it is");
  show->callback([=] {
    show_step(arguments->paths[0], arguments->note, arguments->tensors, arguments->json);
  });
  auto* check = add("verify", "read everything and compare it with its sums", 1 << 20);
  check->add_flag("--h5", arguments->h5, "let libhdf5 read the files too, in a child process");
  check->callback(
      [=, &exit_code] { exit_code = verify(arguments->paths, arguments->h5, arguments->json); });
}

}  // namespace ounce::cli
