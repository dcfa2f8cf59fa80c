// SPDX-License-Identifier: MIT
#include <ounce/ckpt/storage_error.h>
#include <ounce/ckpt/vote.h>

namespace ounce::ckpt {
namespace {

class VoteOfOne : public Vote {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }
  Manifest prepare(Manifest own, const std::string& error) override {
    commit(error);
    return own;
  }
  void commit(const std::string& error) override {
    if (!error.empty()) throw StorageError(StorageError::Kind::kIo, error);
  }
};

}  // namespace

std::shared_ptr<Vote> vote_of_one() { return std::make_shared<VoteOfOne>(); }

}  // namespace ounce::ckpt
