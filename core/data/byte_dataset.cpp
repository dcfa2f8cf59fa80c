// SPDX-License-Identifier: MIT
#include <ounce/core/check.h>
#include <ounce/core/data/byte_dataset.h>
#include <ounce/core/data/count_models.h>
#include <ounce/core/data/files.h>

namespace ounce::data {

ByteDataset::ByteDataset(Windows windows, std::string identity,
                         std::vector<std::string> description,
                         std::shared_ptr<const ByteSource> train,
                         std::shared_ptr<const ByteSource> valid)
    : WindowedDataset(std::move(windows), std::move(identity), std::move(description)),
      train_(std::move(train)),
      valid_(std::move(valid)) {}

std::shared_ptr<ByteDataset> ByteDataset::make(const std::string& name, std::string train,
                                               std::string valid, const Context& context,
                                               std::vector<std::string> description) {
  auto identity = identity_of({train.size(), hash64(train), valid.size(), hash64(valid)});
  auto train_source = std::make_shared<const ByteSource>(std::move(train));
  auto valid_source = std::make_shared<const ByteSource>(std::move(valid));
  Windows windows(name, train_source, valid_source, context, kDocumentEnd);
  return std::shared_ptr<ByteDataset>(new ByteDataset(
      std::move(windows), std::move(identity), std::move(description), train_source, valid_source));
}

std::vector<int64_t> ByteDataset::encode(const std::string& text) const {
  std::vector<int64_t> tokens;
  tokens.reserve(text.size());
  for (const char c : text) tokens.push_back(static_cast<unsigned char>(c));
  return tokens;
}

std::string ByteDataset::decode(const std::vector<int64_t>& tokens) const {
  std::string text;
  text.reserve(tokens.size());
  for (const auto token : tokens) {
    OUNCE_CHECK(token >= 0 && token < 256, "[data] expected a byte in [0, 256), got ", token);
    text += token == kDocumentEnd ? '\n' : static_cast<char>(token);
  }
  return text;
}

std::vector<std::pair<std::string, double>> ByteDataset::count_model_losses() const {
  std::vector<std::pair<std::string, double>> named;
  if (valid_tokens() == 0) return named;
  for (const auto loss : data::count_model_losses(train_->bytes(), valid_->bytes())) {
    named.emplace_back("order-" + std::to_string(named.size()), loss);
  }
  return named;
}

}  // namespace ounce::data
