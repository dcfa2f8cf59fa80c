// SPDX-License-Identifier: MIT
#include <dlfcn.h>
#include <ounce/core/check.h>
#include <ounce/core/registry.h>

#include <algorithm>

namespace ounce {

namespace {

std::vector<std::unique_ptr<RegistryStore>>& stores() {
  static std::vector<std::unique_ptr<RegistryStore>> all;
  return all;
}

}  // namespace

void RegistryStore::add(EntryInfo info, Factory factory) {
  OUNCE_CHECK(!info.name.empty(), "[registry] a ", kind_, " needs a name");
  OUNCE_CHECK(!contains(info.name), "[registry] the ", kind_, " '", info.name,
              "' is registered already");
  auto defaults = Options::parse(info.defaults, kind_ + " '" + info.name + "'");
  OUNCE_CHECK(!defaults.contains("name"), "[registry] ", kind_, " '", info.name,
              "': the key 'name' is taken by the registry");
  for (const auto& [key, kind] : info.parts) {
    const auto* part = defaults.find(key);
    OUNCE_CHECK(part != nullptr, "[registry] ", kind_, " '", info.name, "': the part '", key,
                "' has no default");
    // A name alone is a table that holds it: over() knows parts by their tables.
    if (part->is_text()) defaults.set(key + ".name", part->text());
  }
  entries_.push_back({std::move(info), std::move(defaults), std::move(factory)});
}

std::vector<std::string> RegistryStore::names() const {
  std::vector<std::string> result;
  for (const auto& entry : entries_) result.push_back(entry.info.name);
  return result;
}

bool RegistryStore::contains(std::string_view name) const {
  return std::any_of(entries_.begin(), entries_.end(),
                     [&](const Entry& entry) { return entry.info.name == name; });
}

const EntryInfo& RegistryStore::info(std::string_view name) const { return entry(name, "").info; }

const RegistryStore::Entry& RegistryStore::entry(std::string_view name,
                                                 std::string_view where) const {
  for (const auto& entry : entries_) {
    if (entry.info.name == name) return entry;
  }
  fail(Fault::kUsage, "[registry] ", where, where.empty() ? "" : ": ", "no ", kind_, " is called '",
       name, "'", nearest_hint(name, names()));
}

Value RegistryStore::resolve(const Value& spec, std::string_view where) const {
  if (spec.is_array()) {
    Value::Array resolved;
    for (const auto& item : spec.array()) resolved.push_back(resolve(item, where));
    return resolved;
  }
  OUNCE_CHECK(spec.is_text() || (spec.is_table() && spec.table().contains("name")), "[config] ",
              where, ": expected the name of a ", kind_, " or a table with a name, got ",
              spec.to_toml());
  const std::string name = spec.is_text() ? spec.text() : spec.table().text("name");
  const auto& found = entry(name, where);
  Options given;
  if (spec.is_table()) {
    for (const auto& [key, value] : spec.table().items()) {
      if (key != "name") given.set(key, value);
    }
  }
  auto merged = given.over(found.defaults, std::string(where) + " (" + kind_ + " '" + name + "')");
  for (const auto& [key, kind] : found.info.parts) {
    merged.set(key,
               registry_store(kind).resolve(*merged.find(key), std::string(where) + "." + key));
  }
  Options result;
  result.set("name", name);
  for (const auto& [key, value] : merged.items()) result.set(key, value);
  return result;
}

std::shared_ptr<void> RegistryStore::make(const Value& spec, const void* context) const {
  const auto resolved = resolve(spec, kind_);
  OUNCE_CHECK(resolved.is_table(), "[registry] expected one ", kind_, ", got ", resolved.to_toml());
  const auto& options = resolved.table();
  return entry(options.text("name"), kind_).factory(options, context);
}

RegistryStore& registry_store(std::string_view kind) {
  for (const auto& store : stores()) {
    if (store->kind() == kind) return *store;
  }
  return *stores().emplace_back(std::make_unique<RegistryStore>(std::string(kind)));
}

std::vector<RegistryStore*> registry_stores() {
  std::vector<RegistryStore*> result;
  for (const auto& store : stores()) result.push_back(store.get());
  return result;
}

void load_plugin(const std::string& path) {
  // A name without a slash would be searched in the system's folders.
  const auto file = path.find('/') == std::string::npos ? "./" + path : path;
  void* library = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
  OUNCE_CHECK(library != nullptr, "[plugin] cannot load '", path, "': ", dlerror());
  auto* entry_point = reinterpret_cast<void (*)()>(dlsym(library, "ounce_register"));
  OUNCE_CHECK(entry_point != nullptr, "[plugin] '", path,
              "' has no function extern \"C\" void ounce_register(); define it");
  entry_point();
}

}  // namespace ounce
