// SPDX-License-Identifier: MIT
// `ounce modules` and `ounce ckpt`, with and without --json.
#include <ounce/core/registry.h>
#include <ounce/ounce.h>

#include <set>

#include "e2e/train_fixture.h"

namespace ounce::test {
namespace {

TEST(Modules, ListsEveryEntryWithDocumentationAndDefaults) {
  register_builtins();
  TempDir dir;
  std::set<std::string> kinds;
  auto json = Json::array();
  std::string all, mixers;
  for (const auto* store : registry_stores()) {
    for (const auto& name : store->names()) {
      const auto& info = store->info(name);
      EXPECT_FALSE(info.doc.empty()) << name;
      EXPECT_EQ(info.doc.find('\n'), std::string::npos) << name;
      std::string text = store->kind() + " " + name + ": " + info.doc + "\n";
      std::istringstream lines(info.defaults);
      for (std::string line; std::getline(lines, line);) text += "    " + line + "\n";
      kinds.insert(store->kind());
      all += text;
      if (store->kind() == "mixer") mixers += text;
      json.push_back({{"kind", store->kind()},
                      {"name", name},
                      {"doc", info.doc},
                      {"defaults", info.defaults}});
    }
  }
  EXPECT_EQ(kinds.size(), 10u) << "the kinds of parts";
  EXPECT_EQ(run_program(dir.path(), "modules").out, all);
  EXPECT_EQ(Json::parse(run_program(dir.path(), "modules --json").out), json);
  EXPECT_EQ(run_program(dir.path(), "modules mixer").out, mixers);
  const auto one = run_program(dir.path(), "modules attention").out;
  EXPECT_TRUE(one.starts_with("mixer attention: ")) << one;
  EXPECT_NE(one.find("rope_base = "), std::string::npos) << one;
}

class Ckpt : public Train {
 protected:
  void SetUp() override {
    Train::SetUp();
    ASSERT_EQ(train("--steps 20 --quiet --out R").exit_code, 0);
  }
  void expect_text(const std::string& arguments, int exit_code,
                   const std::vector<std::string>& parts) {
    const auto result = run("ckpt " + arguments);
    EXPECT_EQ(result.exit_code, exit_code) << arguments << "\n" << result.out << result.err;
    for (const auto& part : parts) {
      EXPECT_NE(result.out.find(part), std::string::npos) << arguments << "\n" << result.out;
    }
  }
};

TEST_F(Ckpt, ListsSteps) {
  expect_text("ls R", 0, {"step 20 ", "step 10 ", "R/ckpt/step_0000000010", "val_loss "});
  const auto steps = json_of("ckpt ls R").at("steps");
  ASSERT_EQ(steps.size(), 2u);
  EXPECT_EQ(steps[0].at("step"), 20);
  EXPECT_EQ(steps[1].at("step"), 10);
  EXPECT_GT(steps[0].at("metrics").at("val_loss"), 0);
  EXPECT_EQ(steps[0].at("path"), "R/ckpt/step_0000000020");
}

TEST_F(Ckpt, ShowsAStep) {
  expect_text("show R", 0, {"step 20 ", " tensors, ", "scalar state/train/step = 20", "[model]"});
  expect_text("show R/ckpt/step_0000000010 --tensors", 0,
              {"step 10 ", "tensor model/embed.weight  float32[256, 32]  step"});
  const auto shown = json_of("ckpt show R --tensors");
  EXPECT_EQ(shown.at("step"), 20);
  EXPECT_EQ(shown.at("scalars").at("state/train/step"), 20);
  EXPECT_EQ(shown.at("tensor_count"), shown.at("tensors").size());
  EXPECT_NE(shown.at("notes").at("config").get<std::string>().find("[model]"), std::string::npos);
}

TEST_F(Ckpt, VerifiesEveryStep) {
  expect_text("verify R", 0, {"good  R/ckpt/step_0000000020", "good  R/ckpt/step_0000000010"});
  expect_text("verify R --h5", 0, {"good  R/ckpt/step_0000000020"});
  EXPECT_TRUE(json_of("ckpt verify R").at("good").get<bool>());
  // One bit of one tensor.
  const auto record = json_of("ckpt show R --tensors").at("tensors").at(0);
  {
    std::fstream file(dir / "R/ckpt/step_0000000020/rank00000.h5",
                      std::ios::binary | std::ios::in | std::ios::out);
    const auto offset = record.at("offset").get<int64_t>();
    const char byte = static_cast<char>(file.seekg(offset).get() ^ 1);
    file.seekp(offset).put(byte);
  }
  expect_text("verify R", 1, {"BAD   R/ckpt/step_0000000020", record.at("name"), "good  "});
  const auto result = run("ckpt verify R --json");
  EXPECT_EQ(result.exit_code, 1);
  const auto report = Json::parse(result.out);
  EXPECT_FALSE(report.at("good").get<bool>());
  EXPECT_EQ(report.at("steps").at(0).at("problems").size(), 1u) << result.out;
  EXPECT_TRUE(report.at("steps").at(1).at("problems").empty()) << result.out;
}

TEST_F(Ckpt, ComparesSteps) {
  const std::string steps = "R/ckpt/step_0000000010 R/ckpt/step_0000000020";
  expect_text("diff R R", 0, {"no difference"});
  EXPECT_TRUE(json_of("ckpt diff R R").at("differences").empty());
  expect_text("diff " + steps, 1, {" differ\n", "step: 10 and 20", "model/embed.weight: "});
  const auto result = run("ckpt diff --json " + steps);
  EXPECT_EQ(result.exit_code, 1);
  const auto differences = Json::parse(result.out).at("differences");
  const auto embed = std::find_if(differences.begin(), differences.end(), [](const Json& item) {
    return item.at("name") == "model/embed.weight";
  });
  ASSERT_NE(embed, differences.end());
  EXPECT_GT(embed->at("max_abs"), 0);
}

TEST_F(Ckpt, SaysWhereNothingIs) {
  for (const std::string command : {"ls none", "show none", "verify none", "diff R none"}) {
    expect_refusal("ckpt " + command, 3, "no checkpoint in 'none'");
  }
  expect_refusal("ckpt diff R", 2, "path");
}

}  // namespace
}  // namespace ounce::test
