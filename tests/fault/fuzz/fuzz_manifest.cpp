// SPDX-License-Identifier: MIT
// parse_manifest on any text: as it is, and with the sum that it would need.
#include <ounce/ckpt/manifest.h>
#include <ounce/ckpt/sums.h>

#include <string>
#include <string_view>

#include "fuzz.h"

namespace ounce::ckpt::fuzz {
namespace {

// The text with the 45 bytes that a manifest begins with replaced: nothing behind a wrong sum is
// ever reached.
std::string with_sum(std::string_view text) {
  const std::string start = "{\"self_xxh3\":\"";
  auto result = start + std::string(32, '0');
  if (text.size() > result.size()) result += text.substr(result.size());
  RunningSum sum;
  sum.add(result.data(), result.size());
  return result.replace(start.size(), 32, sum.digits());
}

void expect_same(const Manifest& a, const Manifest& b) {
  expect(a.tensors.size() == b.tensors.size() && a.scalars.size() == b.scalars.size() &&
             a.metrics.size() == b.metrics.size() && a.notes == b.notes && a.uuid == b.uuid,
         "a manifest survives its own text");
  for (const auto& [name, scalar] : a.scalars) {
    const auto found = b.scalars.find(name);
    expect(found != b.scalars.end() && found->second.index() == scalar.index(),
           "a scalar keeps its type");
    const auto* text = std::get_if<std::string>(&scalar);
    expect(text == nullptr || *text == std::get<std::string>(found->second),
           "a text survives, whatever its bytes");
  }
}

void feed(std::string_view text) {
  Manifest manifest, again;
  if (!parses(text.size(), [&] { manifest = parse_manifest(text); })) return;
  expect_apart(manifest.tensors, manifest.files, 0);
  const auto written = manifest_text(manifest);
  expect(parses(written.size(), [&] { again = parse_manifest(written); }),
         "what was parsed and written parses");
  expect_same(manifest, again);
  expect(manifest_text(again) == written, "it is written as before");
}

}  // namespace
}  // namespace ounce::ckpt::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  ounce::ckpt::fuzz::feed(text);
  ounce::ckpt::fuzz::feed(ounce::ckpt::fuzz::with_sum(text));
  return 0;
}
