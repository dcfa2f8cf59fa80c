// SPDX-License-Identifier: MIT
#include <ounce/core/check.h>
#include <ounce/core/registry.h>

#include <iostream>
#include <nlohmann/json.hpp>

#include "commands.h"

namespace ounce::cli {

namespace {

void print(const RegistryStore& store, const std::string& name) {
  const auto& info = store.info(name);
  std::cout << store.kind() << " " << name << ": " << info.doc << "\n";
  std::string line;
  for (std::istringstream text(info.defaults); std::getline(text, line);) {
    std::cout << "    " << line << "\n";
  }
}

void print_json() {
  auto all = nlohmann::json::array();
  for (const auto* store : registry_stores()) {
    for (const auto& name : store->names()) {
      const auto& info = store->info(name);
      all.push_back({{"kind", store->kind()},
                     {"name", name},
                     {"doc", info.doc},
                     {"defaults", info.defaults}});
    }
  }
  std::cout << all.dump(1) << "\n";
}

void modules(const std::string& filter) {
  bool found = false;
  std::vector<std::string> known;
  for (const auto* store : registry_stores()) {
    known.push_back(store->kind());
    for (const auto& name : store->names()) {
      known.push_back(name);
      if (!filter.empty() && filter != store->kind() && filter != name) continue;
      print(*store, name);
      found = true;
    }
  }
  OUNCE_CHECK(found, "[modules] no kind or name '", filter, "'", nearest_hint(filter, known));
}

}  // namespace

void add_modules(CLI::App& app, int& exit_code) {
  auto* command = app.add_subcommand("modules", "what the registry holds, with defaults");
  auto filter = std::make_shared<std::string>();
  auto json = std::make_shared<bool>(false);
  command->add_option("filter", *filter, "a kind or a name");
  command->add_flag("--json", *json, "one JSON array");
  add_plugins(*command);
  command->callback([filter, json, &exit_code] {
    if (*json) {
      print_json();
    } else {
      modules(*filter);
    }
    exit_code = 0;
  });
}

}  // namespace ounce::cli
