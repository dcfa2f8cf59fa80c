// SPDX-License-Identifier: MIT
#include <ounce/ckpt/layout.h>

#include <algorithm>
#include <numeric>

namespace ounce::ckpt {

std::vector<size_t> storage_order(const std::vector<int64_t>& bytes) {
  constexpr int64_t kSmallBytes = int64_t{256} << 10;
  std::vector<size_t> order(bytes.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_partition(order.begin(), order.end(),
                        [&](size_t i) { return bytes[i] < kSmallBytes; });
  return order;
}

std::vector<Slot> cut_into_slots(const std::vector<LayoutItem>& items, int64_t slot_bytes,
                                 int64_t block_bytes) {
  std::vector<Slot> slots;
  for (const auto& item : items) {
    for (int64_t begin = 0; begin < item.bytes;) {
      const auto left = item.bytes - begin;
      auto room =
          slots.empty() || slots.back().group != item.group ? 0 : slot_bytes - slots.back().bytes;
      if (whole_pages(std::min(left, block_bytes)) > room) {
        slots.push_back({.group = item.group});
        room = std::max(slot_bytes, block_bytes);
      }
      auto& slot = slots.back();
      const auto bytes = left <= room ? left : room / block_bytes * block_bytes;
      slot.pieces.push_back({item.tensor, begin, bytes, slot.bytes});
      slot.bytes += whole_pages(bytes);
      begin += bytes;
    }
  }
  return slots;
}

std::vector<Run> runs_of(const Slot& slot, const Manifest& manifest) {
  std::vector<Run> runs;
  for (const auto& piece : slot.pieces) {
    const auto& tensor = manifest.tensors[piece.tensor];
    const auto offset = tensor.offset + piece.begin;
    if (!runs.empty()) {
      auto& last = runs.back();
      if (last.file == tensor.file && last.offset + (piece.at - last.at) == offset) {
        last.bytes = piece.at - last.at + piece.bytes;
        continue;
      }
    }
    runs.push_back({tensor.file, offset, piece.at, piece.bytes});
  }
  return runs;
}

}  // namespace ounce::ckpt
