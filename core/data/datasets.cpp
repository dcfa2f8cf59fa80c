// SPDX-License-Identifier: MIT
#include <ounce/core/data/datasets.h>
#include <ounce/core/registry.h>

namespace ounce::data {

namespace {

constexpr const char* kEmbeddedDefaults =
    R"(path = ""        # include folder of a LibTorch; empty = the one this process runs on
valid_every = 16 # one file in so many is for validation, chosen by a hash of its name
)";

constexpr const char* kTextDefaults =
    R"(files = []           # paths or globs, read in this order, joined by NUL bytes; a string or an array
valid_files = []     # the same for validation; empty = the end of `files`
valid_fraction = 0.1 # how much of `files` that end is; 0 = no validation
)";

constexpr const char* kTokensDefaults =
    R"(files = []            # paths or globs of .bin shards of llm.c; a string or an array
valid_files = []      # the same for validation; empty = the end of `files`
valid_fraction = 0.01 # how much of `files` that end is; 0 = no validation
vocab_size = 50257    # ids are below it
eos = 50256           # the id between documents; -1 = none
vocabulary = ""       # GPT-2's encoder.json (vocab.json): samples and prompts are text, not ids
)";

}  // namespace

void register_datasets() {
  auto datasets = registry<Dataset>();
  datasets.add({.name = "embedded",
                .doc = "the C++ headers of the installed LibTorch, byte level, split by file",
                .defaults = kEmbeddedDefaults},
               make_embedded);
  datasets.add({.name = "text", .doc = "UTF-8 text files, byte level", .defaults = kTextDefaults},
               make_text);
  datasets.add({.name = "tokens",
                .doc = "memory-mapped token shards of llm.c (.bin), GPT-2 or Llama 3 ids",
                .defaults = kTokensDefaults},
               make_tokens);
}

}  // namespace ounce::data
