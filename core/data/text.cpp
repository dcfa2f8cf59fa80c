// SPDX-License-Identifier: MIT
#include <ounce/core/check.h>
#include <ounce/core/data/byte_dataset.h>
#include <ounce/core/data/datasets.h>
#include <ounce/core/data/files.h>

namespace ounce::data {

namespace {

std::string read_texts(const std::vector<std::string>& files) {
  std::string joined;
  for (const auto& path : files) {
    const auto text = read_file(path);
    if (const auto offset = find_invalid_utf8(text)) {
      fail(Fault::kData, "[data] text: '", path, "' is not UTF-8 at byte ", *offset,
           "; convert it (iconv -f latin1 -t utf-8), or leave it out");
    }
    if (!joined.empty()) joined += ByteDataset::kDocumentEnd;
    joined += text;
  }
  return joined;
}

// The first character boundary at or after `fraction` of the text.
size_t character_boundary(const std::string& text, double fraction) {
  auto at = static_cast<size_t>(static_cast<double>(text.size()) * fraction);
  while (at < text.size() && (static_cast<unsigned char>(text[at]) & 0xc0) == 0x80) ++at;
  return at;
}

}  // namespace

std::shared_ptr<Dataset> make_text(const Options& options, const Dataset::Context& context) {
  const auto patterns = options.texts("files");
  OUNCE_CHECK(!patterns.empty(), "[data] text: no files; set data.files");
  const auto files = expand_globs(patterns, "data.files");
  const auto valid_files = expand_globs(options.texts("valid_files"), "data.valid_files");
  check_disjoint(files, valid_files);
  const double fraction = options.number_in("valid_fraction", 0, 0.9);
  auto train = read_texts(files);
  auto valid = read_texts(valid_files);
  if (valid_files.empty()) {
    const auto cut = character_boundary(train, 1 - fraction);
    valid = train.substr(cut);
    train.resize(cut);
  }
  const auto files_text = std::to_string(files.size() + valid_files.size());
  return ByteDataset::make("text", std::move(train), std::move(valid), context,
                           {"text: " + files_text + (files_text == "1" ? " file" : " files") +
                            " from " + patterns.front() + (patterns.size() > 1 ? ", ..." : "")});
}

}  // namespace ounce::data
