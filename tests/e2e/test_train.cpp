// SPDX-License-Identifier: MIT
// The real program: trains, evaluates, samples, and resumes bit for bit.
#include "e2e/train_fixture.h"

namespace ounce::test {
namespace {

TEST_F(Train, ResumeIsBitIdenticalToNeverHavingStopped) {
  struct Case {
    const char *name, *compute, *threads, *more;
    int half;
  };
  // Wide enough in the last one that ATen splits its loops over both threads; they do not spin
  // while they wait, which would take other tests' cores.
  const ScopedVariable waiting("OMP_WAIT_POLICY", "passive");
  const Case cases[] = {
      {"fp32", "fp32", "1", "", 20},
      {"bf16", "bf16", "1", "", 20},
      {"threads", "fp32", "2", "--set model.dim=128 --set data.sequence=128 --set data.batch=8 ",
       4},
      {"dct_adamw", "fp32", "1",
       "--set optimizer.name=dct_adamw --set optimizer.rank=8 --set optimizer.residual=ef "
       "--set optimizer.update_interval=3 ",
       10},
      {"galore", "fp32", "1",
       "--set optimizer.name=galore --set optimizer.rank=8 --set optimizer.update_interval=4 ", 10},
      {"trion", "fp32", "1", "--set optimizer.name=trion --set optimizer.rank=8 ", 10},
      {"muon", "fp32", "1", "--set optimizer.name=muon ", 10},
      {"adamw16", "bf16", "1", "--set precision.params=bf16 --set optimizer.state_dtype=bf16 ", 10},
      {"int8", "fp32", "1",
       "--set optimizer.name=dct_adamw --set optimizer.rank=8 --set optimizer.residual=ef "
       "--set optimizer.residual_type=int8 --set optimizer.statistics=true ",
       10},
      {"accumulated", "fp32", "1",
       "--set optimizer.name=dct_adamw --set optimizer.rank=8 --set learner.layerwise=true "
       "--set learner.clip=0 --set data.accumulate=2 ",
       10},
      {"layerwise", "fp32", "1",
       "--set learner.layerwise=true --set learner.clip=0 --set data.accumulate=1 ", 10},
  };
  for (const auto& [name, compute, threads, more, half] : cases) {
    const ScopedVariable openmp("OMP_NUM_THREADS", threads);
    const auto set = std::string("--set precision.compute=") + compute + " " + more + "--out ";
    const auto a = std::string("A-") + name, b = std::string("B-") + name;
    const auto first = " --steps " + std::to_string(half),
               all = " --steps " + std::to_string(2 * half);
    const auto whole = train(set + a + all);
    ASSERT_EQ(whole.exit_code, 0) << whole.err;
    EXPECT_NE(whole.out.find(std::string(", ") + threads + " threads"), std::string::npos);
    ASSERT_EQ(train(set + b + first).exit_code, 0);
    const auto resumed = train(set + b + all + " --resume auto");
    ASSERT_EQ(resumed.exit_code, 0) << resumed.err;
    EXPECT_NE(resumed.out.find("at step " + std::to_string(half) + "\n"), std::string::npos);
    const auto diff = run("ckpt diff " + a + " " + b);
    EXPECT_EQ(diff.exit_code, 0) << name << "\n" << diff.out << diff.err;
  }
  // The comparison can fail: another seed gives other weights.
  ASSERT_EQ(train("--steps 40 --seed 2 --out C").exit_code, 0);
  EXPECT_EQ(run("ckpt diff A-fp32 C").exit_code, 1);
}

// The same weights, bit for bit, without the gradients' share of the peak.
TEST_F(Train, LayerwiseStepsHaveNoGradientsInMemory) {
  const std::string set =
      "--steps 4 --set learner.clip=0 --set data.accumulate=1 --set data.batch=1 "
      "--set data.sequence=16 --set model.dim=256 --out ";
  ASSERT_EQ(train(set + "all").exit_code, 0);
  ASSERT_EQ(train(set + "layerwise --set learner.layerwise=true").exit_code, 0);
  const auto diff = run("ckpt diff all layerwise");
  EXPECT_EQ(diff.exit_code, 0) << diff.out << diff.err;
  const auto peak = [&](const char* out) {
    return rows(out, "train").back().at("mem").get<double>();
  };
  const double weights = peak("all") / 4;  // they, gradients and two moments, and little else
  EXPECT_LT(peak("layerwise"), peak("all") - 0.7 * weights);
}

TEST_F(Train, LearnsAndWritesTheRunFolder) {
  const auto result = train("--out R");
  ASSERT_EQ(result.exit_code, 0) << result.err;
  for (const char* name : {"config.toml", "metrics.jsonl", "samples.txt", "ckpt"}) {
    EXPECT_TRUE(fs::exists(dir / ("R/" + std::string(name)))) << name;
  }
  for (const char* kind : {"config", "train", "eval", "sample", "ckpt"}) {
    EXPECT_FALSE(rows("R", kind).empty()) << kind;
  }
  const auto steps = rows("R", "train");
  for (const auto& row : steps) {
    for (const char* field : {"step", "loss", "lr", "mem"}) EXPECT_TRUE(row.contains(field)) << row;
  }
  const double first = steps.front().at("loss"), last = steps.back().at("loss");
  EXPECT_GT(first, 5.0);
  EXPECT_LT(last, first - 1.5) << "the loss did not fall";
  EXPECT_NE(result.out.find("resume: ./ounce train --resume auto --out R"), std::string::npos);
  EXPECT_LT(json_of("eval --run R --device cpu").at("val_loss"), first - 1.5);
  const auto sample = run("sample --run R --device cpu --prompt 'red ' --tokens 16");
  ASSERT_EQ(sample.exit_code, 0) << sample.err;
  EXPECT_TRUE(sample.out.starts_with("red ")) << sample.out;
  ASSERT_EQ(run("report --run R").exit_code, 0);
  EXPECT_NE(dir.read_file("R/report.html").find("<polyline"), std::string::npos);
}

TEST_F(Train, BatchesInPartsGiveTheSameLoss) {
  const auto loss = [&](const std::string& arguments, const std::string& out) {
    EXPECT_EQ(train(arguments + " --set model.dropout=0.0 --steps 5 --out " + out).exit_code, 0);
    return json_of("eval --device cpu --run " + out).at("val_loss").get<double>();
  };
  EXPECT_NEAR(loss("--set data.accumulate=1", "W"), loss("--set data.accumulate=4", "P"), 1e-4);
}

TEST_F(Train, DryRunWritesNothing) {
  const auto result = train("--dry-run --out D");
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_NE(result.out.find("activations"), std::string::npos) << result.out;
  EXPECT_FALSE(fs::exists(dir.path() + "/D"));
}

TEST_F(Train, InitFromTakesTheWeightsAlone) {
  ASSERT_EQ(train("--steps 20 --out S").exit_code, 0);
  const auto result = train("--init-from S --steps 0 --out T");
  ASSERT_EQ(result.exit_code, 0) << result.err;
  EXPECT_EQ(json_of("eval --run S --device cpu"), json_of("eval --run T --device cpu"));
}

TEST_F(Train, DamagedNewestStepFallsBackLoudly) {
  ASSERT_EQ(train("--steps 30 --out R").exit_code, 0);
  std::vector<fs::path> steps;
  for (const auto& entry : fs::directory_iterator(dir.path() + "/R/ckpt")) {
    if (entry.path().filename().string().starts_with("step_")) steps.push_back(entry.path());
  }
  std::sort(steps.begin(), steps.end());
  ASSERT_GE(steps.size(), 2u);
  for (const auto& entry : fs::directory_iterator(steps.back())) {
    if (entry.path().extension() == ".h5")
      fs::resize_file(entry.path(), fs::file_size(entry.path()) / 2);
  }
  const auto result = train("--resume auto --steps 31 --out R");
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_NE(result.out.find("WARNING"), std::string::npos) << result.out;
  EXPECT_NE(result.out.find("at step 20"), std::string::npos) << result.out;
}

TEST(Configs, TinyOnesTrainThreeSteps) {
  TempDir dir;
  int count = 0;
  for (const auto& entry : fs::directory_iterator(OUNCE_SOURCE "/examples/configs")) {
    const auto name = entry.path().stem().string();
    if (!name.ends_with("_tiny")) continue;
    const auto result =
        run_program(dir.path(), "train --device cpu --steps 3 --config '" + entry.path().string() +
                                    "' --set run.final_eval_batches=2 --set run.sample_tokens=10");
    EXPECT_EQ(result.exit_code, 0) << name << "\n" << result.err;
    EXPECT_TRUE(fs::exists(dir.path() + "/runs/" + name + "-1/ckpt")) << name;
    ++count;
  }
  EXPECT_GE(count, 3);
}

}  // namespace
}  // namespace ounce::test
