// SPDX-License-Identifier: MIT
#include <ounce/core/registry.h>

#include "token_shift.h"

extern "C" void ounce_register() {
  ounce::registry<ounce::Mixer>().add({.name = "token_shift_plugin",
                                       .doc = "a linear map of the last few tokens, from a plug-in",
                                       .defaults = "taps = 2  # tokens seen"},
                                      TokenShift::make);
}
