// SPDX-License-Identifier: MIT
// The config of a run: TOML, checked strictly, every default filled in.
#pragma once

#include <ounce/core/options.h>

#include <string>
#include <vector>

namespace ounce {

// The configuration that `./ounce train` runs when it is given none: a small GLA language model on
// the embedded corpus.
extern const char* const kDefaultConfig;

// Reads `path` (empty = kDefaultConfig), lays `overrides` ("a.b=c") over it, fills in every default
// of every part, and checks keys, types and names. The result is complete and reads back as itself.
// Throws Fault::kUsage (Fault::kData for an unreadable file), naming the place.
Options read_config(const std::string& path, const std::vector<std::string>& overrides);
Options complete_config(const Options& given, const std::string& source);

// The dataset's, optimizer's or learner's own options: the section without the keys of the loop.
Value part_spec(const Options& config, const std::string& section);

// The differences between the config of a run and one it is to be resumed with, as "key: old ->
// new"; those that a resumed run may have (intervals, checkpoint settings, compute device) are left
// out.
std::vector<std::string> forbidden_changes(const Options& old_config, const Options& new_config);

}  // namespace ounce
