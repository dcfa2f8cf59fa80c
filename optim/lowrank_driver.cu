// SPDX-License-Identifier: MIT
// The low-rank products without Torch: checked against double precision on the CPU, and timed over
// the matrices of a model. For ncu and compute-sanitizer:
//   lowrank_driver check | many | time [rounds [rank]] | once [rank]
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include <ounce/kernels/common/driver.h>
#include <ounce/optim/lowrank_driver_checks.h>
#include <ounce/optim/lowrank_kernels.h>

namespace ounce::optim {
namespace {

template <class T>
__global__ void fill_noise(T* out, int64_t count, float size, uint64_t seed, bool squared) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    const float x = noise(i, seed) * size;
    out[i] = T(squared ? x * x : x);
  }
}
template <class T>
T* random(int64_t count, float size, bool squared = false) {
  static uint64_t seed = 0;
  T* out = allocate<T>(count);
  fill_noise<<<2048, 256>>>(out, count, size, ++seed, squared);
  CHECK(cudaGetLastError());
  return out;
}

double median_ms(int rounds, const std::function<void()>& f) {
  std::vector<float> times;
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  for (int i = 0; i < rounds + 3; ++i) {
    CHECK(cudaEventRecord(begin));
    f();
    CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end));
    float ms;
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 3) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

struct Layer {
  LowRankShape shape;
  ProjectMatrix *project, *keep_rest;
  ProjectedAdamMatrix* adam[2];  // moments of bf16, of fp32
  BackprojectMatrix* back;
};

Layer make_layer(const LowRankShape& s) {
  const int64_t longer = s.longer(), n = s.n(), r = s.rank, size = s.rows * s.columns;
  auto* g = random<bf16>(size * s.count, 1);
  auto* p = random<bf16>(size * s.count, 1);
  auto* q = random<bf16>(r * n * s.count, 1 / std::sqrt(static_cast<float>(n)));
  auto* u = random<bf16>(longer * r * s.count, 1);
  auto* a = random<bf16>(longer * r * s.count, 1);
  void* m[] = {random<bf16>(longer * r * s.count, 1), random<float>(longer * r * s.count, 1)};
  void* v[] = {random<bf16>(longer * r * s.count, 1, true),
               random<float>(longer * r * s.count, 1, true)};
  std::vector<int32_t> sources(r * s.count);
  for (size_t j = 0; j < sources.size(); ++j) {
    sources[j] = j % 3 == 0 ? -1 : static_cast<int32_t>(std::min<int64_t>(j % r + j % 2, r - 1));
  }
  auto* source = upload(sources);
  auto* squares = random<float>(r * s.count, 1, true);
  const int64_t blocks = (s.columns + 127) / 128;
  auto* bytes = allocate<int8_t>(size * s.count);
  auto* scales = allocate<float>(s.rows * blocks * s.count);
  auto* step = allocate<float>(s.count);
  CHECK(cudaMemset(step, 0, s.count * 4));
  std::vector<ProjectMatrix> project(s.count), keep_rest(s.count);
  std::vector<ProjectedAdamMatrix> adam[2];
  std::vector<BackprojectMatrix> back(s.count);
  for (int64_t i = 0; i < s.count; ++i) {
    const auto seed = static_cast<uint64_t>(i);
    CHECK(fill(s, {g + i * size, q + i * r * n, a + i * longer * r}, &project[i]));
    CHECK(fill(s,
               {g + i * size, q + i * r * n, a + i * longer * r, bytes + i * size,
                scales + i * s.rows * blocks},
               &keep_rest[i]));
    for (int k = 0; k < 2; ++k) {
      const auto state = [&](void* all) {
        return static_cast<char*>(all) + i * longer * r * (k == 1 ? 4 : 2);
      };
      adam[k].push_back({a + i * longer * r, u + i * longer * r, state(m[k]), state(v[k]), step + i,
                         seed, source + i * r, squares + i * r, nullptr});
    }
    CHECK(fill(s, Element::kBf16, {p + i * size, u + i * longer * r, q + i * r * n, step + i, seed},
               &back[i]));
  }
  return {s, upload(project), upload(keep_rest), {upload(adam[0]), upload(adam[1])}, upload(back)};
}

void time(int rounds, int rank) {
  const LowRankShape shapes[] = {
      {2048, 2048, true, rank, 96}, {5632, 2048, true, rank, 48}, {2048, 5632, false, rank, 24}};
  std::vector<Layer> layers;
  for (const auto& s : shapes) layers.push_back(make_layer(s));
  const int64_t bytes = int64_t{1} << 31;
  auto *from = random<bf16>(bytes / 2, 1), *to = allocate<bf16>(bytes / 2);
  const double copy =
      median_ms(rounds, [&] { CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice)); });
  std::printf("copy: %.2f TB/s read and written\n", 2 * bytes / copy / 1e9);
  const auto line = [&](const char* what, const std::function<void(Layer&)>& f,
                        const std::function<double(const LowRankShape&)>& bytes_of) {
    std::printf("rank %d %-22s", rank, what);
    double total = 0;
    for (auto& layer : layers) {
      total += bytes_of(layer.shape) * layer.shape.count;
      std::printf(" %.3f", median_ms(rounds, [&] { f(layer); }));
    }
    const double all = median_ms(rounds, [&] {
      for (auto& layer : layers) f(layer);
    });
    std::printf(" all %.3f ms, %.2f TB/s\n", all, total / all / 1e9);
  };
  line(
      "project",
      [&](Layer& l) {
        CHECK(project({l.shape, l.project}, nullptr));
      },
      [&](const LowRankShape& s) {
        return 2.0 * (s.rows * s.columns + s.rank * (s.n() + s.longer()));
      });
  line(
      "project, keep rest",
      [&](Layer& l) {
        CHECK(project({l.shape, l.keep_rest, true}, nullptr));
      },
      [&](const LowRankShape& s) {
        return 3.0 * s.rows * s.columns + 2.0 * s.rank * (s.n() + s.longer());
      });
  for (const bool wide : {false, true}) {
    line(
        wide ? "Adam in fp32" : "Adam in bf16",
        [&](Layer& l) {
          CHECK(adam({.count = l.shape.count,
                      .rank = l.shape.rank,
                      .longer = l.shape.longer(),
                      .moments_are_fp32 = wide,
                      .matrices = l.adam[wide]},
                     nullptr));
        },
        [&](const LowRankShape& s) { return (wide ? 20.0 : 12.0) * s.longer() * s.rank; });
  }
  for (const auto rounding : {Rounding::kNearest, Rounding::kStochastic}) {
    line(
        rounding == Rounding::kNearest ? "back nearest" : "back stochastic",
        [&](Layer& l) {
          CHECK(backproject({.shape = l.shape,
                             .rounding = rounding,
                             .matrices = l.back,
                             .decay = 1,
                             .factor = 1e-3f},
                            nullptr));
        },
        [&](const LowRankShape& s) {
          return 4.0 * s.rows * s.columns + 2.0 * s.rank * (s.n() + s.longer());
        });
  }
  CHECK(cudaDeviceSynchronize());
}

// A launch or two of each kind, for a profiler.
void once(int rank) {
  auto layer = make_layer({2048, 2048, true, rank, 96});
  for (int i = 0; i < 2; ++i) {
    CHECK(project({layer.shape, layer.project}, nullptr));
    CHECK(backproject({.shape = layer.shape,
                       .rounding = Rounding::kStochastic,
                       .matrices = layer.back,
                       .factor = 1e-3f},
                      nullptr));
  }
  CHECK(cudaDeviceSynchronize());
}

}  // namespace
}  // namespace ounce::optim

int main(int count, char** arguments) {
  using namespace ounce::optim;
  setvbuf(stdout, nullptr, _IOLBF, 0);
  const std::string what = count > 1 ? arguments[1] : "check";
  if (what == "check") check();
  if (what == "many") check_many();
  if (what == "time") {
    time(count > 2 ? std::atoi(arguments[2]) : 10, count > 3 ? std::atoi(arguments[3]) : 256);
  }
  if (what == "once") once(count > 2 ? std::atoi(arguments[2]) : 256);
  return failed ? 1 : 0;
}
