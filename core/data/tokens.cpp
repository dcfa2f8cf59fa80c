// SPDX-License-Identifier: MIT
#include <ounce/core/check.h>
#include <ounce/core/data/datasets.h>
#include <ounce/core/data/files.h>
#include <ounce/core/data/gpt2_vocabulary.h>
#include <ounce/core/data/token_shards.h>
#include <ounce/core/data/windowed_dataset.h>

#include <charconv>
#include <optional>

namespace ounce::data {

namespace {

using Shards = std::vector<std::shared_ptr<const TokenShard>>;

Shards open_shards(const std::vector<std::string>& files) {
  Shards shards;
  for (const auto& path : files) shards.push_back(std::make_shared<const TokenShard>(path));
  return shards;
}

class TokensDataset final : public WindowedDataset {
 public:
  TokensDataset(Windows windows, std::string identity, std::vector<std::string> description,
                int64_t vocab_size, int64_t document_end,
                std::shared_ptr<const Gpt2Vocabulary> vocabulary)
      : WindowedDataset(std::move(windows), std::move(identity), std::move(description)),
        vocab_size_(vocab_size),
        document_end_(document_end),
        vocabulary_(std::move(vocabulary)) {}

  int64_t vocab_size() const override { return vocab_size_; }
  int64_t document_end() const override { return document_end_; }

  // Without a vocabulary text is ids with spaces between, both ways.
  std::vector<int64_t> encode(const std::string& text) const override {
    if (vocabulary_) return vocabulary_->encode(text);
    std::vector<int64_t> tokens;
    const char* at = text.data();
    const char* const end = at + text.size();
    while (true) {
      while (at < end && (*at == ' ' || *at == '\n' || *at == '\t')) ++at;
      if (at == end) return tokens;
      int64_t token = -1;
      const auto [next, error] = std::from_chars(at, end, token);
      const bool whole = next == end || *next == ' ' || *next == '\n' || *next == '\t';
      OUNCE_CHECK(error == std::errc() && whole && token >= 0 && token < vocab_size_,
                  "[data] tokens: cannot encode '", text,
                  "' without a vocabulary; set "
                  "data.vocabulary to GPT-2's encoder.json, or write ids below ",
                  vocab_size_, " with spaces between");
      tokens.push_back(token);
      at = next;
    }
  }

  std::string decode(const std::vector<int64_t>& tokens) const override {
    if (vocabulary_) return vocabulary_->decode(tokens);
    std::string text;
    for (const auto token : tokens) text += (text.empty() ? "" : " ") + std::to_string(token);
    return text;
  }

 private:
  int64_t vocab_size_;
  int64_t document_end_;
  std::shared_ptr<const Gpt2Vocabulary> vocabulary_;
};

}  // namespace

std::shared_ptr<Dataset> make_tokens(const Options& options, const Dataset::Context& context) {
  const auto patterns = options.texts("files");
  OUNCE_CHECK(!patterns.empty(), "[data] tokens: no files; set data.files");
  const int64_t vocab_size = options.positive("vocab_size");
  const int64_t eos = options.integer("eos");
  OUNCE_CHECK(eos >= -1 && eos < vocab_size,
              "[config] 'eos': expected -1 or an id below "
              "data.vocab_size = ",
              vocab_size, ", got ", eos);
  const double fraction = options.number_in("valid_fraction", 0, 0.9);
  const auto files = expand_globs(patterns, "data.files");
  const auto valid_files = expand_globs(options.texts("valid_files"), "data.valid_files");
  check_disjoint(files, valid_files);

  const auto shards = open_shards(files);
  const auto valid_shards = open_shards(valid_files);
  const auto whole = std::make_shared<const ShardSource>(shards, vocab_size);
  auto train = whole;
  auto valid = std::make_shared<const ShardSource>(valid_shards, vocab_size);
  if (valid_files.empty()) {
    const auto cut = static_cast<int64_t>(static_cast<double>(whole->size()) * (1 - fraction));
    train = std::make_shared<const ShardSource>(shards, vocab_size, 0, cut);
    valid = std::make_shared<const ShardSource>(shards, vocab_size, cut);
  }
  std::vector<uint64_t> parts = {static_cast<uint64_t>(vocab_size), static_cast<uint64_t>(eos),
                                 static_cast<uint64_t>(train->size()),
                                 static_cast<uint64_t>(valid->size())};
  for (const auto* list : {&shards, &valid_shards}) {
    for (const auto& shard : *list) parts.push_back(shard->fingerprint());
  }
  std::shared_ptr<const Gpt2Vocabulary> vocabulary;
  if (const auto& path = options.text("vocabulary"); !path.empty()) {
    vocabulary = std::make_shared<const Gpt2Vocabulary>(path, vocab_size);
  }
  Windows windows("tokens", train, valid, context, eos);
  return std::make_shared<TokensDataset>(
      std::move(windows), identity_of(parts),
      std::vector<std::string>{"tokens: " + std::to_string(files.size() + valid_files.size()) +
                               " shards from " + patterns.front() +
                               (patterns.size() > 1 ? ", ..." : "")},
      vocab_size, eos, std::move(vocabulary));
}

}  // namespace ounce::data
