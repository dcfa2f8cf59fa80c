// SPDX-License-Identifier: MIT
// The one precompiled header: torch/torch.h costs 15 s and 1.3 GB a file, so everything of this
// project that is compiled with Torch shares this.
#pragma once

#include <torch/library.h>
#include <torch/torch.h>
