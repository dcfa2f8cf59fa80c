// SPDX-License-Identifier: MIT
// `ounce ckpt diff`. Exit code 1 when there is a difference.
#include <ounce/ckpt/restore.h>
#include <torch/torch.h>

#include <bit>
#include <cmath>
#include <iostream>

#include "ckpt_commands.h"

namespace ounce::cli {
namespace {

using namespace ounce::ckpt;

struct Difference {
  std::string name;
  std::string what;
  double largest = NAN;  // of the absolute differences; NAN where there is no such thing
};

double largest_difference(const at::Tensor& a, const at::Tensor& b) {
  const auto dtype = a.is_complex() ? at::kComplexDouble : at::kDouble;
  return a.to(dtype).sub(b.to(dtype)).abs().max().item<double>();
}

void compare_tensor(const StepReader& a, const StepReader& b, const TensorRecord& first,
                    const TensorRecord& second, std::vector<Difference>& found) {
  if (first.dtype != second.dtype || first.shape != second.shape) {
    found.push_back({first.name, c10::str(first.dtype, "[", c10::Join(", ", first.shape), "] and ",
                                          second.dtype, "[", c10::Join(", ", second.shape), "]")});
    return;
  }
  const auto x = read_tensor(a, first), y = read_tensor(b, second);
  const auto bytes = [](const at::Tensor& t) { return t.reshape({-1}).view(at::kByte); };
  if (x.numel() == 0 || at::equal(bytes(x), bytes(y))) return;
  const auto unequal = bytes(x).ne(bytes(y)).view({x.numel(), -1}).any(1).sum().item<int64_t>();
  found.push_back(
      {first.name, c10::str(unequal, " of ", x.numel(), " elements"), largest_difference(x, y)});
}

bool same(const Scalar& a, const Scalar& b) {
  const auto* x = std::get_if<double>(&a);
  const auto* y = std::get_if<double>(&b);
  return x && y ? std::bit_cast<uint64_t>(*x) == std::bit_cast<uint64_t>(*y) : a == b;
}

std::vector<Difference> compare(const StepReader& a, const StepReader& b) {
  std::vector<Difference> found;
  const auto &first = a.manifest(), &second = b.manifest();
  if (first.step != second.step) {
    found.push_back({"step", c10::str(first.step, " and ", second.step)});
  }
  for (const auto& [name, value] : first.scalars) {
    const auto other = second.scalars.find(name);
    if (other == second.scalars.end()) {
      found.push_back({name, "only in the first"});
    } else if (!same(value, other->second)) {
      found.push_back({name, scalar_text(value) + " and " + scalar_text(other->second)});
    }
  }
  for (const auto& [name, value] : second.scalars) {
    if (!first.scalars.contains(name)) found.push_back({name, "only in the second"});
  }
  for (const auto& tensor : first.tensors) {
    const auto* other = b.find(tensor.name);
    if (other == nullptr) {
      found.push_back({tensor.name, "only in the first"});
    } else {
      compare_tensor(a, b, tensor, *other, found);
    }
  }
  for (const auto& tensor : second.tensors) {
    if (a.find(tensor.name) == nullptr) found.push_back({tensor.name, "only in the second"});
  }
  return found;
}

int diff(const std::vector<std::string>& paths, bool as_json) {
  const auto files = posix_file_system();
  const auto first = resolve_step(*files, paths[0]), second = resolve_step(*files, paths[1]);
  return with_faults([&] {
    const StepReader a(files, first), b(files, second);
    const auto found = compare(a, b);
    const auto values = a.manifest().tensors.size() + a.manifest().scalars.size();
    if (as_json) {
      auto list = Json::array();
      for (const auto& item : found) {
        list.push_back(
            {{"name", item.name},
             {"what", item.what},
             {"max_abs", std::isnan(item.largest) ? Json() : number_json(item.largest)}});
      }
      print({{"first", first}, {"second", second}, {"compared", values}, {"differences", list}});
      return found.empty() ? 0 : 1;
    }
    std::cout << first << " and " << second << ": " << values << " values compared, "
              << (found.empty() ? "no difference" : std::to_string(found.size()) + " differ")
              << "\n";
    constexpr size_t kMostShown = 20;
    for (size_t i = 0; i < std::min(found.size(), kMostShown); ++i) {
      std::cout << "  " << found[i].name << ": " << found[i].what;
      if (!std::isnan(found[i].largest)) std::cout << ", largest difference " << found[i].largest;
      std::cout << "\n";
    }
    if (found.size() > kMostShown) {
      std::cout << "  and " << found.size() - kMostShown << " more (--json lists all)\n";
    }
    return found.empty() ? 0 : 1;
  });
}

}  // namespace

void add_ckpt_diff(CLI::App& ckpt, int& exit_code) {
  struct Arguments {
    std::vector<std::string> paths;
    bool json = false;
  };
  auto arguments = std::make_shared<Arguments>();
  auto* command = ckpt.add_subcommand("diff", "compare two steps bit by bit");
  command->add_option("path", arguments->paths, "run folder, checkpoint folder or step folder")
      ->required()
      ->expected(2);
  command->add_flag("--json", arguments->json, "print JSON");
  command->callback([=, &exit_code] { exit_code = diff(arguments->paths, arguments->json); });
}

}  // namespace ounce::cli
