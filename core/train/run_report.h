// SPDX-License-Identifier: MIT
// What a run says of itself before its first step and after its last.
#pragma once

#include <ounce/core/train/memory_plan.h>
#include <ounce/core/train/session.h>
#include <ounce/core/train/sinks.h>

#include <optional>
#include <string>
#include <vector>

namespace ounce {

// Device, model, data, the count models' losses and the memory plan, a line each.
std::vector<std::string> start_block(Session& session, const std::optional<MemoryPlan>& plan,
                                     int64_t step, int64_t stop);
// Validation loss beside the count models', predicted and measured memory.
std::vector<std::string> end_block(Session& session, const std::optional<MemoryPlan>& plan,
                                   double valid_loss);
// The fields of the `config` record.
std::vector<Record::Field> config_record(Session& session, const std::optional<MemoryPlan>& plan);

// Control bytes and broken UTF-8 replaced, for a terminal and for JSON.
std::string printable(const std::string& bytes);

}  // namespace ounce
