// SPDX-License-Identifier: MIT
// The tiles of the family's GEMMs: 128 x 192. For .cu files.
#pragma once

#include <ounce/kernels/cce/cce_plan.h>
#include <ounce/kernels/common/tiles.h>

namespace ounce::cce {

using tiles::kGroup, tiles::kThreads, tiles::kMultiplyTurn;
using tiles::Lane, tiles::Rows, tiles::each_element, tiles::run_block, tiles::launch_clusters;
static_assert(kTileRows == tiles::kRows && kDepth == tiles::kDepth && kLanes == tiles::kLanes &&
              kBoxColumns == tiles::kBoxColumns);

template <int stages, int out_bytes>
using Ring = tiles::Ring<kTileColumns, stages, out_bytes>;
using Accumulators = tiles::Accumulators<kTileColumns>;

}  // namespace ounce::cce
