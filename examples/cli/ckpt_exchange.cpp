// SPDX-License-Identifier: MIT
// `ounce ckpt export|import`.
#include <ounce/ckpt/export.h>
#include <ounce/ckpt/import.h>
#include <ounce/core/check.h>
#include <ounce/core/train/format.h>

#include <cmath>
#include <iostream>

#include "ckpt_commands.h"

namespace ounce::cli {
namespace {

using namespace ounce::ckpt;

constexpr double kMostShardGb = 1e6;

struct ExportFlags {
  std::string path, out;
  ExportOptions options;
  double shard_gb = 0;
  bool json = false;
};

void export_files(const ExportFlags& flags) {
  auto options = flags.options;
  // No range of numbers keeps it out.
  OUNCE_CHECK(!std::isnan(flags.shard_gb), "[ckpt] expected a number as --shard-gb, got nan");
  options.shard_bytes = std::llround(flags.shard_gb * 1e9);
  const auto report = export_safetensors(flags.path, flags.out, options);
  if (flags.json) {
    return print({{"step", report.info.step},
                  {"path", report.info.path},
                  {"files", report.files},
                  {"tensors", report.tensors},
                  {"bytes", report.bytes},
                  {"overflowed", report.overflowed},
                  {"rejected", report.rejected}});
  }
  for (const auto& step : report.rejected) std::cout << "passed over: " << step << "\n";
  std::cout << "step " << report.info.step << "  " << report.info.path << ": " << report.tensors
            << " tensors, " << format_bytes(report.bytes) << "\n";
  for (const auto& file : report.files) std::cout << "wrote " << file << "\n";
  if (report.overflowed > 0) {
    std::cout << "WARNING: " << report.overflowed << " values do not fit " << options.dtype
              << " and became infinite\n";
  }
}

struct ImportFlags {
  std::string file, out, prefix;
  int64_t step = 0;
  bool force = false, json = false;
};

void import_file(const CLI::App& command, const ImportFlags& flags) {
  ImportOptions options{.replace = flags.force};
  if (command.count("--prefix") > 0) options.prefix = flags.prefix;
  const auto report = import_step(flags.file, flags.out, flags.step, options);
  if (flags.json) {
    return print({{"step", report.info.step},
                  {"path", report.info.path},
                  {"prefix", report.prefix},
                  {"tensors", report.tensors},
                  {"bytes", report.info.bytes},
                  {"warnings", report.warnings}});
  }
  std::cout << "step " << report.info.step << "  " << report.info.path << ": " << report.tensors
            << " tensors under '" << report.prefix << "', " << format_bytes(report.info.bytes)
            << "\n";
  for (const auto& warning : report.warnings) std::cout << "WARNING: " << warning << "\n";
}

void add_export(CLI::App& ckpt) {
  auto flags = std::make_shared<ExportFlags>();
  auto* command = ckpt.add_subcommand("export", "write a step's model as safetensors");
  command->add_option("path", flags->path, "run folder, checkpoint folder or step folder")
      ->required();
  command->add_option("--out", flags->out, "folder, or a file *.safetensors")->required();
  command->add_option("--step", flags->options.step, "this step, not the newest good one");
  command->add_flag("--all", flags->options.all, "every tensor, not only the model's");
  command->add_option("--dtype", flags->options.dtype, "bf16, fp16 or fp32: floats become this")
      ->transform(CLI::Transformer(std::map<std::string, std::string>{
          {"bf16", "bfloat16"}, {"fp16", "float16"}, {"fp32", "float32"}}));
  command->add_option("--shard-gb", flags->shard_gb, "several files of at most so many 10^9 bytes")
      ->check(CLI::Range(1e-9, kMostShardGb));
  command->add_flag("--force", flags->options.replace, "replace an export that is there");
  command->add_flag("--json", flags->json, "print JSON");
  command->callback([flags] { export_files(*flags); });
}

void add_import(CLI::App& ckpt) {
  auto flags = std::make_shared<ImportFlags>();
  auto* command = ckpt.add_subcommand("import", "write a step from safetensors or HDF5");
  command
      ->add_option("file", flags->file,
                   "*.safetensors, the *.index.json of shards, or *.h5, *.hdf5")
      ->required();
  command->add_option("--out", flags->out, "folder of steps; made when missing")->required();
  command->add_option("--step", flags->step, "number of the step")->required();
  command->add_option("--prefix", flags->prefix, "put before every name; default model/");
  command->add_flag("--force", flags->force, "replace a step that is there");
  command->add_flag("--json", flags->json, "print JSON");
  command->callback([command, flags] { import_file(*command, *flags); });
}

}  // namespace

void add_ckpt_exchange(CLI::App& ckpt) {
  add_export(ckpt);
  add_import(ckpt);
}

}  // namespace ounce::cli
