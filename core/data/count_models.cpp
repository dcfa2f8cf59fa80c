// SPDX-License-Identifier: MIT
#include <ounce/core/check.h>
#include <ounce/core/data/count_models.h>

#include <cmath>
#include <cstdint>

namespace ounce::data {

namespace {

// Up to four bytes -> a count and the number of distinct bytes seen after them. Open addressing.
class CountTable {
 public:
  struct Slot {
    uint32_t key = 0;
    uint32_t distinct = 0;
    uint64_t count = 0;  // 0 = free
  };

  CountTable() : slots_(size_t{1} << bits_) {}

  // The slot of `key`, made if need be; the caller has to raise its count. Valid until the next
  // call.
  Slot& at(uint32_t key) {
    auto* slot = &slots_[place(key)];
    if (slot->count != 0) return *slot;
    if (2 * ++used_ > slots_.size()) {
      grow();
      slot = &slots_[place(key)];
    }
    slot->key = key;
    return *slot;
  }
  const Slot& find(uint32_t key) const { return slots_[place(key)]; }
  const std::vector<Slot>& slots() const { return slots_; }

 private:
  // Where the key is, or the free slot where it belongs.
  size_t place(uint32_t key) const {
    size_t i = (key * uint64_t{0x9e3779b97f4a7c15}) >> (64 - bits_);
    while (slots_[i].count != 0 && slots_[i].key != key) i = (i + 1) & (slots_.size() - 1);
    return i;
  }

  void grow() {
    ++bits_;
    std::vector<Slot> old(size_t{1} << bits_);
    old.swap(slots_);
    for (const auto& slot : old) {
      if (slot.count != 0) slots_[place(slot.key)] = slot;
    }
  }

  int bits_ = 12;
  size_t used_ = 0;
  std::vector<Slot> slots_;
};

uint32_t low_bytes(int count) { return count == 4 ? ~0u : (1u << (8 * count)) - 1; }

class CountModels {
 public:
  explicit CountModels(std::string_view text) {
    constexpr int last = kCountModelOrders - 1;
    uint32_t run = 0;
    for (const char c : text) {
      run = (run << 8) | static_cast<unsigned char>(c);
      ++runs_[last].at(run).count;
    }
    // Shorter runs are sums over the longer ones, since every position ends one run of each length.
    for (int order = last; order >= 0; --order) {
      for (const auto& slot : runs_[order].slots()) {
        if (slot.count == 0) continue;
        auto& context = contexts_[order].at(slot.key >> 8);
        context.count += slot.count;
        ++context.distinct;
        if (order > 0) runs_[order - 1].at(slot.key & low_bytes(order)).count += slot.count;
      }
    }
  }

  // Adds -log p_k of the last byte of `run` to losses[k].
  void add_losses(uint32_t run, std::vector<double>& losses) const {
    double p = 1.0 / 256;
    for (int order = 0; order < kCountModelOrders; ++order) {
      const uint32_t key = run & low_bytes(order + 1);
      const auto& context = contexts_[order].find(key >> 8);
      if (context.count != 0) {
        const auto count = static_cast<double>(runs_[order].find(key).count);
        const auto distinct = static_cast<double>(context.distinct);
        p = (count + distinct * p) / (static_cast<double>(context.count) + distinct);
      }
      losses[order] -= std::log(p);
    }
  }

 private:
  CountTable runs_[kCountModelOrders];      // [k]: k + 1 bytes
  CountTable contexts_[kCountModelOrders];  // [k]: k bytes
};

}  // namespace

std::vector<double> count_model_losses(std::string_view train, std::string_view valid) {
  OUNCE_CHECK(valid.size() >= 2, "[data] count models: expected at least 2 bytes to predict, got ",
              valid.size());
  const CountModels models(train);
  std::vector<double> losses(kCountModelOrders);
  uint32_t run = static_cast<unsigned char>(valid[0]);
  for (size_t i = 1; i < valid.size(); ++i) {
    run = (run << 8) | static_cast<unsigned char>(valid[i]);
    models.add_losses(run, losses);
  }
  for (auto& loss : losses) loss /= static_cast<double>(valid.size() - 1);
  return losses;
}

}  // namespace ounce::data
