// SPDX-License-Identifier: MIT
// Where batches come from. A training batch is a pure function of (dataset options, seed, index), so
// that the cursor of a run is one integer and resuming needs nothing else.
#pragma once

#include <ATen/core/Tensor.h>
#include <ounce/core/stateful.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace ounce::data {

// What a target that does not count is set to.
inline constexpr int64_t kIgnoredTarget = -100;

struct Batch {
  at::Tensor tokens;      // int64 [batch, sequence], CPU until the learner moves it
  at::Tensor targets;     // int64 [batch, sequence]: the next token, or kIgnoredTarget
  at::Tensor cu_seqlens;  // int32 [n + 1] over batch * sequence tokens (packed documents), or undefined
  at::Tensor positions;   // int64 [batch, sequence], restarting at documents; undefined when cu_seqlens is
  int64_t counted = 0;    // targets that count
};

class Dataset : public Stateful {
 public:
  static constexpr const char* kKind = "dataset";
  struct Context {
    int64_t sequence = 0;  // tokens of a row
    int64_t batch = 0;     // rows of a global batch
    uint64_t seed = 0;
    bool packed = false;   // cu_seqlens at document ends
  };

  virtual int64_t vocab_size() const = 0;
  virtual int64_t train_tokens() const = 0;
  virtual int64_t valid_tokens() const = 0;  // 0 = no validation split

  // Global training batch `index` >= 0: rows drawn without replacement by a keyed permutation of
  // (seed, epoch); depends on nothing else.
  virtual Batch train_batch(int64_t index) const = 0;
  // The validation split in a fixed order, each token once; the last batch may have fewer rows, its
  // last row ignored targets.
  virtual int64_t valid_batches() const = 0;
  virtual Batch valid_batch(int64_t index) const = 0;

  // The token that ends a document, also a start for samples without a prompt; -1 = none.
  virtual int64_t document_end() const { return -1; }
  virtual std::vector<int64_t> encode(const std::string& text) const = 0;
  // Bytes; may be cut in the middle of a UTF-8 character at the ends.
  virtual std::string decode(const std::vector<int64_t>& tokens) const = 0;

  // 16 hex digits over what the data is (files, sizes, hashes, split, options that change tokens);
  // resuming on data of another identity is refused.
  virtual std::string identity() const = 0;
  // Lines for the start block: files and token counts.
  virtual std::vector<std::string> describe() const = 0;
  // Reference losses (name, nats a token) of simple count models, computed on request; empty when not
  // offered. The embedded corpus gives orders 0 to 3.
  virtual std::vector<std::pair<std::string, double>> count_model_losses() const { return {}; }

  // The cursor: index of the next training batch. Advanced by the trainer only.
  int64_t cursor() const { return cursor_; }
  Batch next_train_batch() { return train_batch(cursor_++); }
  // Saves the cursor and identity; loading another identity is Fault::kUsage naming both.
  void visit_state(StateVisitor& visitor) override;

 private:
  int64_t cursor_ = 0;
};

}  // namespace ounce::data
