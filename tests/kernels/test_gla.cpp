// SPDX-License-Identifier: MIT
// chunk_gla, fused_recurrent_gla, gla_step_ and naive_recurrent_gla against an fp64 recurrence.
#include <ounce/core/check.h>

#include <functional>

#include "kernels/gla_oracle.h"
#include "support/devices.h"
#include "support/expect_error.h"

namespace {

using namespace ounce::test;

constexpr double kExact = 1e-12;

// Inputs are made on the CPU, so that every device sees the same numbers.
class Gla : public OnDevice {
 protected:
  void expect_close(Function f, const Call& c, double bound, const std::string& what) const {
    ounce::test::expect_close(f, c.on(device()), bound, what);
  }
  // Chunks of a GPU are twice as long.
  double fp32_bound() const { return on_gpu() ? 4e-6 : 2e-6; }
};
OUNCE_ON_EACH_DEVICE(Gla);

struct GlaOnCpu : testing::Test {
  void SetUp() override { at::manual_seed(7); }
};

TEST_P(Gla, EveryLengthEqualsTheRecurrence) {
  for (const int64_t t : {0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 300}) {
    expect_close(ounce::chunk_gla, make(2, t, 2, 6, 10, 1), kExact, "chunk t=" + std::to_string(t));
    if (t < 100) {
      expect_close(ounce::fused_recurrent_gla, make(2, t, 2, 6, 10, 1), kExact, "recurrent");
      expect_close(ounce::naive_recurrent_gla, make(2, t, 2, 6, 10, 1), kExact, "naive");
    }
  }
}

TEST_P(Gla, EveryGateStrength) {
  for (const double normalizer : {0.01, 0.1, 1.0, 16.0}) {
    auto c = make(2, 130, 2, 16, 8, normalizer);
    expect_close(ounce::chunk_gla, c, kExact, "normalizer " + std::to_string(normalizer));
    for (auto* x : {&c.q, &c.k, &c.v, &c.g, &c.h0}) *x = x->to(at::kFloat);
    // With decays near 0 the gradient of most gates is a rounding error of sums of order 1.
    expect_close(ounce::chunk_gla, c, (normalizer < 0.1 ? 10 : 1) * fp32_bound(),
                 "fp32 normalizer " + std::to_string(normalizer));
  }
  auto c = make(1, 100, 1, 8, 8, 1);
  c.g.zero_();
  expect_close(ounce::chunk_gla, c, kExact, "g = 0");
  c = make(1, 100, 1, 8, 8, 16);
  c.g.select(3, 2).fill_(-300);
  expect_close(ounce::chunk_gla, c, kExact, "one extreme channel");
  for (auto* x : {&c.q, &c.k, &c.v, &c.g, &c.h0}) *x = x->to(at::kFloat);
  expect_close(ounce::chunk_gla, c, fp32_bound(), "fp32 one extreme channel");
}

TEST_P(Gla, ResetsEqualSeparateSequences) {
  for (const double reset : {-kInf, -1e4}) {
    auto c = make(1, 150, 2, 8, 12, 1, at::kFloat, /*with_state=*/false).on(device());
    const std::vector<int64_t> starts = {0, 1, 40, 64, 77, 78, 150};
    for (size_t i = 1; i + 1 < starts.size(); ++i) c.g.select(1, starts[i]).fill_(reset);
    const auto d_o = at::randn({1, 150, 2, 12}, c.v.options());
    const auto whole = run(ounce::chunk_gla, c, d_o, {});
    expect_close(ounce::chunk_gla, c, fp32_bound(), "fp32 resets");
    for (size_t i = 0; i + 1 < starts.size(); ++i) {
      auto part = [&](const Tensor& x) { return x.slice(1, starts[i], starts[i + 1]); };
      Call p{part(c.q), part(c.k), part(c.v), part(c.g), {}, {}, {}};
      const auto alone = run(ounce::chunk_gla, p, part(d_o), {});
      EXPECT_LE(rms_error(part(whole.o), alone.o), fp32_bound() / 2);
      for (int j = 0; j < 3; ++j) {
        EXPECT_LE(rms_error(part(whole.grads[j]), alone.grads[j]), fp32_bound() / 2) << j;
      }
      const auto d_reset = part(whole.grads[3]).select(1, 0);
      EXPECT_TRUE(i == 0 || d_reset.abs().max().item<double>() == 0);
    }
  }
}

TEST_P(Gla, PackedEqualsSeparate) {
  const std::vector<std::vector<int64_t>> cases = {
      {0, 15}, {0, 0, 16}, {0, 1, 100, 300}, {0, 64, 64, 128, 128}, {0, 3, 3, 70, 133}, {0, 0}};
  for (const auto& ends : cases) {
    for (const bool reverse : {false, true}) {
      const int64_t n = static_cast<int64_t>(ends.size()) - 1;
      auto c = make(1, ends.back(), 2, 8, 6, 1);
      c.h0 = at::randn({n, 2, 8, 6}, at::kDouble);
      c.cu = at::tensor(ends, reverse ? at::kLong : at::kInt);
      c.options.reverse = reverse;
      expect_close(ounce::chunk_gla, c, kExact, "packed");
      expect_close(ounce::fused_recurrent_gla, c, kExact, "packed recurrent");
      c.h0 = Tensor();
      expect_close(ounce::chunk_gla, c, kExact, "packed without state");
    }
  }
}

// Boundaries that are a view with gaps, and optional tensors that are there but undefined.
TEST_P(Gla, StridedBoundariesAndUndefinedTensors) {
  auto c = make(1, 50, 2, 8, 6, 1, at::kDouble, /*with_state=*/false);
  c.cu = at::tensor({0, -1, 20, -1, 20, -1, 50}, at::kLong);
  c = c.on(device());
  c.cu = c.cu.slice(0, 0, 7, 2);
  ASSERT_FALSE(c.cu.is_contiguous());
  const auto d_o = at::randn({1, 50, 2, 6}, c.v.options());
  for (const Function f :
       {ounce::chunk_gla, ounce::fused_recurrent_gla, ounce::naive_recurrent_gla}) {
    const auto strided = run(f, c, d_o, {});
    auto plain = c;
    plain.cu = c.cu.contiguous();
    EXPECT_TRUE(at::equal(strided.o, run(f, plain, d_o, {}).o));
    EXPECT_LE(rms_error(strided.o, oracle(c, d_o, {}).o), kExact);
    const auto dense = std::get<0>(f(c.q, c.k, c.v, c.g, Tensor(), Tensor(), {}));
    EXPECT_TRUE(at::equal(dense, std::get<0>(f(c.q, c.k, c.v, c.g, {}, {}, {}))));
    EXPECT_OUNCE_ERROR(f(c.q, Tensor(), c.v, c.g, {}, {}, {}), kUsage, "got an undefined one");
  }
}

TEST_P(Gla, NumericsAreCheckedWhenAsked) {
  auto c = make(1, 4, 1, 4, 4, 1, at::kFloat, /*with_state=*/false).on(device());
  const auto run_checked = [&](double value) {
    c.g.select(1, 2).fill_(value);
    ounce::chunk_gla(c.q, c.k, c.v, c.g, {}, {}, c.options);
  };
  EXPECT_NO_THROW(run_checked(0.5));
  c.options.check_numerics = true;
  EXPECT_NO_THROW(run_checked(-kInf));
  EXPECT_NO_THROW(run_checked(0));
  EXPECT_OUNCE_ERROR(run_checked(0.5), kUsage, "expected g <= 0, got 4 others, the first 0.5");
  EXPECT_OUNCE_ERROR(run_checked(kInf - kInf), kUsage, "expected g <= 0, got 4 others");
  c.options.gate = ounce::GlaGate::kLogSigmoidLogits;
  EXPECT_NO_THROW(run_checked(0.5));
  EXPECT_OUNCE_ERROR(run_checked(kInf - kInf), kUsage, "expected g without NaN, got 4 others");
}

TEST_P(Gla, OptionsThatChangeTheResult) {
  for (const bool recurrent : {false, true}) {
    const Function f = recurrent ? ounce::fused_recurrent_gla : ounce::chunk_gla;
    auto c = make(2, 70, 2, 8, 6, 1);
    c.options.scale = 0.3;
    c.options.reverse = true;
    expect_close(f, c, kExact, "reverse, scale");
    c.h0 = c.h0.transpose(-1, -2).contiguous();
    c.options.state_layout = ounce::GlaStateLayout::kVK;
    expect_close(f, c, kExact, "reverse, state [V, K]");
    c.g = at::randn_like(c.g) * 4;
    c.options.gate = ounce::GlaGate::kLogSigmoidLogits;
    c.options.gate_normalizer = 3;
    expect_close(f, c, kExact, "logits");
    c.options.clamp_min = -0.4;
    expect_close(f, c, kExact, "logits, clamped");
    c.options.gate = ounce::GlaGate::kLogDecay;
    c.g = -c.g.abs();
    expect_close(f, c, kExact, "clamped");
    c.g.select(1, 5).fill_(-kInf);
    expect_close(f, c, kExact, "clamped from -inf");
  }
}

TEST_P(Gla, HeadsAreShared) {
  struct Heads {
    int64_t q, k, v, g;
  };
  for (const auto& h :
       {Heads{4, 2, 2, 2}, {4, 1, 1, 1}, {2, 2, 4, 2}, {2, 2, 4, 4}, {8, 2, 4, 4}, {2, 1, 4, 1}}) {
    auto c = make(2, 40, 1, 8, 6, 1);
    c.q = at::randn({2, 40, h.q, 8}, at::kDouble);
    c.k = at::randn({2, 40, h.k, 8}, at::kDouble);
    c.v = at::randn({2, 40, h.v, 6}, at::kDouble);
    c.g = gates({2, 40, h.g, 8}, 1, at::kDouble);
    c.h0 = at::randn({2, h.v, 8, 6}, at::kDouble);
    expect_close(ounce::chunk_gla, c, kExact, "shared heads");
    expect_close(ounce::fused_recurrent_gla, c, kExact, "shared heads, recurrent");
  }
}

TEST_P(Gla, NonContiguousInputsAndRepeatability) {
  auto c = make(2, 90, 3, 16, 8, 1, at::kFloat).on(device());
  const auto d_o = at::randn({2, 90, 3, 8}, c.v.options()),
             d_ht = at::randn({2, 3, 16, 8}, c.v.options());
  c.options.output_final_state = true;
  const auto plain = run(ounce::chunk_gla, c, d_o, d_ht);
  const auto again = run(ounce::chunk_gla, c, d_o, d_ht);
  auto strided = [](const Tensor& x) {
    return at::stack({x.transpose(1, 2), x.transpose(1, 2)}, -1).select(-1, 0).transpose(1, 2);
  };
  auto s = c;
  for (auto* x : {&s.q, &s.k, &s.v, &s.g}) *x = strided(*x);
  s.h0 = c.h0.transpose(2, 3).contiguous().transpose(2, 3);
  ASSERT_FALSE(s.q.is_contiguous());
  const auto other = run(ounce::chunk_gla, s, strided(d_o), d_ht);
  for (const auto* r : {&again, &other}) {
    EXPECT_TRUE(at::equal(plain.o, r->o));
    EXPECT_TRUE(at::equal(plain.ht, r->ht));
    for (size_t i = 0; i < plain.grads.size(); ++i)
      EXPECT_TRUE(at::equal(plain.grads[i], r->grads[i]));
  }
}

TEST_P(Gla, PiecesAndStepsEqualTheWhole) {
  auto c = make(2, 150, 2, 16, 12, 1).on(device());
  c.options.output_final_state = true;
  const auto [o, ht] = ounce::chunk_gla(c.q, c.k, c.v, c.g, c.h0, {}, c.options);
  auto part = [&](const Tensor& x, int64_t from, int64_t to) { return x.slice(1, from, to); };
  auto state = c.h0.clone();
  std::vector<Tensor> pieces;
  for (const auto& [from, to] : std::vector<std::pair<int64_t, int64_t>>{{0, 77}, {77, 140}}) {
    auto [piece, after] =
        ounce::chunk_gla(part(c.q, from, to), part(c.k, from, to), part(c.v, from, to),
                         part(c.g, from, to), state, {}, c.options);
    pieces.push_back(piece);
    state = after;
  }
  // The rest in place, in a pool of slots, 1, 2, 3 and 4 tokens at a time.
  auto pool = at::randn({5, 2, 16, 12}, c.h0.options());
  const auto slots = at::tensor({4, 1}, at::kInt).to(device()), untouched = pool[2].clone();
  pool.index_copy_(0, slots.to(at::kLong), state);
  int64_t t = 140;
  for (int64_t n = 1; n <= 4; t += n, ++n) {
    pieces.push_back(ounce::gla_step_(part(c.q, t, t + n), part(c.k, t, t + n), part(c.v, t, t + n),
                                      part(c.g, t, t + n), pool, slots));
  }
  EXPECT_LE(rms_error(at::cat(pieces, 1), o), kExact);
  EXPECT_LE(rms_error(pool.index_select(0, slots.to(at::kLong)), ht), kExact);
  EXPECT_TRUE(at::equal(pool[2], untouched));
}

TEST_F(GlaOnCpu, NumericGradients) {
  auto c = make(1, 21, 1, 3, 2, 1);
  const auto d_o = at::randn({1, 21, 1, 2}, at::kDouble),
             d_ht = at::randn({1, 1, 3, 2}, at::kDouble);
  c.options.output_final_state = true;
  const auto got = run(ounce::chunk_gla, c, d_o, d_ht);
  auto loss = [&] {
    const auto [o, ht] = ounce::chunk_gla(c.q, c.k, c.v, c.g, c.h0, {}, c.options);
    return (weighted_sum(o, d_o) + weighted_sum(ht, d_ht)).item<double>();
  };
  size_t index = 0;
  for (const auto& x : {c.q, c.k, c.v, c.g, c.h0}) {
    auto* p = x.data_ptr<double>();
    for (int64_t i = 0; i < x.numel(); i += 5) {
      const double kept = p[i], step = 1e-5;
      p[i] = kept + step;
      const double up = loss();
      p[i] = kept - step;
      const double down = loss();
      p[i] = kept;
      EXPECT_NEAR(got.grads[index].flatten()[i].item<double>(), (up - down) / (2 * step), 1e-7);
    }
    ++index;
  }
}

TEST_P(Gla, SixteenBitInputs) {
  for (const auto dtype : {at::kBFloat16, at::kHalf}) {
    auto c = make(2, 200, 2, 32, 48, 16, dtype);
    c.options.output_final_state = true;
    // What rounding the result to the dtype costs is the least any 16-bit path can have.
    const double rounding = dtype == at::kHalf ? 2.5e-4 : 2e-3;
    expect_close(ounce::chunk_gla, c, rounding, dtype == at::kHalf ? "fp16" : "bf16");
    c.g = c.g.to(at::kFloat);
    expect_close(ounce::chunk_gla, c, rounding,
                 dtype == at::kHalf ? "fp16, g fp32" : "bf16, g fp32");
  }
}

TEST_P(Gla, DoubleBackwardIsRefused) {
  const auto c = make(1, 5, 1, 4, 4, 1, at::kDouble, false).on(device());
  const auto q = c.q.detach().requires_grad_();
  const auto o = std::get<0>(ounce::chunk_gla(q, c.k, c.v, c.g));
  const std::vector<Tensor> losses{o.square().sum()}, inputs{q};
  const auto d = torch::autograd::grad(losses, inputs, {}, {}, /*create_graph=*/true)[0];
  EXPECT_OUNCE_ERROR(d.sum().backward(), kUsage, "[chunk_gla] expected first derivatives only");
}

void expect_refused(const std::function<void()>& f, const std::string& text) {
  expect_error(ounce::Fault::kUsage, {text}, f);
}

TEST_F(GlaOnCpu, BadInput) {
  const auto good = make(1, 8, 2, 4, 6, 1, at::kFloat);
  auto refuse = [&](const std::string& text, const std::function<void(Call&)>& change) {
    auto c = good;
    change(c);
    expect_refused(
        [&] {
          ounce::chunk_gla(c.q, c.k, c.v, c.g, c.h0,
                           c.cu.defined() ? std::optional<Tensor>(c.cu) : std::nullopt, c.options);
        },
        text);
  };
  refuse("expected q of shape [batch", [](Call& c) { c.q = c.q[0]; });
  refuse("batch and tokens of q", [](Call& c) { c.k = c.k.slice(1, 1); });
  refuse("same channels", [](Call& c) { c.g = c.g.slice(3, 1); });
  refuse("floating dtype", [](Call& c) { c.v = c.v.to(at::kDouble); });
  refuse("expected k on cpu, got meta", [](Call& c) { c.k = at::empty_like(c.k, at::kMeta); });
  refuse("heads of q and v that are multiples", [](Call& c) { c.q = at::randn({1, 8, 3, 4}); });
  refuse("as many heads of g", [](Call& c) { c.g = at::zeros({1, 8, 1, 4}); });
  refuse("expected initial_state Float [1, 2, 4, 6], got Float [2, 2, 4, 6]", [](Call& c) {
    c.h0 = at::zeros({2, 2, 4, 6});
  });
  refuse("expected initial_state Float", [](Call& c) { c.h0 = c.h0.to(at::kHalf); });
  refuse("int32 or int64 [n + 1]", [](Call& c) { c.cu = at::tensor({0., 8.}); });
  refuse("from 0 to 8", [](Call& c) { c.cu = at::tensor({0, 7}, at::kInt); });
  refuse("from 0 to 8", [](Call& c) { c.cu = at::tensor({1, 8}, at::kInt); });
  refuse("decreasing", [](Call& c) {
    c.cu = at::tensor({0, 5, 3, 8}, at::kLong);
    c.h0 = at::zeros({3, 2, 4, 6});
  });
  refuse("clamp_min <= 0", [](Call& c) { c.options.clamp_min = 1; });
  refuse("gate_normalizer > 0", [](Call& c) { c.options.gate_normalizer = 0; });
  refuse("expected what the fused path takes, got a build without one",
         [](Call& c) { c.options.implementation = "fused"; });
  refuse("auto, fused or reference", [](Call& c) { c.options.implementation = "triton"; });
  auto two = make(2, 8, 2, 4, 6, 1, at::kFloat);
  expect_refused(
      [&] {
        ounce::chunk_gla(two.q, two.k, two.v, two.g, {}, at::tensor({0, 8}, at::kInt));
      },
      "expected batch 1 with cu_seqlens");
  auto long_piece = make(1, 9, 2, 4, 6, 1, at::kFloat);
  expect_refused(
      [&] {
        ounce::gla_step_(long_piece.q, long_piece.k, long_piece.v, long_piece.g, long_piece.h0);
      },
      "at most 8 tokens");
}

}  // namespace
