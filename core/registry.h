// SPDX-License-Identifier: MIT
// The registry: name -> documentation, defaults and factory, one registry a kind of part. Filled by
// explicit calls (register_builtins() in ounce.h, a user's program, or `extern "C" void
// ounce_register()` of a shared library given with --plugin), never by static initialisers, which
// linkers drop.
//
//   ounce::registry<ounce::Mixer>().add(
//       {.name = "my_mixer", .doc = "what it does", .defaults = "heads = 4  # number of heads"},
//       [](const ounce::Options& o, const ounce::Mixer::Context& c) {
//         return std::make_shared<MyMixer>(c.dim, o.positive("heads"));
//       });
//
// A kind is a class T with `static constexpr const char* kKind` and a nested struct `Context`, what
// its surroundings tell a factory beside the options.
#pragma once

#include <ounce/core/options.h>

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace ounce {

struct EntryInfo {
  std::string name;
  std::string doc;       // one line
  std::string defaults;  // TOML, printed as it is by `ounce modules`: write comments in it
  // Keys whose values are parts themselves, with the kind that resolves each: {{"mixer", "mixer"}}.
  // Each needs a default.
  std::vector<std::pair<std::string, std::string>> parts = {};
};

// Untyped store of one kind. Registration and lookup are not synchronised: register before threads.
class RegistryStore {
 public:
  using Factory = std::function<std::shared_ptr<void>(const Options&, const void* context)>;

  explicit RegistryStore(std::string kind) : kind_(std::move(kind)) {}

  // Throws Fault::kUsage for an empty or duplicate name, or defaults that do not parse.
  void add(EntryInfo info, Factory factory);
  const std::string& kind() const { return kind_; }
  std::vector<std::string> names() const;
  bool contains(std::string_view name) const;
  const EntryInfo& info(
      std::string_view name) const;  // unknown: Fault::kUsage with the nearest name

  // A part as written in a config (a name, or a table with `name`) as a complete table: `name`
  // first, then every default, overridden by what was given; nested parts resolved too. An array
  // resolves to an array. Idempotent. `where` names the place in errors.
  Value resolve(const Value& spec, std::string_view where) const;

  // Builds from a spec that resolve() has completed, or completes it first.
  std::shared_ptr<void> make(const Value& spec, const void* context) const;

 private:
  struct Entry {
    EntryInfo info;
    Options defaults;
    Factory factory;
  };
  const Entry& entry(std::string_view name, std::string_view where) const;

  std::string kind_;
  std::vector<Entry> entries_;
};

// The store of `kind`, made at first use; one for the whole process.
RegistryStore& registry_store(std::string_view kind);
// The stores made so far, in order of first use.
std::vector<RegistryStore*> registry_stores();

// Typed face of a store; holds no state of its own.
template <class T>
class Registry {
 public:
  using Factory = std::function<std::shared_ptr<T>(const Options&, const typename T::Context&)>;

  void add(EntryInfo info, Factory factory) {
    store().add(std::move(info),
                [factory = std::move(factory)](const Options& options, const void* context) {
                  return std::static_pointer_cast<void>(
                      factory(options, *static_cast<const typename T::Context*>(context)));
                });
  }
  std::shared_ptr<T> make(const Value& spec, const typename T::Context& context) const {
    return std::static_pointer_cast<T>(store().make(spec, &context));
  }
  RegistryStore& store() const { return registry_store(T::kKind); }
};

template <class T>
Registry<T> registry() {
  return {};
}

// Loads a shared library and calls its `extern "C" void ounce_register()`. Fault::kUsage when the
// file or the symbol is missing. The library stays loaded until the process ends.
void load_plugin(const std::string& path);

}  // namespace ounce
