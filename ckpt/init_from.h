// SPDX-License-Identifier: MIT
// --init-from: the weights of a module, and nothing else, from a checkpoint or a .safetensors file.
#pragma once

#include <string>
#include <vector>

namespace torch::nn {
class Module;
}

namespace ounce::ckpt {

struct WeightsReport {
  std::string source;                   // the file or the step folder that was read
  std::vector<std::string> loaded;      // names in the module
  std::vector<std::string> missing;     // of the module, not stored
  std::vector<std::string> unexpected;  // stored, after mapping, not of the module
  std::vector<std::string> mismatched;  // "name (expected [..], got [..])"
  std::vector<std::string> rejected;    // newer steps that were passed over, with the reason each
  bool good() const { return missing.empty() && unexpected.empty() && mismatched.empty(); }
  std::string summary() const;  // counts and names, on one line
};

// `path`: a .safetensors file, or a checkpoint root, run folder or step folder. Of a checkpoint the
// tensors under `prefix` are taken, without it; the rest (optimizer, cursors) is ignored. Shapes
// must match; a floating dtype is converted to the parameter's, any other must match. Names under
// which a module holds one tensor twice (tied weights) are one entry: any of them fills it. Every
// byte that is taken from a checkpoint is verified before the first value is changed; of a root, a
// damaged step is passed over for the next older one, as load_checkpoint() does. With `strict`,
// anything missing, unexpected or mismatched throws ounce::Error (kUsage) with the whole report and
// changes nothing; otherwise what fits is loaded. Allocates the bytes of the weights on the host.
//
// `name_rules`, "from=to" each: a stored name that begins with `from` begins with `to` instead
// (both may be empty). The first rule that matches a name is applied to it, once.
WeightsReport load_weights(const std::string& path, torch::nn::Module& module,
                           const std::vector<std::string>& name_rules = {}, bool strict = true,
                           const std::string& prefix = "model/");
// The same from the levels of one run: the newest good step of all of them.
WeightsReport load_weights(const std::vector<std::string>& roots, torch::nn::Module& module,
                           const std::vector<std::string>& name_rules = {}, bool strict = true,
                           const std::string& prefix = "model/");

}  // namespace ounce::ckpt
