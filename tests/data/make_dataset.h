// SPDX-License-Identifier: MIT
#pragma once

#include <ounce/core/data/datasets.h>
#include <ounce/core/registry.h>

#include <memory>
#include <string>
#include <vector>

namespace ounce::test {

// A dataset by its registered name, as a config's [data] names it.
inline std::shared_ptr<data::Dataset> make_dataset(const std::string& name,
                                                   const std::vector<Options::Item>& options,
                                                   const data::Dataset::Context& context) {
  auto datasets = registry<data::Dataset>();
  if (!datasets.store().contains("text")) data::register_datasets();
  Options spec;
  spec.set("name", name);
  for (const auto& [key, value] : options) spec.set(key, value);
  return datasets.make(spec, context);
}

}  // namespace ounce::test
