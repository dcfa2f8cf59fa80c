// SPDX-License-Identifier: MIT
// A checkpoint kept from the first version: every later one reads it bit for bit. With
// OUNCE_WRITE_GOLDEN=DIR the test writes a new one there instead; do that only for a new format,
// beside the old one.
#include "ckpt/sample_state.h"

#include <gtest/gtest.h>
#include <ounce/ckpt/reader.h>

#include <cstdlib>

namespace ounce::ckpt {
namespace {

// Element i is (3 i - 5) / 4; its whole part where there are no fractions, without sign where there
// is none; i mod 2 for bool; with minus itself as imaginary part for complex numbers.
at::Tensor golden_values(at::IntArrayRef shape, at::ScalarType dtype) {
  const auto count = c10::multiply_integers(shape);
  const auto i = at::arange(count, at::kDouble);
  auto value = (i * 3 - 5) / 4;
  if (dtype == at::kBool) {
    value = i.remainder(2);
  } else if (at::isIntegralType(dtype, false)) {
    value = value.trunc();
    const bool has_sign =
        dtype == at::kChar || dtype == at::kShort || dtype == at::kInt || dtype == at::kLong;
    if (!has_sign) value = value.abs();
  } else if (at::isComplexType(dtype)) {
    value = at::complex(value, -value);
  }
  return value.to(dtype).reshape(shape);
}

SampleState golden_state() {
  SampleState state;
  for (const auto& [name, dtype] : std::initializer_list<std::pair<const char*, at::ScalarType>>{
           {"float32", at::kFloat},
           {"float64", at::kDouble},
           {"float16", at::kHalf},
           {"bfloat16", at::kBFloat16},
           {"uint8", at::kByte},
           {"int8", at::kChar},
           {"int16", at::kShort},
           {"int32", at::kInt},
           {"int64", at::kLong},
           {"uint16", at::kUInt16},
           {"uint32", at::kUInt32},
           {"uint64", at::kUInt64},
           {"bool", at::kBool},
           {"complex64", at::kComplexFloat},
           {"complex128", at::kComplexDouble},
           {"float8_e4m3fn", at::kFloat8_e4m3fn},
           {"float8_e5m2", at::kFloat8_e5m2}}) {
    state.tensors.push_back({std::string("all/") + name, golden_values({2, 3}, dtype)});
  }
  state.tensors.push_back({"model/layers.0.weight", golden_values({4, 5}, at::kFloat)});
  state.tensors.push_back({"model/tied.weight", state.tensors.back().value});
  state.tensors.push_back({"model/scalar", golden_values({}, at::kFloat), StateClass::kForward});
  state.tensors.push_back({"model/empty", golden_values({0, 3}, at::kFloat)});
  state.tensors.push_back({"state/rng", golden_values({64}, at::kByte), StateClass::kHost});
  state.integers = {{"state/step", 7}, {"state/negative", -9007199254740993}};
  state.numbers = {{"state/loss", 0.1}, {"state/best", -0.0}};
  state.texts = {{"state/corpus", "größe"}};
  return state;
}

TEST(Golden, IsReadBitForBit) {
  auto expected = golden_state();
  if (const char* target = std::getenv("OUNCE_WRITE_GOLDEN")) {
    Checkpointer({.levels = {{.path = target}}})
        .save_and_wait(7, {{"", &expected}},
                       {.notes = {{"config", "[model]\ndim = 5\n"}}, .metrics = {{"loss", 1.25}}});
  }
  const char* other = std::getenv("OUNCE_WRITE_GOLDEN");
  const auto root =
      other ? std::string(other) : std::string(OUNCE_SOURCE "/tests/ckpt/golden/format1");
  auto loaded = golden_state();
  for (auto& tensor : loaded.tensors) tensor.value = at::empty_like(tensor.value).zero_();
  for (auto& [name, value] : loaded.integers) value = 0;
  for (auto& [name, value] : loaded.numbers) value = 1;
  for (auto& [name, value] : loaded.texts) value = "";
  const auto info = load_checkpoint(root, std::nullopt, {{"", &loaded}}).info;
  EXPECT_TRUE(same_state(loaded, expected));
  EXPECT_EQ(info.step, 7);
  EXPECT_EQ(info.notes.at("config"), "[model]\ndim = 5\n");
  EXPECT_EQ(info.metrics.at("loss"), 1.25);
  EXPECT_TRUE(verify_step(posix_file_system(), info.path, true).problems.empty());
}

}  // namespace
}  // namespace ounce::ckpt
