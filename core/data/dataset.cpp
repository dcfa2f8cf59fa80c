// SPDX-License-Identifier: MIT
#include <ounce/core/check.h>
#include <ounce/core/data/dataset.h>

namespace ounce::data {

void Dataset::visit_state(StateVisitor& visitor) {
  const auto own = identity();
  auto stored = own;
  auto cursor = cursor_;
  visitor.text("identity", stored);
  visitor.integer("cursor", cursor);
  OUNCE_CHECK(stored == own, "[data] expected the data of identity ", stored,
              ", which the saved state was trained on, got ", own,
              "; give the same files and options, or start a new run");
  OUNCE_CHECK_AS(Fault::kData, cursor >= 0, "[data] expected a saved cursor of at least 0, got ",
                 cursor, "; the saved state is damaged");
  cursor_ = cursor;
}

}  // namespace ounce::data
