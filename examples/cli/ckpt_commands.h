// SPDX-License-Identifier: MIT
// What the files of `ounce ckpt` share. Each adds its subcommands to `ckpt`; paths that hold
// nothing, and damage where a value was asked for, are thrown as ounce::Error.
#pragma once

#include <ounce/ckpt/manifest.h>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <string>

namespace ounce::cli {

using Json = nlohmann::ordered_json;

void add_ckpt_look(CLI::App& ckpt, int& exit_code);  // ls, show, verify
void add_ckpt_diff(CLI::App& ckpt, int& exit_code);  // diff
void add_ckpt_exchange(CLI::App& ckpt);              // export, import
void add_ckpt_keep(CLI::App& ckpt, int& exit_code);  // gc, pin, unpin
void add_ckpt_resume(CLI::App& ckpt);                // resume-cmd

void print(const Json& json);
Json number_json(double value);  // "nan", "inf" and "-inf" as texts
Json scalar_json(const ckpt::Scalar& scalar);
std::string scalar_text(const ckpt::Scalar& scalar);

}  // namespace ounce::cli
