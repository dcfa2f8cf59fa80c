// SPDX-License-Identifier: MIT
// How the bytes of a step are cut into slots: pieces of host memory that are copied from the device
// in one go, summed, and written to (or read from) the file in one call. No Torch here.
#pragma once

#include <ounce/ckpt/manifest.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace ounce::ckpt {

inline int64_t whole_pages(int64_t bytes) {
  return (bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
}

// Bytes [begin, begin + bytes) of a tensor, `at` bytes into its slot, on a page of its own. `begin`
// is a multiple of the block size.
struct Piece {
  size_t tensor = 0;
  int64_t begin = 0;
  int64_t bytes = 0;
  int64_t at = 0;
};

struct Slot {
  int group = 0;      // of all its tensors
  int64_t bytes = 0;  // of its memory, whole pages
  std::vector<Piece> pieces;
};

// The order in which tensors lie in a file and go into slots: small ones first, so that few slots
// hold many pieces and large ones fill theirs. Indices of `bytes`.
std::vector<size_t> storage_order(const std::vector<int64_t>& bytes);

struct LayoutItem {
  size_t tensor = 0;
  int64_t bytes = 0;
  int group = 0;  // tensors of different groups (devices, files) share no slot
};

// Fills slots of at most `slot_bytes` in the order given. Blocks of `block_bytes`, over which sums
// run, are never cut, so a slot holds at least one. Items without bytes are left out.
std::vector<Slot> cut_into_slots(const std::vector<LayoutItem>& items, int64_t slot_bytes,
                                 int64_t block_bytes);

// Pieces of a slot that follow each other in the file page by page, as one extent.
struct Run {
  int64_t file = 0;    // index in Manifest::files
  int64_t offset = 0;  // in the file, at a page
  int64_t at = 0;      // in the slot
  int64_t bytes = 0;   // up to the end of the last piece, which need not be a whole page
};
std::vector<Run> runs_of(const Slot& slot, const Manifest& manifest);

}  // namespace ounce::ckpt
