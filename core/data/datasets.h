// SPDX-License-Identifier: MIT
// The datasets this library brings: `embedded`, `text` and `tokens`. Their options are documented
// in their registered defaults (`ounce modules dataset`).
#pragma once

#include <ounce/core/data/dataset.h>
#include <ounce/core/options.h>

#include <memory>

namespace ounce::data {

// Registers the three below.
void register_datasets();

// The C++ headers of the LibTorch that this process runs on, as bytes.
std::shared_ptr<Dataset> make_embedded(const Options& options, const Dataset::Context& context);
// UTF-8 files as bytes.
std::shared_ptr<Dataset> make_text(const Options& options, const Dataset::Context& context);
// Shards of token ids in the format of llm.c.
std::shared_ptr<Dataset> make_tokens(const Options& options, const Dataset::Context& context);

}  // namespace ounce::data
