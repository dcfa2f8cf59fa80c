// SPDX-License-Identifier: MIT
// The fused path's filter against its definition.
#include "kernels/cce_fused_case.h"

namespace ounce {

namespace {

using at::Tensor;
using namespace cce_test;
using test::rms_error;

class CceFusedFilter : public OnFused {};
OUNCE_ON_GPU(CceFusedFilter);

// Each group of 128 tokens finds some tiles of the vocabulary likely, and the others e^-6 as much.
// One target in fifty is anywhere.
CceCase patterned_case(const CceCase& random) {
  constexpr int64_t kTile = 128, kGroups = 8;
  auto c = random;
  const auto rows = c.hidden.size(0), vocab = c.weight.size(0);
  const auto options = torch::device(c.hidden.device()).dtype(at::kLong);
  const auto group = torch::arange(rows, options).div(kTile, "floor").remainder(kGroups);
  const auto tile = torch::arange(vocab, options).div(kTile, "floor");
  auto likely = torch::rand({kGroups, tile.max().item<int64_t>() + 1}, c.hidden.device()) < 0.3;
  likely.select(1, 0).fill_(true);
  const auto offset = likely.logical_not().to(at::kBFloat16) * -6;
  c.hidden = c.hidden.detach().clone();
  c.weight = c.weight.detach().clone();
  c.hidden.narrow(1, 0, kGroups) = torch::one_hot(group, kGroups).to(at::kBFloat16);
  c.weight.narrow(1, 0, kGroups) = offset.index_select(1, tile).t();
  const auto probable = likely.index_select(0, group).index_select(1, tile).to(at::kFloat);
  const auto near = torch::multinomial(probable, 1).squeeze(1);
  const auto far = torch::rand({rows}, c.hidden.device()) < 0.02;
  c.target = torch::where(c.target == -100, c.target, torch::where(far, c.target, near));
  return c.as(c.hidden.scalar_type());
}

TEST_P(CceFusedFilter, DropsTheTilesOfItsDefinition) {
  struct Setting {
    int64_t tokens, dim, vocab;
    GradMode mode = GradMode::kFilter;
    double softcap = 0;
    int64_t workspace = -1;
  };
  const auto rows_256 = [](int64_t vocab) { return 256 * 2 * (vocab + 63); };
  for (const auto& s :
       {Setting{1, 16, 5}, Setting{130, 64, 1000}, Setting{300, 72, 5003},
        Setting{1000, 200, 20011}, Setting{1000, 200, 20011, GradMode::kFilter, 0, rows_256(20011)},
        Setting{700, 400, 5003, GradMode::kFilterHidden, 0, rows_256(5003)},
        Setting{300, 264, 5003, GradMode::kFilter, 12}}) {
    SCOPED_TRACE(c10::str(s.tokens, " ", s.dim, " ", s.vocab, " ", s.softcap));
    auto c = patterned_case(random_case({s.tokens}, s.dim, s.vocab));
    c.options.grad_mode(s.mode).filter_eps(1e-3).softcap(s.softcap).workspace_bytes(s.workspace);
    auto exact = c.as(at::kDouble);
    exact.options.implementation("reference");
    const auto out = c.run(), ref = exact.run();
    EXPECT_LE(rms_error(out.loss, ref.loss), 1e-5);
    EXPECT_LE(relative_to(out.dropped_mass, ref.dropped_mass), 4e-3);
    if (s.vocab > 1000) {
      EXPECT_GT(ref.dropped_mass.max().item<double>(), 1e-3);
    }
    out.loss.backward();
    ref.loss.backward();
    const auto hidden = exact.hidden.grad(), weight = exact.weight.grad();
    EXPECT_LE(relative_to(c.hidden.grad(), hidden), kPeaked * one_rounding(hidden) + 1e-6);
    EXPECT_LE(relative_to(c.weight.grad(), weight), 2.4 * one_rounding(weight) + 1e-6);
    const auto starved = [](const Tensor& gradient) { return gradient.eq(0).all(1); };
    EXPECT_TRUE(at::equal(starved(c.weight.grad()), starved(weight)));
    auto again = c.as(at::kBFloat16);
    again.run().loss.backward();
    EXPECT_TRUE(at::equal(again.hidden.grad(), c.hidden.grad()));
    EXPECT_TRUE(at::equal(again.weight.grad(), c.weight.grad()));
  }
}

// Of 64 MiB each; and without gradients.
TEST_P(CceFusedFilter, ReadsAWeightOf32BitsInSlabs) {
  auto c = patterned_case(random_case({400}, 512, 150001));
  c.weight = c.weight.detach().to(at::kFloat).requires_grad_();
  c.options.grad_mode(GradMode::kFilter).filter_eps(1e-4);
  auto exact = c.as(at::kDouble);
  exact.options.implementation("reference");
  const auto out = c.run(), ref = exact.run();
  EXPECT_LE(rms_error(out.loss, ref.loss), 1e-3);
  out.loss.backward();
  ref.loss.backward();
  EXPECT_LE(rms_error(c.weight.grad(), exact.weight.grad()), 6e-3);
  EXPECT_LE(rms_error(c.hidden.grad(), exact.hidden.grad()), 6e-3);
  const at::NoGradGuard guard;
  const auto alone = c.run();
  EXPECT_TRUE(at::equal(alone.loss, out.loss));
  EXPECT_TRUE(at::equal(alone.dropped_mass, out.dropped_mass));
}

}  // namespace

}  // namespace ounce
