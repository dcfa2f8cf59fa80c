// SPDX-License-Identifier: MIT
// `ounce modules` and `ounce ckpt`, with and without --json.
#include <ounce/ckpt/lock.h>
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
  for (const std::string command :
       {"export none --out x", "gc none", "pin none", "unpin none --step 1", "resume-cmd none"}) {
    expect_refusal("ckpt " + command, 3, "no checkpoint in 'none'");
  }
  expect_refusal("ckpt import none.safetensors --out x --step 1", 3, "none.safetensors");
  expect_refusal("ckpt show R --note none", 3, "no note 'none'");
  expect_refusal("ckpt diff R", 2, "path");
}

TEST_F(Ckpt, ExportsAndImports) {
  const auto exported = json_of("ckpt export R --out X --step 10");
  EXPECT_EQ(exported.at("step"), 10);
  EXPECT_EQ(exported.at("path"), "R/ckpt/step_0000000010");
  EXPECT_EQ(exported.at("files"), Json({"X/model.safetensors"}));
  expect_refusal("ckpt export R --out X", 2, "X/model.safetensors' is there already");
  const auto imported = json_of("ckpt import X/model.safetensors --out I --step 10");
  EXPECT_EQ(imported.at("tensors"), exported.at("tensors"));
  EXPECT_EQ(imported.at("prefix"), "model/");
  expect_refusal("ckpt import X/model.safetensors --out I --step 10", 2, "step 10 is in 'I'");
  // Every tensor of the model is in both, and the same; the rest is the first's alone.
  const auto result = Json::parse(run("ckpt diff --json R/ckpt/step_0000000010 I").out);
  size_t alone = 0, all = 0;
  for (const auto& item : result.at("differences")) {
    EXPECT_EQ(item.at("what"), "only in the first") << item;
    alone += item.at("name").get<std::string>().starts_with("model/") ? 1 : 0;
    ++all;
  }
  EXPECT_EQ(alone, 0u);
  EXPECT_GT(all, 10u);
  expect_text("export R --out X --force --dtype bf16 --shard-gb 1e-5", 0,
              {"step 20  R/ckpt/step_0000000020: ", "wrote X/model-00001-of-00010.safetensors",
               "wrote X/model.safetensors.index.json"});
  expect_text("import X/model.safetensors.index.json --out I --step 20", 0,
              {"step 20  I/step_0000000020: ", "under 'model/'"});
  expect_text("show I --tensors", 0, {"tensor model/embed.weight  bfloat16[256, 32]"});
  expect_text("export R --out all.safetensors --all", 0, {"wrote ./all.safetensors"});
  expect_text("import all.safetensors --out A --step 20", 0, {"under ''"});
  expect_text("import R/ckpt/step_0000000020/rank00000.h5 --out A --step 21", 0, {"under ''"});
  EXPECT_EQ(Json::parse(run("ckpt diff --json A/step_0000000020 A/step_0000000021").out)
                .at("differences")
                .size(),
            1u)
      << "the step alone";
  // Both start a model.
  EXPECT_EQ(train("--steps 1 --quiet --out B --init-from all.safetensors").exit_code, 2);
  EXPECT_EQ(train("--steps 1 --quiet --out B --init-from A").exit_code, 0);
}

TEST_F(Ckpt, RefusesToExportOrImportOnOneLine) {
  expect_refusal("ckpt export R", 2, "--out");
  expect_refusal("ckpt export R --out X --dtype int8", 2, "int8");
  expect_refusal("ckpt export R --out X --shard-gb 0", 2, "--shard-gb");
  expect_refusal("ckpt export R --out X --shard-gb nan", 2, "--shard-gb");
  expect_refusal("ckpt export R --out X --step 11", 3, "no step 11 in 'R/ckpt'; there: 20, 10");
  expect_refusal("ckpt export R --out x.safetensors --shard-gb 1e-5", 2, "shards need a folder");
  expect_refusal("ckpt export R --out hybrid.toml", 2, "to be a folder, got a file");
  expect_refusal("ckpt import text.txt --out I --step 1", 2, "text.txt");
  expect_refusal("ckpt import hybrid.toml --out I", 2, "--step");
  dir.write_file("x.h5", "not HDF5");
  dir.write_file("x.safetensors", "not that either");
  dir.write_file("x.json", "{}");
  for (const std::string file : {"x.h5", "x.safetensors", "x.json"}) {
    expect_refusal("ckpt import " + file + " --out I --step 1", 4, file);
  }
  expect_refusal("ckpt import x.h5 --out R --step 1", 2, "a step or a run");
  EXPECT_FALSE(fs::exists(dir / "X"));
  EXPECT_FALSE(fs::exists(dir / "I"));
}

TEST_F(Ckpt, CollectsGarbageButNothingThatIsKept) {
  ASSERT_EQ(run("train --resume auto --out R --device cpu --steps 40 --quiet "
                "--config hybrid.toml --set checkpoint.keep_last=0")
                .exit_code,
            0);
  dir.write_file("R/ckpt/.tmp-step_0000000050-ab/rank00000.h5", std::string(1000, 'x'));
  {
    const ckpt::RootLock writer(dir / "R/ckpt");
    expect_refusal("ckpt gc R --keep-last 1", 1, "is being written by process");
  }
  expect_refusal("ckpt gc R --keep-every 20", 2, "--keep-last");
  expect_refusal("ckpt gc R --keep-last 0", 2, "--keep-last");
  expect_refusal("ckpt gc . --keep-last 1", 3, "no checkpoint in '.'");
  expect_refusal("ckpt pin R", 2, "expected a step folder, got 'R'");
  expect_text("pin R --step 10", 0, {"pinned R/ckpt/step_0000000010"});
  expect_text("ls R", 0, {"R/ckpt/step_0000000010  pinned"});
  EXPECT_TRUE(json_of("ckpt ls R").at("steps").at(3).at("pinned").get<bool>());
  expect_text(
      "gc R --keep-last 1 --dry-run", 0,
      {"would remove R/ckpt/.tmp-step_0000000050-ab  1000 B", "would remove R/ckpt/step_0000000030",
       "would remove R/ckpt/step_0000000020", "R/ckpt: 2 steps kept, 2 would be removed"});
  EXPECT_EQ(json_of("ckpt ls R").at("steps").size(), 4u);
  // The newest is cut short: the newest good one is another.
  fs::resize_file(dir / "R/ckpt/step_0000000040/rank00000.h5", 100);
  const auto collected = json_of("ckpt gc R --keep-last 1").at("roots").at(0);
  EXPECT_EQ(collected.at("kept"), Json({30, 10}));
  EXPECT_EQ(collected.at("removed").at(0).at("path"), "R/ckpt/step_0000000020");
  EXPECT_GT(collected.at("removed").at(0).at("bytes"), 100000);
  EXPECT_EQ(collected.at("leftovers").size(), 1u);
  EXPECT_EQ(collected.at("left_alone").size(), 1u);
  EXPECT_FALSE(fs::exists(dir / "R/ckpt/.tmp-step_0000000050-ab"));
  EXPECT_TRUE(fs::exists(dir / "R/ckpt/step_0000000040"));
  EXPECT_EQ(json_of("ckpt unpin R/ckpt/step_0000000010").at("steps").size(), 1u);
  expect_text("unpin R/ckpt/step_0000000010", 0, {"unpinned"});
  expect_text("gc R", 0, {"R/ckpt: 2 steps kept, 0 removed"});
  expect_text("gc R --keep-last 1 --keep-best val_loss", 0, {"left alone: "});
  dir.write_file("R/ckpt/step_0000000040/manifest.json", "{}");
  expect_text("gc R --keep-last 1", 0, {"left alone: ", "does not begin like one"});
}

TEST_F(Ckpt, TellsTheLineThatGoesOn) {
  const auto line_of = [&](const std::string& path) {
    const auto line = json_of("ckpt resume-cmd " + path).at("command").get<std::string>();
    EXPECT_EQ(run("ckpt resume-cmd " + path).out, line + "\n");
    return line;
  };
  const auto follow = [&](std::string line) {
    const std::string program = "./ounce ";
    EXPECT_TRUE(line.starts_with(program)) << line;
    const auto next = line.find(program, 1);
    if (next != std::string::npos) line.replace(next, program.size() - 1, OUNCE_PROGRAM);
    const auto result = run(line.substr(program.size()) + " --quiet");
    EXPECT_EQ(result.exit_code, 0) << line << "\n" << result.err;
  };
  const auto whole = line_of("R");
  EXPECT_EQ(whole, "./ounce train --resume auto --out R --steps 40 --device cpu");
  EXPECT_EQ(line_of("R/ckpt/"), whole);
  const auto step = line_of("R/ckpt/step_0000000010");
  EXPECT_EQ(step,
            "./ounce train --resume R/ckpt/step_0000000010 --out R-from-10 --steps 20 "
            "--device cpu");
  follow(step);
  EXPECT_TRUE(run("ckpt diff R R-from-10").out.find("no difference") != std::string::npos);
  // Away from its run, a step brings the config along.
  fs::copy(dir / "R/ckpt", dir / "my copies", fs::copy_options::recursive);
  const auto copy = line_of("'my copies'");
  EXPECT_EQ(copy,
            "./ounce ckpt show 'my copies/step_0000000020' --note config > from-20.toml && "
            "./ounce train --config from-20.toml --resume 'my copies' --out runs/from-20 "
            "--steps 40 --device cpu");
  follow(copy);
  follow(whole);
  EXPECT_TRUE(run("ckpt diff R runs/from-20").out.find("no difference") != std::string::npos);
}

}  // namespace
}  // namespace ounce::test
