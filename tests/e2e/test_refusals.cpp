// SPDX-License-Identifier: MIT
// Bad input: the real program says in one line what is wrong, with the exit code of its kind, and
// leaves what is there alone.
#include <unistd.h>

#include <map>

#include "e2e/train_fixture.h"

namespace ounce::test {
namespace {

class Refusals : public Train {
 protected:
  const std::string base = "train --device cpu --config hybrid.toml ";

  // Every file below `folder` with its content.
  std::map<std::string, std::string> contents(const std::string& folder) const {
    std::map<std::string, std::string> found;
    for (const auto& entry : fs::recursive_directory_iterator(dir / folder)) {
      if (entry.is_regular_file()) found[entry.path().string()] = read_text(entry.path().string());
    }
    return found;
  }
};

TEST_F(Refusals, FlagsNamesAndValues) {
  expect_refusal("trian", 2, "did you mean 'train'");
  expect_refusal("train --sed 3", 2, "--sed");
  expect_refusal("train --config hybrid.toml --device cuda:77", 2, "cuda:77");
  expect_refusal("modules nothing_like_this_at_all", 2, "no kind or name");
  const std::pair<std::string, std::string> wrong[] = {
      {"--steps many", "--steps"},
      {"--set model.dimm=3", "did you mean 'dim'"},
      {"--set model.mixer=atention", "did you mean 'attention'"},
      {"--set optimizer.name=adam", "did you mean 'adamw'"},
      {"--set model.dim", "key=value"},
      {"--set model.dim=wide", "'dim' in model (model 'lm'): expected an integer, got \"wide\""},
      {"--set model.dim=3.5", "expected an integer, got 3.5"},
      {"--set model.dim=-4", "at least 1, got -4"},
      {"--set model.dropout=1.5", "expected a number in [0, 0.99], got 1.5"},
      {"--set data.sequence=100000", "sequence"},
      {"--set optimizer.schedule.warmup=100", "longer than the run of 40 steps"},
      {"--set precision.params=bf16 --set optimizer.amsgrad=true", "neither amsgrad nor maximize"},
      {"--plugin none.so", "none.so"},
  };
  for (const auto& [arguments, text] : wrong) expect_refusal(base + arguments, 2, text);
}

TEST_F(Refusals, DataThatCannotBeUsed) {
  expect_refusal("train --device cpu --config none.toml", 4, "none.toml");
  dir.write_file("empty.txt", "");
  dir.write_file("binary.txt", "a\xff\xfe");
  dir.write_file("folder/inside.txt", "text");
  dir.write_file("locked.txt", "text");
  fs::permissions(dir / "locked.txt", fs::perms::none);
  const std::pair<std::string, std::string> wrong[] = {
      {"none.txt", "no file matches 'none.txt'"},
      {"empty.txt", "'empty.txt' is empty"},
      {"binary.txt", "'binary.txt' is not UTF-8 at byte 1"},
      {"folder", "'folder' is not a regular file"},
      {"locked.txt", "cannot read 'locked.txt'"},
  };
  for (const auto& [file, text] : wrong) {
    if (file == "locked.txt" && geteuid() == 0) continue;  // root reads everything
    expect_refusal(base + "--out F --set data.files=" + file, 4, text);
    EXPECT_FALSE(fs::exists(dir / "F")) << "the corrected command must not meet a run";
  }
  dir.write_file("short.txt", "too short");
  expect_refusal(base + "--set data.files=short.txt", 2, "give more data");
}

TEST_F(Refusals, TokensThatDoNotFitTheVocabulary) {
  const auto write_shard = [&](const std::string& name, int32_t count, uint16_t last) {
    std::vector<int32_t> header(256);
    header[0] = 20240520;
    header[1] = 1;
    header[2] = count;
    std::vector<uint16_t> tokens(2000, 7);
    tokens.back() = last;
    dir.write_file(name,
                   std::string(reinterpret_cast<char*>(header.data()), 1024) +
                       std::string(reinterpret_cast<char*>(tokens.data()), 2 * tokens.size()));
  };
  write_shard("good.bin", 2000, 49);
  write_shard("large_id.bin", 2000, 60);
  write_shard("truncated.bin", 3000, 49);
  dir.write_file("words.json", R"({"a": 0, "b": 70})");
  const auto tokens = [&](const std::string& file, const std::string& more = "") {
    return base + "--set 'data={name=\"tokens\",files=\"" + file +
           "\",vocab_size=50,eos=-1,sequence=32,batch=4" + more + "}' ";
  };
  expect_refusal(tokens("large_id.bin"), 4, "the id 60 at token 1999");
  expect_refusal(tokens("truncated.bin"), 4, "'truncated.bin' is damaged");
  expect_refusal(tokens("good.bin", ",vocabulary=\"words.json\""), 4, "an id below 50 for 'b'");
  // Weights of a byte model do not fit a vocabulary of 50.
  ASSERT_EQ(train("--steps 1 --quiet --out R").exit_code, 0);
  expect_refusal(tokens("good.bin") + "--init-from R", 2,
                 "embed.weight (expected float32[50, 32], got float32[256, 32])");
  ASSERT_EQ(run(tokens("good.bin") + "--steps 1 --quiet --out T").exit_code, 0);
  expect_refusal("sample --run T --device cpu --prompt '1 2 99'", 2, "ids below 50");
}

TEST_F(Refusals, ARunOfOtherSettingsOrData) {
  ASSERT_EQ(train("--steps 2 --out R").exit_code, 0);
  const auto before = contents("R");
  expect_refusal(base + "--out R", 2, "--resume auto");
  expect_refusal(base + "--resume auto --out R --set model.dim=16", 2, "model.dim: 32 -> 16");
  expect_refusal(base + "--resume auto --out R --set data.sequence=16", 2,
                 "data.sequence: 32 -> 16");
  dir.write_file("text.txt", small_text(1999));
  expect_refusal(base + "--resume auto --out R --steps 4", 2, "the data of identity");
  EXPECT_EQ(contents("R"), before);
}

TEST_F(Refusals, ACheckpointOfAnotherModel) {
  ASSERT_EQ(train("--steps 2 --out R").exit_code, 0);
  const auto before = contents("R");
  const std::vector<std::string> parts = {
      "blocks.0.mixer.q_proj.weight (expected float32[8, 16], got float32[16, 32])",
      "embed.weight (expected float32[256, 16], got float32[256, 32])", "nothing was loaded"};
  for (const std::string from : {"--resume R/ckpt", "--init-from R"}) {
    const auto result = run(base + from + " --set model.dim=16 --out S" + from.substr(2, 4));
    expect_one_line(from, result, 2, parts);
  }
  const auto other = run(base +
                         "--init-from R --out U --set model.layers=1 "
                         "--set 'model.mixer={name=\"gla\",heads=2}'");
  expect_one_line("fewer layers", other, 2, {"unexpected: ", "blocks.1.mixer.k_proj.weight"});
  const auto mixer = run(base + "--init-from R --set model.mixer=attention --out V");
  expect_one_line("another mixer", mixer, 2, {"gk_proj.0.weight"});
  EXPECT_EQ(contents("R"), before);
}

TEST_F(Refusals, NothingValidToResumeFrom) {
  expect_refusal(base + "--resume auto --out N", 3, "not a run folder");
  expect_refusal(base + "--resume auto", 3, "no runs/hybrid-<n>");
  expect_refusal("sample --run none", 3, "none");
  expect_refusal(base + "--init-from none.safetensors", 3, "none.safetensors");
  EXPECT_FALSE(fs::exists(dir / "N"));
  ASSERT_EQ(train("--steps 20 --out R").exit_code, 0);
  const auto without = [&](const std::string& copy, int exit_code, const std::string& text,
                           auto damage) {
    fs::copy(dir / "R", dir / copy, fs::copy_options::recursive);
    for (const auto& entry : fs::directory_iterator(dir / (copy + "/ckpt"))) {
      if (entry.is_directory()) damage(entry.path());
    }
    const auto before = contents(copy);
    expect_refusal(base + "--resume auto --steps 30 --out " + copy, exit_code, text);
    EXPECT_EQ(contents(copy), before);
  };
  without("Empty", 3, "no checkpoint in 'Empty/ckpt'",
          [](const fs::path& step) { fs::remove_all(step); });
  without("Cut", 4, "no good checkpoint in 'Cut/ckpt'",
          [](const fs::path& step) { fs::resize_file(step / "rank00000.h5", 100); });
  without("Garbled", 4, "no good checkpoint in 'Garbled/ckpt'",
          [](const fs::path& step) { std::ofstream(step / "manifest.json") << "{}"; });
}

TEST_F(Refusals, ManyRanks) {
  const ScopedVariable world("WORLD_SIZE", "2");
  expect_refusal(base + "--out Y", 2, "WORLD_SIZE=2");
  EXPECT_FALSE(fs::exists(dir / "Y"));
}

}  // namespace
}  // namespace ounce::test
