// SPDX-License-Identifier: MIT
// Ranking, selecting and gathering without Torch: checked against fp64 on the CPU, and timed. For
// ncu and compute-sanitizer:
//   dct_rank_driver [check [largest length] | time | one COUNT ROWS COLUMNS right|left [timed]]
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <optional>
#include <random>
#include <thread>
#include <vector>

#include <ounce/kernels/common/driver.h>
#include <ounce/optim/dct_rank_kernels.h>

using namespace ounce::optim;
using ounce::driver::allocate;
using ounce::driver::download;
using ounce::driver::upload;

namespace {

void release(std::initializer_list<const void*> all) {
  for (const void* memory : all) CHECK(cudaFree(const_cast<void*>(memory)));
}

int processors() {
  int count = 0;
  CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0));
  return count;
}

int failures = 0;
void expect(bool good, const char* what, double value) {
  if (!good) std::printf("    FAIL %s %.3g\n", what, value);
  failures += !good;
}

enum class Kind { kNone, kBf16, kFp32, kInt8 };

struct Case {
  int count;
  int64_t rows, columns;
  bool right;
  Kind gradient = Kind::kBf16, addend = Kind::kNone;
  bool shifted = false, absolutes = false;
  RankBasis basis = RankBasis::kDct2;
};

// Matrices of one kind on the device, and their values.
struct Matrices {
  std::vector<std::vector<double>> values;
  std::vector<void*> memory;
  std::vector<const void*> pointers;

  Matrices(const Case& c, Kind kind, uint64_t seed) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    for (int m = 0; m < c.count; ++m) {
      const int64_t count = c.rows * c.columns, skipped = c.shifted ? 1 + m % 3 : 0;
      std::vector<double> value(count);
      std::vector<__nv_bfloat16> narrow(count + skipped);
      std::vector<float> wide(count + skipped);
      for (int64_t i = 0; i < count; ++i) {
        const float x = normal(random) + 0.2f * static_cast<float>(i % 7);
        narrow[i + skipped] = __float2bfloat16(x);
        wide[i + skipped] = x;
        value[i] = kind == Kind::kFp32 ? x : __bfloat162float(narrow[i + skipped]);
      }
      if (kind == Kind::kFp32) {
        float* to = upload(wide);
        memory.push_back(to);
        pointers.push_back(to + skipped);
      } else {
        __nv_bfloat16* to = upload(narrow);
        memory.push_back(to);
        pointers.push_back(to + skipped);
      }
      values.push_back(std::move(value));
    }
  }
  ~Matrices() {
    for (void* m : memory) cudaFree(m);
  }
};

// What is added to the matrices; sums of bf16 lie where the addends did.
struct Addends {
  static constexpr float kScale = 0.75f;
  std::vector<std::vector<double>> values;
  std::vector<RankAddend> entries;
  std::vector<const void*> memory;

  Addends(const Case& c) {
    std::mt19937_64 random(2);
    std::normal_distribution<float> normal;
    const float* step = keep(upload(std::vector<float>{4}));
    for (int m = 0; m < c.count; ++m) {
      const int64_t count = c.rows * c.columns;
      std::vector<double> value(count);
      std::vector<__nv_bfloat16> wide(count);
      std::vector<int8_t> narrow(count);
      std::vector<float> scales(count / 128 + 1);
      for (float& scale : scales) scale = std::exp(normal(random)) / 127;
      for (int64_t i = 0; i < count; ++i) {
        wide[i] = __float2bfloat16(normal(random));
        narrow[i] = static_cast<int8_t>(static_cast<int>(random() % 255) - 127);
        value[i] = c.addend == Kind::kInt8 ? static_cast<double>(scales[i / 128]) * narrow[i]
                                           : __bfloat162float(wide[i]);
      }
      values.push_back(std::move(value));
      auto* sum = keep(upload(wide));
      entries.push_back({sum, nullptr, sum, step, static_cast<uint64_t>(m) + 1});
      if (c.addend == Kind::kInt8) {
        entries[m] = {keep(upload(narrow)), keep(upload(scales)), sum};
      }
    }
  }
  ~Addends() {
    for (const void* m : memory) cudaFree(const_cast<void*>(m));
  }
  template <class T>
  T* keep(T* pointer) {
    memory.push_back(pointer);
    return pointer;
  }
};

// By definition, of one matrix.
void plain(const Case& c, const std::vector<double>& x, int64_t k, double& squares, double& sums) {
  const int64_t n = c.right ? c.columns : c.rows, vectors = c.right ? c.rows : c.columns;
  std::vector<double> basis(n), dots(vectors, 0.0);
  for (int64_t t = 0; t < n; ++t) {
    basis[t] = c.basis == RankBasis::kIdentity
                   ? (t == k)
                   : std::cos(M_PI * static_cast<double>(k * (2 * t + 1) % (4 * n)) / (2.0 * n)) *
                         std::sqrt((k == 0 ? 1.0 : 2.0) / n);
  }
  if (c.right) {
    for (int64_t v = 0; v < vectors; ++v) {
      double part[8] = {};
      for (int64_t t = 0; t < n; ++t) part[t % 8] += x[v * n + t] * basis[t];
      for (double p : part) dots[v] += p;
    }
  } else {
    for (int64_t t = 0; t < n; ++t) {
      for (int64_t v = 0; v < vectors; ++v) dots[v] += x[t * vectors + v] * basis[t];
    }
  }
  squares = sums = 0;
  for (double dot : dots) squares += dot * dot, sums += std::fabs(dot);
}

double worst_error(const std::vector<float>& got, const std::vector<double>& want) {
  double worst = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double error = std::fabs(got[i] - want[i]) / want[i];
    if (!(error <= worst)) worst = std::isnan(error) ? INFINITY : error;
  }
  return worst;
}

void check_rank(const Case& c) {
  const Matrices g(c, c.gradient, 1);
  std::vector<std::vector<double>> ranked = g.values;
  RankBatch batch = {c.count, c.rows, c.columns, c.right};
  batch.gradient = upload(g.pointers);
  batch.gradient_is_fp32 = c.gradient == Kind::kFp32;
  batch.aligned = !c.shifted;
  const auto* entries = c.addend == Kind::kNone ? nullptr : allocate<RankAddend>(c.count);
  const float* scalars = upload(std::vector<float>{Addends::kScale, 0, 1});
  batch.addends = entries;
  batch.addends_are_int8 = c.addend == Kind::kInt8;
  batch.scale = scalars;
  const int64_t n = batch.length(), all = n * c.count;
  const int64_t bytes = rank_scratch(c.basis, batch, c.absolutes, processors());
  char* scratch = allocate<char>(bytes + 1024);
  RankOutput out = {upload(std::vector<float>(all, NAN)),
                    c.absolutes ? upload(std::vector<float>(all, NAN)) : nullptr, scratch};
  std::vector<float> first;
  for (int run = 0; run < 2; ++run) {  // the second run finds other scratch
    CHECK(cudaMemset(scratch, 0xff, bytes + 1024));
    std::optional<Addends> addends;
    if (entries != nullptr) {
      addends.emplace(c);
      CHECK(cudaMemcpy(const_cast<RankAddend*>(entries), addends->entries.data(),
                       c.count * sizeof(RankAddend), cudaMemcpyHostToDevice));
    }
    const int64_t count = c.rows * c.columns;
    const auto sum_of = [&](int m) {
      return download(static_cast<const __nv_bfloat16*>(addends->entries[m].sum), count);
    };
    const auto before = entries == nullptr ? std::vector<__nv_bfloat16>() : sum_of(0);
    for (const int skip : {1, 0}) {
      if (skip == 1 && entries == nullptr) continue;
      batch.skip = scalars + 1 + skip;
      CHECK(rank(c.basis, batch, out, processors(), nullptr));
      CHECK(cudaDeviceSynchronize());
      if (skip == 1) {
        expect(std::memcmp(sum_of(0).data(), before.data(), count * 2) == 0, "skips", 0);
      }
    }
    for (int m = 0; entries != nullptr && m < c.count; ++m) {
      const auto sum = sum_of(m);
      double worst = 0, bias = 0;
      for (int64_t i = 0; i < count; ++i) {
        const double exact = Addends::kScale * g.values[m][i] + addends->values[m][i];
        ranked[m][i] = __bfloat162float(sum[i]);
        const double off = (ranked[m][i] - exact) / std::max(std::fabs(exact), 1e-4);
        worst = std::max(worst, std::fabs(off));
        bias += off / static_cast<double>(count);
      }
      expect(worst <= (batch.addends_are_int8 ? 1 / 255. : 1 / 127.), "sum", worst);
      expect(std::fabs(bias) < 1e-3, "bias", bias);
    }
    const auto got = download(out.squares, all);
    if (run == 1) expect(std::memcmp(got.data(), first.data(), all * 4) == 0, "repeats", 0);
    first = got;
  }
  std::vector<double> squares(all), sums(all);
  std::vector<std::thread> threads;
  const int workers = std::max(2u, std::thread::hardware_concurrency());
  for (int w = 0; w < workers; ++w) {
    threads.emplace_back([&, w] {
      for (int m = 0; m < c.count; ++m) {
        for (int64_t k = w; k < n; k += workers)
          plain(c, ranked[m], k, squares[m * n + k], sums[m * n + k]);
      }
    });
  }
  for (auto& thread : threads) thread.join();
  const double error = worst_error(first, squares);
  double error_sums = 0;
  if (c.absolutes) error_sums = worst_error(download(out.absolutes, all), sums);
  std::printf("  %d x [%ld, %ld] %s %s%s%s%s%s: %.2g %.2g\n", c.count, c.rows, c.columns,
              c.right ? "right" : "left", c.basis == RankBasis::kIdentity ? "identity " : "",
              batch.gradient_is_fp32 ? "fp32" : "bf16",
              entries == nullptr       ? ""
              : batch.addends_are_int8 ? " + int8"
                                       : " + bf16",
              c.shifted ? " shifted" : "", c.absolutes ? " absolutes" : "", error, error_sums);
  expect(error < 1e-5, "squares", error);
  expect(error_sums < 1e-5, "absolutes", error_sums);
  release({batch.gradient, entries, scalars, out.squares, out.absolutes, scratch});
}

// Of a matrix's rows.
std::vector<int*> pointers_to(int* rows, int count, int width) {
  std::vector<int*> all;
  for (int i = 0; i < count; ++i) all.push_back(rows + int64_t{i} * width);
  return all;
}

void check_select(int count, int n, int rank, int levels, bool skip, bool nan) {
  std::mt19937 random(n + rank);
  std::vector<float> keys(int64_t{count} * n);
  for (float& key : keys) {
    const float x = std::exp(std::normal_distribution<float>(0, 3)(random));
    key = levels == 0 ? x : static_cast<float>(random() % levels);
  }
  if (nan) keys[n / 2] = NAN;
  std::vector<int> previous, all(n);
  std::iota(all.begin(), all.end(), 0);
  for (int m = 0; m < count; ++m) {
    std::vector<int> list;
    std::sample(all.begin(), all.end(), std::back_inserter(list), rank, random);
    previous.insert(previous.end(), list.begin(), list.end());
  }
  const int64_t places = int64_t{count} * rank;
  Selection s = {count, n, rank};
  s.keys = s.squares = upload(keys);
  s.indices = allocate<int>(places);
  int* const lists = upload(previous);
  s.lists = upload(pointers_to(lists, count, rank));
  s.skip = upload(std::vector<float>{skip ? 1.f : 0.f});
  s.source = upload(std::vector<int>(places, -7));
  s.energy = upload(std::vector<float>(count, -1));
  CHECK(select(s, nullptr));
  CHECK(cudaDeviceSynchronize());
  const auto indices = download(s.indices, places), source = download(s.source, places);
  expect(download(lists, places) == indices, "lists", 0);
  const auto energy = download(s.energy, count);
  bool same = true, right_energy = true;
  for (int m = 0; m < count; ++m) {
    const float* key = keys.data() + int64_t{m} * n;
    const int* old = previous.data() + int64_t{m} * rank;
    std::vector<int> order = all;
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
      return std::isnan(key[a]) != std::isnan(key[b]) ? std::isnan(key[a]) : key[a] > key[b];
    });
    order.resize(rank);
    std::sort(order.begin(), order.end());
    double kept = 0, total = 0;
    for (int i = 0; i < n; ++i) total += key[i];
    for (int i = 0; i < rank; ++i) {
      kept += key[order[i]];
      const auto found = std::lower_bound(old, old + rank, order[i]);
      const int from = found != old + rank && *found == order[i] ? found - old : -1;
      same = same && indices[m * rank + i] == (skip ? old[i] : order[i]) &&
             source[m * rank + i] == (skip ? i : from);
    }
    const double want = skip ? -1 : total == 0 ? 0 : kept / total;
    right_energy = right_energy && (std::fabs(energy[m] - want) < 1e-5 || std::isnan(want));
  }
  std::printf("  select %d of %d in %d%s%s%s\n", rank, n, count, levels > 0 ? " with ties" : "",
              skip ? " skipped" : "", nan ? " with a NaN" : "");
  expect(same, "indices and sources", 0);
  expect(right_energy, "energy", energy[0]);
  release({s.keys, s.indices, lists, s.lists, s.skip, s.source, s.energy});
}

void check_gather(int64_t rows, int64_t n) {
  std::vector<__nv_bfloat16> basis(n * n);
  std::vector<int> indices(rows);
  for (int64_t i = 0; i < n * n; ++i) basis[i] = __float2bfloat16(static_cast<float>(i % 251));
  for (int64_t i = 0; i < rows; ++i) indices[i] = static_cast<int>(i * 37 % n);
  const auto* from = upload(basis);
  const int* list = upload(indices);
  auto* out = upload(std::vector<__nv_bfloat16>(rows * n));
  CHECK(gather_rows(from, list, rows, n, out, nullptr));
  const auto got = download(out, rows * n);
  bool same = true;
  for (int64_t i = 0; i < rows * n; ++i) {
    same =
        same && static_cast<float>(got[i]) == static_cast<float>(basis[indices[i / n] * n + i % n]);
  }
  std::printf("  gather %ld of %ld\n", rows, n);
  expect(same, "rows", 0);
  release({from, list, out});
}

// All of a step in a graph gives what the launches give.
void check_graph() {
  const Case c = {2, 96, 512, true};
  const Matrices g(c, c.gradient, 1);
  RankBatch batch = {c.count, c.rows, c.columns, c.right};
  batch.gradient = upload(g.pointers);
  batch.aligned = true;
  const int64_t bytes = rank_scratch(c.basis, batch, false, processors());
  const RankOutput out = {allocate<float>(1024), nullptr, allocate<char>(bytes)};
  Selection s = {2, 512, 64};
  s.keys = s.squares = out.squares;
  s.indices = allocate<int>(128);
  cudaStream_t stream = nullptr;
  CHECK(cudaStreamCreate(&stream));
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t run = nullptr;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  CHECK(rank(c.basis, batch, out, processors(), stream));
  CHECK(select(s, stream));
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&run, graph, 0));
  CHECK(cudaGraphLaunch(run, stream));
  CHECK(cudaStreamSynchronize(stream));
  const auto captured = download(s.indices, 128);
  CHECK(rank(c.basis, batch, out, processors(), stream));
  CHECK(select(s, stream));
  CHECK(cudaStreamSynchronize(stream));
  std::printf("  graph\n");
  expect(captured == download(s.indices, 128), "the graph's indices", 0);
  CHECK(cudaGraphExecDestroy(run));
  CHECK(cudaGraphDestroy(graph));
  CHECK(cudaStreamDestroy(stream));
  release({batch.gradient, out.squares, out.scratch, s.indices});
}

void check(int64_t largest) {
  using enum Kind;
  std::vector<Case> cases;
  for (const int64_t n : {512, 768, 1024, 1536, 2048, 4096, 8192}) {  // kernels of their own
    for (const bool right : {true, false}) {
      const auto add = [&](int count, int64_t vectors, auto change) {
        Case c = {count, right ? vectors : n, right ? n : vectors, right};
        change(c);
        cases.push_back(c);
      };
      add(2, 24, [](Case&) {});
      add(1, right ? 5 : 40, [](Case&) {});
      add(2, 7, [](Case& c) { c.shifted = true; });
      add(2, 19, [](Case& c) { c.absolutes = true; });
      add(1, 32, [](Case& c) { c.gradient = kFp32; });
      add(1, right ? 9 : 8, [](Case& c) { c.gradient = kFp32; });
      if (!right || (n != 1024 && n != 2048 && n != 4096)) continue;
      for (const auto kind : {kBf16, kInt8}) {
        add(2, 37, [&](Case& c) { c.addend = kind; });
        add(3, n > 2048 ? 8 : 300, [&](Case& c) { c.addend = kind; });
      }
    }
  }
  for (const int64_t n : {2,   3,   4,   6,    7,    16,   30,   64,   77,   96,  128,
                          135, 256, 375, 1000, 2560, 3072, 3584, 5120, 5632, 8100}) {
    for (const bool right : {true, false}) {
      cases.push_back({2, right ? 11 : n, right ? n : 11, right});
      cases.push_back({1, right ? 16 : n, right ? n : 16, right, kFp32, kNone, true, true});
    }
  }
  for (const bool right : {true, false}) {  // many units a block, and over ends of matrices
    cases.push_back({5, right ? 2048 : 512, right ? 512 : 2048, right});
    cases.push_back({3, 2048, 2048, right});
    cases.push_back({30, 64, 64, right});
    for (const bool shifted : {false, true}) {
      cases.push_back({2, 1000, 520, right, kBf16, kNone, shifted, true, RankBasis::kIdentity});
      cases.push_back({3, 77, 131, right, kFp32, kNone, shifted, false, RankBasis::kIdentity});
    }
  }
  for (const auto& c : cases) {
    if ((c.right ? c.columns : c.rows) <= largest) check_rank(c);
  }
  expect(!can_rank(RankBasis::kDct2, 13) && !can_rank(RankBasis::kDct2, 8192 * 2) &&
             !can_rank(RankBasis::kDct2, 1) && can_rank(RankBasis::kDct2, 5632),
         "can_rank", 0);
  for (const auto& [n, rank] :
       {std::pair(1, 1), {31, 5}, {64, 64}, {2048, 256}, {5000, 77}, {32000, 512}, {65536, 1}}) {
    for (const int levels : {0, 1, 5}) check_select(3, n, rank, levels, false, false);
  }
  check_select(2, 2048, 256, 0, true, false);
  check_select(2, 2048, 256, 3, false, true);
  check_gather(64, 256);
  check_gather(7, 77);
  check_graph();
}

// Median of rounds, in microseconds; each round some calls, captured in a graph.
double time_of(int calls, const std::function<void(int, cudaStream_t)>& call) {
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t run = nullptr;
  cudaEvent_t start = nullptr, stop = nullptr;
  CHECK(cudaStreamCreate(&stream));
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&stop));
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  for (int i = 0; i < calls; ++i) call(i, stream);
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&run, graph, 0));
  std::vector<float> times;
  for (int round = 0; round < 23; ++round) {
    CHECK(cudaEventRecord(start, stream));
    CHECK(cudaGraphLaunch(run, stream));
    CHECK(cudaEventRecord(stop, stream));
    CHECK(cudaEventSynchronize(stop));
    float ms = 0;
    CHECK(cudaEventElapsedTime(&ms, start, stop));
    if (round >= 3) times.push_back(ms * 1000 / static_cast<float>(calls));
  }
  std::nth_element(times.begin(), times.begin() + 10, times.end());
  CHECK(cudaGraphExecDestroy(run));
  CHECK(cudaGraphDestroy(graph));
  CHECK(cudaEventDestroy(start));
  CHECK(cudaEventDestroy(stop));
  CHECK(cudaStreamDestroy(stream));
  return times[10];
}

__global__ void fill(__nv_bfloat16* out, int64_t count) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    uint64_t x = i * 0x9E3779B97F4A7C15ull + 1;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    out[i] = __float2bfloat16(static_cast<float>(x >> 40) / 8388608.f - 1);
  }
}

// Batches of bf16 matrices that share one arena.
struct Timed {
  RankBatch batch;
  RankOutput out;
  RankBasis basis = RankBasis::kDct2;
  void run(cudaStream_t stream) const { CHECK(rank(basis, batch, out, processors_, stream)); }
  int processors_ = processors();
};
Timed timed(__nv_bfloat16* arena, int count, int64_t rows, int64_t columns, bool right,
            Kind addend = Kind::kNone, bool absolutes = false, RankBasis basis = RankBasis::kDct2) {
  Timed t = {{count, rows, columns, right}, {}, basis};
  std::vector<const void*> pointers;
  std::vector<RankAddend> addends;
  for (int i = 0; i < count; ++i) {
    __nv_bfloat16* at = arena + 3 * i * rows * columns;
    pointers.push_back(addend == Kind::kNone ? arena + i * rows * columns : at);
    auto *e = at + rows * columns, *sum = e + rows * columns;
    addends.push_back({e, reinterpret_cast<float*>(sum), addend == Kind::kInt8 ? sum : e,
                       reinterpret_cast<float*>(arena)});
  }
  t.batch.gradient = upload(pointers);
  t.batch.aligned = true;
  if (addend != Kind::kNone) t.batch.addends = upload(addends);
  t.batch.addends_are_int8 = addend == Kind::kInt8;
  const int64_t all = count * t.batch.length();
  t.out = {allocate<float>(all), absolutes ? allocate<float>(all) : nullptr,
           allocate<char>(rank_scratch(basis, t.batch, absolutes, processors()))};
  return t;
}

void time_all() {
  cudaDeviceProp device;
  CHECK(cudaGetDeviceProperties(&device, 0));
  std::printf("%s, %d multiprocessors\n", device.name, device.multiProcessorCount);
  const int64_t size = int64_t{1300} << 20;
  auto* arena = allocate<__nv_bfloat16>(size);
  fill<<<4096, 256>>>(arena, size);
  auto* copy = allocate<__nv_bfloat16>(size / 2);
  const double us = time_of(1, [&](int, cudaStream_t stream) {
    CHECK(cudaMemcpyAsync(copy, arena, size, cudaMemcpyDeviceToDevice, stream));
  });
  std::printf("copy: %.0f GB/s\n", 2 * size / us / 1e3);
  CHECK(cudaFree(copy));

  struct Shape {
    int count;
    int64_t rows, columns;
    bool right;
    Kind addend = Kind::kNone;
    bool absolutes = false;
    RankBasis basis = RankBasis::kDct2;
  };
  const auto report = [&](const Shape& s) {
    const int64_t elements = s.rows * s.columns * s.count;
    const int64_t each = elements * (s.addend == Kind::kNone ? 1 : 3);
    const int64_t bytes = elements * (s.addend == Kind::kNone   ? 2
                                      : s.addend == Kind::kInt8 ? 5
                                                                : 6);
    const int sets = static_cast<int>(std::clamp<int64_t>((256 << 20) / each, 1, 32));
    std::vector<Timed> all;
    for (int i = 0; i < sets; ++i) {
      all.push_back(timed(arena + i * each, s.count, s.rows, s.columns, s.right, s.addend,
                          s.absolutes, s.basis));
    }
    const double us = time_of(sets, [&](int i, cudaStream_t stream) { all[i].run(stream); });
    std::printf("  %3d x [%5ld, %5ld] %-5s%s%s%s: %8.1f us %6.0f GB/s\n", s.count, s.rows,
                s.columns, s.right ? "right" : "left",
                s.addend == Kind::kNone   ? ""
                : s.addend == Kind::kInt8 ? " + int8"
                                          : " + bf16",
                s.absolutes ? " absolutes" : "", s.basis == RankBasis::kIdentity ? " identity" : "",
                us, bytes / us / 1e3);
    for (const auto& t : all) {
      release({t.batch.gradient, t.batch.addends, t.out.squares, t.out.absolutes, t.out.scratch});
    }
    return us;
  };
  double total = 0;
  for (const Shape& s :
       {Shape{96, 2048, 2048, true}, Shape{48, 5632, 2048, true}, Shape{24, 2048, 5632, false}}) {
    total += report(s);
  }
  std::printf("  together %.1f us\n", total);
  for (const int64_t n : {512, 768, 1024, 1536, 2048, 4096, 8192, 1000, 64}) {
    report({1, n, n, true});
    report({1, n, n, false});
  }
  for (const int64_t n : {1024, 4096, 8192}) {
    const int count = static_cast<int>((int64_t{400} << 20) / n / n);
    report({count, n, n, true});
    report({count, n, n, false});
    if (n == 8192) continue;
    for (const auto kind : {Kind::kBf16, Kind::kInt8}) report({count / 3, n, n, true, kind});
  }
  for (const bool right : {true, false}) {
    report({48, 2048, 2048, right, Kind::kNone, true});
    report({48, 2048, 2048, right, Kind::kNone, false, RankBasis::kIdentity});
  }
  for (const auto kind : {Kind::kNone, Kind::kBf16, Kind::kInt8}) {
    report({96, 2048, 2048, true, kind});
    report({32, 5632, 2048, true, kind});
  }
  Selection s = {96, 2048, 256};
  std::vector<float> keys(96 * 2048);
  for (size_t i = 0; i < keys.size(); ++i) keys[i] = static_cast<float>(i * 7919 % 10007);
  s.keys = s.squares = upload(keys);
  s.indices = allocate<int>(96 * 256);
  s.lists = upload(pointers_to(upload(std::vector<int>(96 * 256)), 96, 256));
  s.source = allocate<int>(96 * 256);
  s.energy = allocate<float>(96);
  std::printf("  select 96 x 256 of 2048: %.1f us\n",
              time_of(8, [&](int, cudaStream_t stream) { CHECK(select(s, stream)); }));
  auto* rows = allocate<__nv_bfloat16>(int64_t{96} * 256 * 2048);
  std::printf("  gather 96 x 256 of 2048: %.1f us\n", time_of(8, [&](int, cudaStream_t stream) {
                CHECK(gather_rows(arena, s.indices, 96 * 256, 2048, rows, stream));
              }));
}

}  // namespace

int main(int argc, char** argv) {
  const auto is = [&](const char* what) { return argc > 1 && std::strcmp(argv[1], what) == 0; };
  if (is("time")) {
    time_all();
  } else if (is("one") && argc >= 6) {
    const int count = std::atoi(argv[2]);
    const int64_t rows = std::atoll(argv[3]), columns = std::atoll(argv[4]);
    auto* arena = allocate<__nv_bfloat16>(count * rows * columns);
    fill<<<4096, 256>>>(arena, count * rows * columns);
    const auto t = timed(arena, count, rows, columns, std::strcmp(argv[5], "right") == 0);
    for (int i = 0; i < 3; ++i) t.run(nullptr);
    CHECK(cudaDeviceSynchronize());
    if (argc > 6) {
      std::printf("%.1f us\n", time_of(1, [&](int, cudaStream_t stream) { t.run(stream); }));
    }
  } else {
    check(argc > 2 ? std::atoll(argv[2]) : 8192);
    std::printf(failures == 0 ? "all good\n" : "%d FAILURES\n", failures);
  }
  return failures != 0;
}
