// SPDX-License-Identifier: MIT
// Text as bytes: a vocabulary of 256, no tokenizer. Documents (files) are joined by a NUL byte,
// which well-behaved text does not contain, so that a document's end is a token that a model can
// learn.
#pragma once

#include <ounce/core/data/windowed_dataset.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace ounce::data {

class ByteDataset : public WindowedDataset {
 public:
  static constexpr char kDocumentEnd = '\0';

  // The texts of the two splits, documents joined; both are held in memory. `valid` may be empty.
  // `name` is the registered one, for errors. The identity is over the bytes of both.
  static std::shared_ptr<ByteDataset> make(const std::string& name, std::string train,
                                           std::string valid, const Context& context,
                                           std::vector<std::string> description);

  int64_t vocab_size() const override { return 256; }
  int64_t document_end() const override { return kDocumentEnd; }
  std::vector<int64_t> encode(const std::string& text) const override;
  // Document ends read as line ends. Throws Fault::kUsage for a token outside [0, 256).
  std::string decode(const std::vector<int64_t>& tokens) const override;
  // Orders 0 to 3; empty without a validation split.
  std::vector<std::pair<std::string, double>> count_model_losses() const override;

 private:
  ByteDataset(Windows windows, std::string identity, std::vector<std::string> description,
              std::shared_ptr<const ByteSource> train, std::shared_ptr<const ByteSource> valid);

  std::shared_ptr<const ByteSource> train_;
  std::shared_ptr<const ByteSource> valid_;
};

}  // namespace ounce::data
