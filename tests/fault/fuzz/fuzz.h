// SPDX-License-Identifier: MIT
// What the fuzz targets share. Each is one LLVMFuzzerTestOneInput, which libFuzzer drives in
// ../long.sh and replay.cpp feeds with the corpus in every test run. No Torch here.
#pragma once

#include <ounce/ckpt/manifest.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace ounce::ckpt::fuzz {

// Aborts with `what` where a property does not hold.
void expect(bool condition, const std::string& what);

// Whether `parse` returns. It may throw StorageError of kind kDamaged or kNewerFormat and nothing
// else, and hold at most a multiple of `size`, which it was given, at any time.
bool parses(size_t size, const std::function<void()>& parse);

// Every tensor's bytes lie in [begin, end) of the file that it names, and apart from the others'.
void expect_apart(const std::vector<TensorRecord>& tensors, const std::vector<FileRecord>& files,
                  int64_t begin);

}  // namespace ounce::ckpt::fuzz
