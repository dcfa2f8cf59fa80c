// SPDX-License-Identifier: MIT
// chunk_gla, fused_recurrent_gla, gla_step_ and naive_recurrent_gla against an fp64 recurrence.
#include <kernels/gla_oracle.h>
#include <ounce/core/check.h>

#include <functional>

namespace {

using namespace ounce::test;

struct Gla : testing::Test {
  void SetUp() override { at::manual_seed(7); }
};

constexpr double kExact = 1e-12;

TEST_F(Gla, EveryLengthEqualsTheRecurrence) {
  for (const int64_t t : {0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 300}) {
    expect_close(ounce::chunk_gla, make(2, t, 2, 6, 10, 1), kExact, "chunk t=" + std::to_string(t));
    if (t < 100) {
      expect_close(ounce::fused_recurrent_gla, make(2, t, 2, 6, 10, 1), kExact, "recurrent");
      expect_close(ounce::naive_recurrent_gla, make(2, t, 2, 6, 10, 1), kExact, "naive");
    }
  }
}

TEST_F(Gla, EveryGateStrength) {
  for (const double normalizer : {0.01, 0.1, 1.0, 16.0}) {
    auto c = make(2, 130, 2, 16, 8, normalizer);
    expect_close(ounce::chunk_gla, c, kExact, "normalizer " + std::to_string(normalizer));
    for (auto* x : {&c.q, &c.k, &c.v, &c.g, &c.h0}) *x = x->to(at::kFloat);
    // With decays near 0 the gradient of most gates is a rounding error of sums of order 1.
    expect_close(ounce::chunk_gla, c, normalizer < 0.1 ? 2e-5 : 2e-6,
                 "fp32 normalizer " + std::to_string(normalizer));
  }
  auto c = make(1, 100, 1, 8, 8, 1);
  c.g.zero_();
  expect_close(ounce::chunk_gla, c, kExact, "g = 0");
  c = make(1, 100, 1, 8, 8, 16);
  c.g.select(3, 2).fill_(-300);
  expect_close(ounce::chunk_gla, c, kExact, "one extreme channel");
  for (auto* x : {&c.q, &c.k, &c.v, &c.g, &c.h0}) *x = x->to(at::kFloat);
  expect_close(ounce::chunk_gla, c, 2e-6, "fp32 one extreme channel");
}

TEST_F(Gla, ResetsEqualSeparateSequences) {
  for (const double reset : {-kInf, -1e4}) {
    auto c = make(1, 150, 2, 8, 12, 1, at::kFloat, /*with_state=*/false);
    const std::vector<int64_t> starts = {0, 1, 40, 64, 77, 78, 150};
    for (size_t i = 1; i + 1 < starts.size(); ++i) c.g.select(1, starts[i]).fill_(reset);
    const auto d_o = at::randn({1, 150, 2, 12});
    const auto whole = run(ounce::chunk_gla, c, d_o, {});
    expect_close(ounce::chunk_gla, c, 2e-6, "fp32 resets");
    for (size_t i = 0; i + 1 < starts.size(); ++i) {
      auto part = [&](const Tensor& x) { return x.slice(1, starts[i], starts[i + 1]); };
      Call p{part(c.q), part(c.k), part(c.v), part(c.g), {}, {}, {}};
      const auto alone = run(ounce::chunk_gla, p, part(d_o), {});
      EXPECT_LE(error(part(whole.o), alone.o.to(at::kDouble)), 1e-6);
      for (int j = 0; j < 3; ++j) {
        EXPECT_LE(error(part(whole.grads[j]), alone.grads[j].to(at::kDouble)), 1e-6) << j;
      }
      const auto d_reset = part(whole.grads[3]).select(1, 0);
      EXPECT_TRUE(i == 0 || d_reset.abs().max().item<double>() == 0);
    }
  }
}

TEST_F(Gla, PackedEqualsSeparate) {
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

TEST_F(Gla, OptionsThatChangeTheResult) {
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

TEST_F(Gla, HeadsAreShared) {
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

TEST_F(Gla, NonContiguousInputsAndRepeatability) {
  auto c = make(2, 90, 3, 16, 8, 1, at::kFloat);
  const auto d_o = at::randn({2, 90, 3, 8}), d_ht = at::randn({2, 3, 16, 8});
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

TEST_F(Gla, PiecesAndStepsEqualTheWhole) {
  auto c = make(2, 150, 2, 16, 12, 1);
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
  auto pool = at::randn({5, 2, 16, 12}, at::kDouble);
  const auto slots = at::tensor({4, 1}, at::kInt), untouched = pool[2].clone();
  pool.index_copy_(0, slots.to(at::kLong), state);
  int64_t t = 140;
  for (int64_t n = 1; n <= 4; t += n, ++n) {
    pieces.push_back(ounce::gla_step_(part(c.q, t, t + n), part(c.k, t, t + n), part(c.v, t, t + n),
                                      part(c.g, t, t + n), pool, slots));
  }
  EXPECT_LE(error(at::cat(pieces, 1), o), 1e-13);
  EXPECT_LE(error(pool.index_select(0, slots.to(at::kLong)), ht), 1e-13);
  EXPECT_TRUE(at::equal(pool[2], untouched));
}

TEST_F(Gla, NumericGradients) {
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

TEST_F(Gla, SixteenBitInputs) {
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

TEST_F(Gla, DoubleBackwardIsRefused) {
  auto c = make(1, 5, 1, 4, 4, 1, at::kDouble, false);
  const auto q = c.q.set_requires_grad(true);
  const auto o = std::get<0>(ounce::chunk_gla(q, c.k, c.v, c.g));
  const std::vector<Tensor> losses{o.square().sum()}, inputs{q};
  const auto d = torch::autograd::grad(losses, inputs, {}, {}, /*create_graph=*/true)[0];
  try {
    d.sum().backward();
    FAIL() << "second derivative went through";
  } catch (const c10::Error& e) {
    EXPECT_NE(std::string(e.what()).find("[chunk_gla]"), std::string::npos) << e.what();
  }
}

void expect_refused(const std::function<void()>& f, const std::string& text) {
  try {
    f();
    ADD_FAILURE() << "accepted; expected an error with: " << text;
  } catch (const ounce::Error& e) {
    EXPECT_NE(std::string(e.what()).find(text), std::string::npos) << e.what();
    EXPECT_EQ(e.fault(), ounce::Fault::kUsage);
  }
}

TEST_F(Gla, BadInput) {
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
  refuse("no fused kernel", [](Call& c) { c.options.implementation = "fused"; });
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
