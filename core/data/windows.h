// SPDX-License-Identifier: MIT
// How the two token streams of a dataset become batches.
//
// Training. An epoch cuts the stream into windows of `sequence` tokens (and one more, the last
// target), from an offset in [0, sequence) that is drawn for each epoch, so that the cuts move. The
// windows are drawn without replacement in an order that is keyed by (seed, epoch); an epoch is the
// whole batches in it, what is left over is dropped. So batch k, and each row of it, is a function
// of (streams, context, k) alone, and a run's place in the data is the one integer k.
//
// Validation. Consecutive windows in order: every token but the first of the stream is a target
// once. The last row is filled up with token 0 and ignored targets, the last batch may have fewer
// rows.
//
// Packed documents. A document ends after each `document_end` token, and at a row's end. Batches
// then carry cu_seqlens and positions, and the target of a document's last token is ignored, since
// it belongs to the next document.
#pragma once

#include <ounce/core/data/dataset.h>
#include <ounce/core/data/token_source.h>

#include <memory>
#include <string>
#include <vector>

namespace ounce::data {

class Windows {
 public:
  // `valid` may be null or shorter than two tokens: no validation. `document_end` < 0: the streams
  // have none, and context.packed is refused. `name` is the dataset's, for errors. Throws
  // Fault::kUsage when the training stream does not fill one batch.
  Windows(std::string name, std::shared_ptr<const TokenSource> train,
          std::shared_ptr<const TokenSource> valid, const Dataset::Context& context,
          int64_t document_end);

  int64_t train_tokens() const { return train_->size(); }
  int64_t valid_tokens() const { return valid_rows_ > 0 ? valid_->size() : 0; }
  int64_t batches_per_epoch() const { return windows_ / context_.batch; }
  int64_t valid_batches() const;

  // Where the window of `row` of training batch `index` begins in the training stream.
  int64_t train_window(int64_t index, int64_t row) const;

  Batch train_batch(int64_t index) const;
  Batch valid_batch(int64_t index) const;

 private:
  struct Row {
    int64_t begin;
    int64_t targets;  // <= sequence; tokens after them are filling
  };
  Batch assemble(const TokenSource& source, const std::vector<Row>& rows) const;
  void split_documents(const std::vector<Row>& rows, Batch& batch) const;

  std::string name_;
  std::shared_ptr<const TokenSource> train_;
  std::shared_ptr<const TokenSource> valid_;
  Dataset::Context context_;
  int64_t document_end_;
  int64_t windows_ = 0;
  int64_t valid_rows_ = 0;
};

}  // namespace ounce::data
