// SPDX-License-Identifier: MIT
// The config of a run of seconds on a text that it writes.
#pragma once

#include <ounce/core/train/config.h>
#include <ounce/ounce.h>

#include <string>
#include <vector>

#include "support/temp_dir.h"

namespace ounce::test {

inline Options tiny_config(const TempDir& dir, std::vector<std::string> settings) {
  register_builtins();
  std::string text;
  for (int i = 0; i < 500; ++i) text += "line " + std::to_string(i) + " of 500\n";
  settings.insert(settings.begin(),
                  {"model.dim=16", "model.layers=1", "data.name=text",
                   "data.files=" + dir.write_file("text.txt", text), "data.sequence=16",
                   "data.batch=4", "optimizer.schedule.warmup=2", "run.eval_every=0",
                   "run.final_eval_batches=1", "run.log_every=1", "run.sample_tokens=0"});
  return read_config("", settings);
}

}  // namespace ounce::test
