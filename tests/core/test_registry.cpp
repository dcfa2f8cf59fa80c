// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>
#include <ounce/core/registry.h>

#include "support/expect_error.h"

namespace ounce {
namespace {

// A kind of part that only these tests know; its objects say what they were built from.
struct Widget {
  static constexpr const char* kKind = "test_widget";
  struct Context {
    int64_t width = 0;
  };
  std::string name;
  int64_t width = 0;
  Options options;
};

struct Gadget {
  static constexpr const char* kKind = "test_gadget";
  struct Context {};
  Options options;
};

std::shared_ptr<Widget> make_widget(const Options& o, const Widget::Context& c) {
  return std::make_shared<Widget>(Widget{o.text("name"), c.width, o});
}

class RegistryTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    registry<Gadget>().add(
        {.name = "spring", .doc = "bounces", .defaults = "force = 1.0  # newton"},
        [](const Options& o, const Gadget::Context&) {
          return std::make_shared<Gadget>(Gadget{o});
        });
    registry<Gadget>().add({.name = "lever", .doc = "lifts", .defaults = "length = 2"},
                           [](const Options& o, const Gadget::Context&) {
                             return std::make_shared<Gadget>(Gadget{o});
                           });
    registry<Widget>().add(
        {.name = "plain", .doc = "a plain one", .defaults = "heads = 4\nscale = 1.0"}, make_widget);
    registry<Widget>().add({.name = "by_name",
                            .doc = "its default gadget is a name",
                            .defaults = "gadget = \"lever\"",
                            .parts = {{"gadget", "test_gadget"}}},
                           make_widget);
    registry<Widget>().add(
        {.name = "nested",
         .doc = "holds a gadget",
         .defaults = "gadget = { name = \"spring\", force = 3.0 }\n[inner]\nx = 1",
         .parts = {{"gadget", "test_gadget"}}},
        make_widget);
  }
  static RegistryStore& store() { return registry_store("test_widget"); }
  static Value spec(const char* toml) { return *Options::parse(toml, "spec").find("spec"); }
};

TEST_F(RegistryTest, ListsWhatItHolds) {
  EXPECT_EQ(store().names(), (std::vector<std::string>{"plain", "by_name", "nested"}));
  EXPECT_TRUE(store().contains("plain"));
  EXPECT_FALSE(store().contains("Plain"));
  EXPECT_EQ(store().info("plain").doc, "a plain one");
  EXPECT_EQ(&registry<Widget>().store(), &store());
  const auto stores = registry_stores();
  EXPECT_NE(std::find(stores.begin(), stores.end(), &store()), stores.end());
}

TEST_F(RegistryTest, RefusesBadEntries) {
  EXPECT_OUNCE_ERROR(store().add({.name = "", .doc = "", .defaults = ""}, {}), kUsage,
                     "needs a name");
  EXPECT_OUNCE_ERROR(store().add({.name = "plain", .doc = "", .defaults = ""}, {}), kUsage,
                     "'plain' is registered already");
  EXPECT_OUNCE_ERROR(store().add({.name = "x", .doc = "", .defaults = "a = "}, {}), kUsage,
                     "test_widget 'x':1");
  EXPECT_OUNCE_ERROR(store().add({.name = "x", .doc = "", .defaults = "name = 'y'"}, {}), kUsage,
                     "'name' is taken");
  EXPECT_OUNCE_ERROR(
      store().add({.name = "x", .doc = "", .defaults = "a = 1", .parts = {{"b", "test_gadget"}}},
                  {}),
      kUsage, "'b'");
  EXPECT_FALSE(store().contains("x")) << "a refused entry leaves nothing behind";
}

TEST_F(RegistryTest, UnknownNamesShowTheNearest) {
  EXPECT_OUNCE_ERROR(store().info("plian"), kUsage, "did you mean 'plain'?");
  EXPECT_OUNCE_ERROR(store().resolve("qqqqqqqqqqq", "model.mixer"), kUsage, "model.mixer");
  EXPECT_OUNCE_ERROR(store().resolve("qqqqqqqqqqq", "model.mixer"), kUsage,
                     "known: plain, by_name, nested");
}

TEST_F(RegistryTest, ResolvesANameToItsDefaults) {
  const auto resolved = store().resolve("plain", "here");
  EXPECT_EQ(resolved.to_toml(), "{ name = \"plain\", heads = 4, scale = 1.0 }");
}

TEST_F(RegistryTest, ResolvesOverridesStrictly) {
  const auto resolved = store().resolve(spec("spec = { scale = 2, name = 'plain' }"), "here");
  EXPECT_EQ(resolved.to_toml(), "{ name = \"plain\", heads = 4, scale = 2.0 }");
  EXPECT_OUNCE_ERROR(store().resolve(spec("spec = { name = 'plain', haeds = 1 }"), "model.mixer"),
                     kUsage,
                     "unknown key 'haeds' in model.mixer (test_widget 'plain'); did you mean");
  EXPECT_OUNCE_ERROR(store().resolve(spec("spec = { name = 'plain', heads = 1.5 }"), "m"), kUsage,
                     "expected an integer");
  EXPECT_OUNCE_ERROR(store().resolve(spec("spec = { heads = 1 }"), "m"), kUsage,
                     "table with a name");
  EXPECT_OUNCE_ERROR(store().resolve(spec("spec = { name = 3 }"), "m"), kUsage,
                     "expected a string");
  EXPECT_OUNCE_ERROR(store().resolve(Value(3), "m"), kUsage, "the name of a test_widget");
}

TEST_F(RegistryTest, ResolvesNestedParts) {
  EXPECT_EQ(store().resolve("nested", "m").table().number("gadget.force"), 3.0);
  const auto named = store().resolve(spec("spec = { name = 'nested', gadget = 'spring' }"), "m");
  EXPECT_EQ(named.table().number("gadget.force"), 1.0) << "another spec replaces the default one";
  const auto lever = store().resolve(spec("spec = { name = 'nested', gadget = 'lever' }"), "m");
  EXPECT_EQ(lever.table().integer("gadget.length"), 2);
  EXPECT_FALSE(lever.table().contains("gadget.force"));
  EXPECT_EQ(lever.table().integer("inner.x"), 1);
  const auto refined =
      store().resolve(spec("spec = { name = 'nested', gadget = { force = 9 } }"), "m");
  EXPECT_EQ(refined.table().number("gadget.force"), 9.0);
  EXPECT_EQ(refined.table().text("gadget.name"), "spring");
  EXPECT_OUNCE_ERROR(store().resolve(spec("spec = { name = 'nested', gadget = 'springs' }"), "m"),
                     kUsage,
                     "m.gadget: no test_gadget is called 'springs'; did you mean 'spring'?");
  EXPECT_OUNCE_ERROR(
      store().resolve(spec("spec = { name = 'nested', gadget = { name = 'lever', force = 1 } }"),
                      "m"),
      kUsage, "unknown key 'force' in m.gadget");
}

TEST_F(RegistryTest, ResolvesPartsWhoseDefaultIsAName) {
  EXPECT_EQ(store().resolve("by_name", "m").table().integer("gadget.length"), 2);
  const auto other =
      store().resolve(spec("spec = { name = 'by_name', gadget = { name = 'spring' } }"), "m");
  EXPECT_EQ(other.table().number("gadget.force"), 1.0);
  const auto refined =
      store().resolve(spec("spec = { name = 'by_name', gadget = { length = 5 } }"), "m");
  EXPECT_EQ(refined.table().integer("gadget.length"), 5);
}

TEST_F(RegistryTest, ResolvesArrays) {
  const auto resolved =
      store().resolve(spec("spec = ['plain', { name = 'plain', heads = 8 }]"), "m");
  ASSERT_EQ(resolved.array().size(), 2u);
  EXPECT_EQ(resolved.array()[0].table().integer("heads"), 4);
  EXPECT_EQ(resolved.array()[1].table().integer("heads"), 8);
  const auto inside =
      store().resolve(spec("spec = { name = 'nested', gadget = ['spring', 'lever'] }"), "m");
  ASSERT_EQ(inside.table().find("gadget")->array().size(), 2u);
  EXPECT_EQ(inside.table().find("gadget")->array()[1].table().integer("length"), 2);
  EXPECT_OUNCE_ERROR(store().resolve(spec("spec = ['plain', 'x_y_z_w_v']"), "m"), kUsage, "known");
}

TEST_F(RegistryTest, ResolveIsIdempotent) {
  for (const char* toml : {"spec = 'plain'", "spec = 'nested'", "spec = ['nested', 'plain']",
                           "spec = { name = 'nested', gadget = ['lever'] }"}) {
    const auto once = store().resolve(spec(toml), "m");
    EXPECT_TRUE(store().resolve(once, "m") == once) << toml;
    // And what is written into a run folder reads back as the same.
    const auto text = "spec = " + once.to_toml() + "\n";
    EXPECT_TRUE(store().resolve(spec(text.c_str()), "m") == once) << text;
  }
}

TEST_F(RegistryTest, MakesWithOptionsAndContext) {
  const auto made =
      registry<Widget>().make(spec("spec = { name = 'plain', heads = 2 }"), {.width = 32});
  EXPECT_EQ(made->name, "plain");
  EXPECT_EQ(made->width, 32);
  EXPECT_EQ(made->options.integer("heads"), 2);
  EXPECT_EQ(made->options.number("scale"), 1.0);
  EXPECT_OUNCE_ERROR(registry<Widget>().make(spec("spec = ['plain']"), {}), kUsage, "expected one");
}

TEST_F(RegistryTest, StoresStayWhereTheyAreWhenMoreAreMade) {
  auto* before = &store();
  for (int i = 0; i < 100; ++i) registry_store("test_kind_" + std::to_string(i));
  EXPECT_EQ(&store(), before);
}

TEST(Plugin, MissingFilesAndSymbolsAreNamed) {
  EXPECT_OUNCE_ERROR(load_plugin("no_such_library.so"), kUsage, "no_such_library.so");
  EXPECT_OUNCE_ERROR(load_plugin("libm.so.6"), kUsage, "libm.so.6");
}

}  // namespace
}  // namespace ounce
