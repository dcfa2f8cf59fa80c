// SPDX-License-Identifier: MIT
// main() of every test program. Without a GPU, tests of it are skipped and say so;
// OUNCE_REQUIRE_CUDA=1 turns a skipped test into a failure, so that a GPU's run cannot pass by
// testing nothing.
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <string_view>

namespace {

class SkipsAreFailures : public testing::EmptyTestEventListener {
 public:
  int count = 0;

 private:
  void OnTestEnd(const testing::TestInfo& info) override {
    if (!info.result()->Skipped()) return;
    ++count;
    std::fprintf(stderr, "[  FAILED  ] %s.%s was skipped although OUNCE_REQUIRE_CUDA=1\n",
                 info.test_suite_name(), info.name());
  }
};

}  // namespace

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  const char* required = std::getenv("OUNCE_REQUIRE_CUDA");
  if (required == nullptr || std::string_view(required) != "1") return RUN_ALL_TESTS();
  auto* skips = new SkipsAreFailures;
  testing::UnitTest::GetInstance()->listeners().Append(skips);  // which owns it
  const int status = RUN_ALL_TESTS();
  return status != 0 ? status : skips->count > 0;
}
