// SPDX-License-Identifier: MIT
#include <ounce/ckpt/snapshot.h>
#include <ounce/core/check.h>
#include <torch/torch.h>

#include <map>
#include <optional>
#include <set>
#include <tuple>

namespace ounce::ckpt {
namespace {

constexpr std::pair<at::ScalarType, const char*> kNames[] = {
    {at::kFloat, "float32"},
    {at::kDouble, "float64"},
    {at::kHalf, "float16"},
    {at::kBFloat16, "bfloat16"},
    {at::kByte, "uint8"},
    {at::kChar, "int8"},
    {at::kShort, "int16"},
    {at::kInt, "int32"},
    {at::kLong, "int64"},
    {at::kUInt16, "uint16"},
    {at::kUInt32, "uint32"},
    {at::kUInt64, "uint64"},
    {at::kBool, "bool"},
    {at::kComplexFloat, "complex64"},
    {at::kComplexDouble, "complex128"},
    {at::kFloat8_e4m3fn, "float8_e4m3fn"},
    {at::kFloat8_e5m2, "float8_e5m2"},
    {at::kFloat8_e4m3fnuz, "float8_e4m3fnuz"},
    {at::kFloat8_e5m2fnuz, "float8_e5m2fnuz"}};

const char* class_name(StateClass cls) {
  return cls == StateClass::kStep ? "step" : cls == StateClass::kForward ? "forward" : "host";
}

}  // namespace

std::string dtype_name(at::ScalarType dtype) {
  for (const auto& [type, name] : kNames) {
    if (type == dtype) return name;
  }
  return "";
}

at::ScalarType dtype_of_name(const std::string& name) {
  for (const auto& [type, known] : kNames) {
    if (name == known) return type;
  }
  return at::ScalarType::Undefined;
}

class Snapshot::Collector : public StateVisitor {
 public:
  explicit Collector(Snapshot& snapshot) : snapshot_(snapshot) {}

  void tensor(std::string_view name, at::Tensor& value, StateClass cls) override {
    const auto full = new_name(name);
    OUNCE_CHECK(value.defined(), "[checkpoint] expected a tensor at '", full,
                "', got an undefined one; create it before it is presented");
    OUNCE_CHECK(value.layout() == at::kStrided && !value.is_meta() && !value.is_quantized(),
                "[checkpoint] expected a dense tensor with memory at '", full, "', got ",
                value.layout(), " on ", value.device());
    const auto dtype = dtype_name(value.scalar_type());
    OUNCE_CHECK(!dtype.empty(), "[checkpoint] tensor '", full, "' of dtype ", value.scalar_type(),
                " cannot be stored");
    OUNCE_CHECK(value.dim() <= static_cast<int64_t>(kMostDimensions), "[checkpoint] tensor '", full,
                "' has ", value.dim(), " dimensions, more than 32");
    TensorRecord record;
    record.name = full;
    record.dtype = dtype;
    record.state_class = class_name(cls);
    record.shape = value.sizes().vec();
    if (cls != StateClass::kHost && value.numel() > 0) {
      const auto [first, is_new] = seen_.emplace(
          std::make_tuple(value.const_data_ptr(), value.sizes().vec(), value.strides().vec(), dtype,
                          value.is_conj(), value.is_neg()),
          full);
      if (!is_new) record.tied_to = first->second;
    }
    snapshot_.records_.push_back(std::move(record));
    snapshot_.tensors_.push_back(value.detach());
  }

  void integer(std::string_view name, int64_t& value) override { scalar(name, value); }
  void number(std::string_view name, double& value) override { scalar(name, value); }
  void text(std::string_view name, std::string& value) override { scalar(name, value); }
  bool loading() const override { return false; }

 private:
  std::string new_name(std::string_view name) {
    auto full = full_name(name);
    const auto problem = name_problem(full);
    OUNCE_CHECK(problem.empty(), "[checkpoint] the name '", full, "' ", problem, "; rename it");
    OUNCE_CHECK(names_.insert(full).second, "[checkpoint] the name '", full,
                "' is presented twice; give each state a name of its own");
    return full;
  }

  void scalar(std::string_view name, Scalar value) {
    snapshot_.scalars_.emplace(new_name(name), std::move(value));
  }

  using Memory = std::tuple<const void*, std::vector<int64_t>, std::vector<int64_t>, std::string,
                            bool, bool>;  // the views that resolve_conj and resolve_neg make real
  Snapshot& snapshot_;
  std::set<std::string> names_;
  std::map<Memory, std::string> seen_;
};

Snapshot::Snapshot(const Objects& objects) {
  Collector collector(*this);
  for (const auto& [prefix, object] : objects) {
    OUNCE_CHECK(object != nullptr, "[checkpoint] expected an object at '", prefix, "', got null");
    std::optional<StateVisitor::Scope> scope;
    if (!prefix.empty()) scope.emplace(collector, prefix);
    object->visit_state(collector);
  }
}

void Snapshot::materialize() {
  const torch::NoGradGuard guard;
  shared_.assign(tensors_.size(), true);
  for (size_t i = 0; i < tensors_.size(); ++i) {
    if (!records_[i].tied_to.empty()) continue;
    auto& tensor = tensors_[i];
    const auto& cls = records_[i].state_class;
    const bool host = cls == class_name(StateClass::kHost);
    const bool plain = tensor.is_contiguous() && !tensor.is_conj() && !tensor.is_neg();
    if (plain && !host && cls != class_name(StateClass::kForward)) continue;
    tensor = at::empty(tensor.sizes(), tensor.options()
                                           .device(host ? at::Device(at::kCPU) : tensor.device())
                                           .memory_format(at::MemoryFormat::Contiguous))
                 .copy_(tensor);
    shared_[i] = false;
  }
}

}  // namespace ounce::ckpt
