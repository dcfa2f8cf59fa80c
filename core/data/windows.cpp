// SPDX-License-Identifier: MIT
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <ounce/core/check.h>
#include <ounce/core/data/permutation.h>
#include <ounce/core/data/windows.h>

#include <algorithm>
#include <limits>

namespace ounce::data {

Windows::Windows(std::string name, std::shared_ptr<const TokenSource> train,
                 std::shared_ptr<const TokenSource> valid, const Dataset::Context& context,
                 int64_t document_end)
    : name_(std::move(name)),
      train_(std::move(train)),
      valid_(std::move(valid)),
      context_(context),
      document_end_(document_end) {
  OUNCE_CHECK(context.sequence >= 1, "[data] ", name_,
              ": expected data.sequence of at least 1, got ", context.sequence);
  OUNCE_CHECK(context.batch >= 1, "[data] ", name_, ": expected data.batch of at least 1, got ",
              context.batch);
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  OUNCE_CHECK(context.batch <= kMost / context.sequence, "[data] ", name_,
              ": expected a batch of at most 2^31 - 1 tokens, got ", context.batch, " x ",
              context.sequence, "; lower data.batch and raise data.accumulate");
  OUNCE_CHECK(!context.packed || document_end >= 0, "[data] ", name_,
              ": documents = \"packed\" needs a token that ends documents, and there is none; set "
              "data.eos, or documents = \"stream\"");
  // Room for the largest offset, sequence - 1, and for the last target.
  windows_ = std::max<int64_t>(0, train_->size() / context.sequence - 1);
  OUNCE_CHECK(windows_ >= context.batch, "[data] ", name_, ": the training split of ",
              train_->size(), " tokens gives ", windows_,
              " windows of data.sequence = ", context.sequence,
              " tokens, fewer than data.batch = ", context.batch,
              "; lower data.sequence or data.batch, or give more data");
  if (valid_ && valid_->size() >= 2) {
    valid_rows_ = (valid_->size() - 2) / context.sequence + 1;
  }
}

int64_t Windows::valid_batches() const {
  return (valid_rows_ + context_.batch - 1) / context_.batch;
}

int64_t Windows::train_window(int64_t index, int64_t row) const {
  const int64_t epoch = index / batches_per_epoch();
  const int64_t slot = index % batches_per_epoch() * context_.batch + row;
  const uint64_t key = mix64(context_.seed, epoch);
  const auto offset = static_cast<int64_t>(mix64(key) % static_cast<uint64_t>(context_.sequence));
  const auto window = static_cast<int64_t>(KeyedPermutation(windows_, key)(slot));
  return offset + window * context_.sequence;
}

Batch Windows::train_batch(int64_t index) const {
  OUNCE_CHECK(index >= 0, "[data] ", name_, ": expected a batch index of at least 0, got ", index);
  std::vector<Row> rows;
  for (int64_t row = 0; row < context_.batch; ++row) {
    rows.push_back({train_window(index, row), context_.sequence});
  }
  return assemble(*train_, rows);
}

Batch Windows::valid_batch(int64_t index) const {
  OUNCE_CHECK(index >= 0 && index < valid_batches(), "[data] ", name_,
              ": expected a validation batch in [0, ", valid_batches(), "), got ", index);
  std::vector<Row> rows;
  const int64_t first = index * context_.batch;
  for (int64_t row = first; row < std::min(first + context_.batch, valid_rows_); ++row) {
    const int64_t begin = row * context_.sequence;
    rows.push_back({begin, std::min(context_.sequence, valid_->size() - 1 - begin)});
  }
  return assemble(*valid_, rows);
}

Batch Windows::assemble(const TokenSource& source, const std::vector<Row>& rows) const {
  const int64_t sequence = context_.sequence;
  Batch batch;
  batch.tokens = at::empty({static_cast<int64_t>(rows.size()), sequence}, at::kLong);
  batch.targets = at::empty_like(batch.tokens);
  auto* tokens = batch.tokens.mutable_data_ptr<int64_t>();
  auto* targets = batch.targets.mutable_data_ptr<int64_t>();
  std::vector<int64_t> window(sequence + 1);
  for (const auto& row : rows) {
    source.read(row.begin, row.targets + 1, window.data());
    std::copy_n(window.data(), row.targets, tokens);
    std::copy_n(window.data() + 1, row.targets, targets);
    std::fill(tokens + row.targets, tokens + sequence, 0);
    std::fill(targets + row.targets, targets + sequence, kIgnoredTarget);
    batch.counted += row.targets;
    tokens += sequence;
    targets += sequence;
  }
  if (context_.packed) split_documents(rows, batch);
  return batch;
}

void Windows::split_documents(const std::vector<Row>& rows, Batch& batch) const {
  batch.positions = at::empty_like(batch.tokens);
  const auto* tokens = batch.tokens.const_data_ptr<int64_t>();
  auto* targets = batch.targets.mutable_data_ptr<int64_t>();
  auto* positions = batch.positions.mutable_data_ptr<int64_t>();
  std::vector<int32_t> boundaries = {0};
  int64_t at = 0;
  for (const auto& row : rows) {
    const int64_t begin = at;
    for (int64_t position = 0; at < begin + context_.sequence; ++at) {
      positions[at] = position++;
      // Filling is no document of its own.
      if (at - begin >= row.targets || tokens[at] != document_end_) continue;
      targets[at] = kIgnoredTarget;
      --batch.counted;
      position = 0;
      boundaries.push_back(static_cast<int32_t>(at + 1));
    }
    if (boundaries.back() != at) boundaries.push_back(static_cast<int32_t>(at));
  }
  batch.cu_seqlens = at::tensor(boundaries, at::kInt);
}

}  // namespace ounce::data
