// SPDX-License-Identifier: MIT
// lowrank_driver.cu's checks against double precision on the CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <vector>

#include <ounce/kernels/common/driver.h>
#include <ounce/optim/lowrank_driver_tensors.h>
#include <ounce/optim/lowrank_kernels.h>

namespace ounce::optim {
namespace {

// With `rest`, what a leaves in 8 bits as well. Poisoned: x has a NaN.
void check_project(const LowRankShape& s, bool rest = false, bool skip = false,
                   bool poisoned = false) {
  const int64_t longer = s.longer(), n = s.n(), r = s.rank;
  Batch<bf16> g(s.count, s.rows * s.columns, [](int64_t i) { return noise(i, 1); });
  if (poisoned) {
    g.host[64 + 3] = bf16(NAN);
    g.push();
  }
  auto q = vectors_of(s);
  Batch<bf16> out(s.count, longer * r, [](int64_t) { return NAN; });
  Bytes bytes(s);
  Batch<float> skips(1, 1, [&](int64_t) { return skip ? 1 : 0; });
  std::vector<ProjectMatrix> host(s.count);
  for (int i = 0; i < s.count; ++i) {
    CHECK(fill(s,
               {g.at(i), q.at(i), out.at(i), rest ? bytes.at(i) : nullptr,
                rest ? bytes.scales.at(i) : nullptr},
               &host[i]));
  }
  auto* matrices = upload(host);
  const Project p{s, matrices, rest, skips.at(0)};
  run_captured([&](cudaStream_t stream) { return project(p, stream); });
  cudaFree(matrices);
  if (skip) {
    out.same("a");
    return bytes.untouched();
  }
  std::vector<double> expected;
  for (int i = 0; i < s.count; ++i) {
    const auto x = floats(g.of(i), longer * n), v = floats(q.of(i), r * n);
    for (int64_t row = 0; row < longer; ++row) {
      for (int64_t j = 0; j < r; ++j) {
        double sum = 0;
        for (int64_t k = 0; k < n; ++k) {
          sum += double{x[s.right ? row * n + k : k * longer + row]} * v[j * n + k];
        }
        expected.push_back(sum);
      }
    }
  }
  if (!poisoned) out.compare("a", expected, 2.5e-3);
  if (!rest) return bytes.untouched();
  out.host = out.pull();
  bytes.compare(g, out, q, poisoned);
}

struct AdamCase {
  bool source, squares, chosen, scale, skip;
};

template <class S>
void check_adam(const LowRankShape& s, const AdamCase& c) {
  const int64_t longer = s.longer(), n = s.n(), r = s.rank;
  constexpr bool wide = std::is_same_v<S, float>;
  Batch<bf16> a(s.count, longer * r, [](int64_t i) { return noise(i, 1); });
  Batch<S> m(s.count, longer * r, [](int64_t i) { return noise(i, 3); });
  Batch<S> v(s.count, longer * r, [](int64_t i) { return std::pow(noise(i, 4), 2) + 0.01f; });
  Batch<bf16> u(s.count, longer * r, [](int64_t) { return NAN; });
  // Ascending, some new, the rest moved.
  Batch<int32_t> source(s.count, r, [&](int64_t i) {
    const auto j = i % r;
    return static_cast<float>(i % 3 == 1 ? -1 : (j * 7 + 5) % r);
  });
  Batch<int32_t> chosen(s.count, r, [&](int64_t i) { return static_cast<float>(i * 5 % n); });
  Batch<float> squares(s.count, c.chosen ? n : r,
                       [&](int64_t i) { return longer * (1 + noise(i, 5) * 0.1f); });
  const float scale = c.scale ? 0.5f : 1, step = 6;
  Batch<float> scalars(1, 2, [&](int64_t) { return 0; });
  scalars.host[64] = scale;
  scalars.host[65] = c.skip ? 1 : 0;
  scalars.push();
  Batch<float> steps(s.count, 1, [&](int64_t) { return step; });
  std::vector<ProjectedAdamMatrix> host;
  for (int i = 0; i < s.count; ++i) {
    host.push_back({a.at(i), u.at(i), m.at(i), v.at(i), steps.at(i), 7,
                    c.source ? source.at(i) : nullptr, c.squares ? squares.at(i) : nullptr,
                    c.chosen ? chosen.at(i) : nullptr});
  }
  auto* matrices = upload(host);
  const ProjectedAdam p{
      s.count,          s.rank, longer, wide, matrices, c.scale ? scalars.at(0) : nullptr,
      scalars.at(0) + 1};
  run_captured([&](cudaStream_t stream) { return adam(p, stream); });
  cudaFree(matrices);
  if (c.skip) {
    m.same("m");
    v.same("v");
    u.same("u");
    return;
  }
  std::vector<double> new_ms, new_vs, us;
  const double t = step + 1;
  for (int i = 0; i < s.count; ++i) {
    for (int64_t row = 0; row < longer; ++row) {
      for (int64_t j = 0; j < r; ++j) {
        const double x = static_cast<float>(a.of(i)[row * r + j]) * scale;
        const int64_t from = c.source ? source.of(i)[j] : j;
        double old_m = 0, old_v = 0;
        if (from >= 0) {
          old_m = static_cast<float>(m.of(i)[row * r + from]);
          old_v = static_cast<float>(v.of(i)[row * r + from]);
        } else if (c.squares) {
          old_v = squares.of(i)[c.chosen ? chosen.of(i)[j] : j] / static_cast<double>(longer) *
                  scale * scale * (1 - std::pow(p.beta2, step));
        }
        new_ms.push_back(p.beta1 * old_m + (1 - p.beta1) * x);
        new_vs.push_back(p.beta2 * old_v + (1 - p.beta2) * x * x);
        us.push_back(new_ms.back() / (1 - std::pow(p.beta1, t)) /
                     (std::sqrt(new_vs.back() / (1 - std::pow(p.beta2, t))) + p.eps));
      }
    }
  }
  m.compare("m", new_ms, wide ? 1e-5 : 5e-3);
  v.compare("v", new_vs, wide ? 1e-5 : 5e-3);
  u.compare("u", us, wide ? 2.5e-3 : 1e-2);
}

// As in stochastic_rounding.cpp.
int64_t spread(int64_t x) {
  constexpr int64_t kMask = 0xFFFFFFFF;
  x = ((x ^ (x >> 16)) * int64_t{0x21f0aaad}) & kMask;
  x = ((x ^ (x >> 15)) * int64_t{0x735a2d97}) & kMask;
  return x ^ (x >> 15);
}
float round_stochastically(float x, int64_t position, int64_t step, uint64_t seed) {
  constexpr int64_t kMask = 0xFFFFFFFF;
  const auto key = spread(static_cast<int64_t>(seed & kMask)) ^ static_cast<int64_t>(seed >> 32);
  const auto stream = spread(spread(step & kMask) ^ spread(key & kMask));
  const auto odds = spread((position & kMask) ^ spread((position >> 32) ^ stream)) & 0xFFFF;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (std::isfinite(x)) bits += static_cast<uint32_t>(odds);
  bits &= 0xFFFF0000u;
  std::memcpy(&x, &bits, 4);
  return x;
}

template <class P>
void check_backproject(const LowRankShape& s, Rounding rounding, bool with_lr, bool skip,
                       bool poisoned) {
  const int64_t longer = s.longer(), n = s.n(), r = s.rank;
  constexpr bool wide = std::is_same_v<P, float>;
  Batch<P> p(s.count, s.rows * s.columns, [](int64_t i) { return noise(i, 1); });
  Batch<bf16> u(s.count, longer * r, [](int64_t i) { return noise(i, 2); });
  auto q = vectors_of(s);
  if (poisoned) {  // infinities and NaN stay what they are
    p.host[64 + 3] = P(INFINITY);
    p.host[64 + 4] = P(-INFINITY);
    p.host[64 + s.columns] = P(NAN);
    p.push();
  }
  Batch<float> scalars(1, 2, [&](int64_t) { return 0; });
  scalars.host[64] = 0.03f;
  scalars.host[65] = skip ? 1 : 0;
  scalars.push();
  const float step = 41;
  Batch<float> steps(s.count, 1, [&](int64_t) { return step; });
  std::vector<BackprojectMatrix> host(s.count);
  const auto element = wide ? Element::kFp32 : Element::kBf16;
  for (int i = 0; i < s.count; ++i) {
    CHECK(fill(s, element, {p.at(i), u.at(i), q.at(i), steps.at(i), (uint64_t{77} << 32) ^ i},
               &host[i]));
  }
  auto* matrices = upload(host);
  Backproject call{s, element, rounding, matrices};
  call.lr = with_lr ? scalars.at(0) : nullptr;
  call.skip = scalars.at(0) + 1;
  call.decay = 0.95f;
  call.weight_decay = 0.1f;
  call.factor = 0.7f;
  run_captured([&](cudaStream_t stream) { return backproject(call, stream); });
  if (skip) {
    p.same("p");
    cudaFree(matrices);
    return;
  }
  const double lr = with_lr ? 0.03 : 1, keep = call.decay - lr * call.weight_decay;
  std::vector<double> expected;
  int64_t odd = 0, at = 0, lost = 0;
  const auto got = p.pull();
  for (int i = 0; i < s.count; ++i) {
    const auto sums = product(s, u.of(i), q.of(i));
    for (int64_t k = 0; k < s.rows * s.columns; ++k, ++at) {
      double x = static_cast<float>(p.of(i)[k]) * keep - lr * call.factor * sums[k];
      const float found = static_cast<float>(got[64 + i * p.stride + k]);
      if (!std::isfinite(x)) {
        lost += std::isnan(x) ? !std::isnan(found) : found != x;
        x = 0;
        p.host[64 + i * p.stride + k] = P(0.f);
      } else if (rounding == Rounding::kStochastic) {
        x = round_stochastically(static_cast<float>(x), k, static_cast<int64_t>(step) + 1,
                                 (uint64_t{77} << 32) ^ i);
        odd += x != found;
      }
      expected.push_back(x);
    }
  }
  if (!poisoned) p.compare("p", expected, wide ? 1e-5 : 2.5e-3);
  if (rounding == Rounding::kStochastic) {
    std::printf(" rounded otherwise %.1e", static_cast<double>(odd) / at);
    failed |= !poisoned && odd > at / 500 + 2;
  }
  if (poisoned) {
    std::printf(" not finite: %s", lost > 0 ? "WRONG" : "kept");
    failed |= lost > 0;
  }
  cudaFree(matrices);
}

void check() {
  const auto name = [](const LowRankShape& s) {
    std::printf("%d x %lld x %lld %s r %d:", s.count, static_cast<long long>(s.rows),
                static_cast<long long>(s.columns), s.right ? "right" : "left", s.rank);
  };
  const LowRankShape shapes[] = {
      {300, 264, true, 256, 3},  {264, 296, false, 256, 1}, {520, 512, true, 256, 1},
      {130, 136, true, 128, 1},  {136, 200, false, 128, 3}, {77, 72, true, 64, 3},
      {72, 136, false, 64, 1},   {1000, 64, true, 48, 1},   {104, 328, false, 80, 3},
      {400, 200, true, 192, 1},  {300, 400, true, 256, 2},  {272, 400, false, 256, 1},
      {130, 144, true, 128, 1},  {300, 208, true, 112, 2},  {400, 208, true, 192, 1},
      {136, 208, false, 128, 3}, {104, 336, false, 80, 3},  {400, 416, false, 192, 1},
  };
  for (const auto& s : shapes) {
    name(s);
    std::printf(" project:");
    check_project(s);
    if (can_keep_rest(s)) {
      check_project(s, true);
      check_project(s, true, true);
      check_project(s, true, false, true);
    }
    std::printf("\n");
    for (const bool wide : {false, true}) {
      const auto say = [&](const char* what, const AdamCase& c) {
        name(s);
        std::printf(" Adam in %s, %s:", wide ? "fp32" : "bf16", what);
        wide ? check_adam<float>(s, c) : check_adam<bf16>(s, c);
        std::printf("\n");
      };
      say("same columns", {false, false, false, false, false});
      say("moved, new", {true, true, false, true, false});
      say("moved, new of all", {true, true, true, true, false});
      say("moved, new from 0", {true, false, false, false, false});
      say("skipped", {true, true, false, true, true});
    }
    name(s);
    std::printf(" back:");
    check_backproject<bf16>(s, Rounding::kNearest, true, false, false);
    check_backproject<bf16>(s, Rounding::kStochastic, true, false, false);
    check_backproject<bf16>(s, Rounding::kStochastic, true, false, true);
    check_backproject<bf16>(s, Rounding::kStochastic, true, true, false);
    check_backproject<float>(s, Rounding::kNearest, false, false, false);
    std::printf("\n");
  }
  std::printf(failed ? "FAILED\n" : "all good\n");
}

// More tiles than blocks, so that each has several.
void check_many() {
  const LowRankShape shapes[] = {{520, 264, true, 256, 70},  {264, 520, false, 256, 70},
                                 {600, 136, true, 128, 90},  {136, 600, false, 128, 90},
                                 {600, 80, true, 64, 90},    {80, 592, false, 64, 140},
                                 {600, 400, true, 256, 50},  {600, 144, true, 128, 90},
                                 {264, 528, false, 256, 70}, {136, 608, false, 128, 90}};
  for (const auto& s : shapes) {
    std::printf("%d x %lld x %lld:", s.count, static_cast<long long>(s.rows),
                static_cast<long long>(s.columns));
    check_project(s, can_keep_rest(s));
    check_adam<bf16>(s, {true, true, false, true, false});
    check_backproject<bf16>(s, Rounding::kStochastic, true, false, false);
    check_backproject<float>(s, Rounding::kNearest, false, false, false);
    std::printf("\n");
  }
  std::printf(failed ? "FAILED\n" : "all good\n");
}

}  // namespace
}  // namespace ounce::optim
