// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>
#include <ounce/core/check.h>
#include <ounce/core/options.h>

#include <cmath>
#include <limits>

#include "support/expect_error.h"
#include "support/temp_dir.h"

namespace ounce {
namespace {

Options parse(const char* toml) { return Options::parse(toml, "test"); }

TEST(Options, ParsesEveryType) {
  const auto o = parse(
      "flag = true\ninteger = -7\nnumber = 2.5e-3\ntext = 'a b'\nlist = [1, 2]\n"
      "[table]\ninner = 'x'\n[table.deep]\nkey = 1_000\n");
  EXPECT_TRUE(o.flag("flag"));
  EXPECT_EQ(o.integer("integer"), -7);
  EXPECT_EQ(o.number("number"), 2.5e-3);
  EXPECT_EQ(o.number("integer"), -7.0);
  EXPECT_EQ(o.text("text"), "a b");
  EXPECT_EQ(o.find("list")->array().size(), 2u);
  EXPECT_EQ(o.text("table.inner"), "x");
  EXPECT_EQ(o.integer("table.deep.key"), 1000);
  EXPECT_EQ(o.table("table").integer("deep.key"), 1000);
  EXPECT_FALSE(o.contains("table.none"));
  EXPECT_FALSE(o.contains("text.inner"));
  EXPECT_FALSE(o.contains(""));
}

TEST(Options, KeepsTheOrderOfTheSource) {
  const auto o = parse("zeta = 1\nalpha = 2\nmiddle = 3\n");
  ASSERT_EQ(o.items().size(), 3u);
  EXPECT_EQ(o.items()[0].first, "zeta");
  EXPECT_EQ(o.items()[1].first, "alpha");
  EXPECT_EQ(o.items()[2].first, "middle");
}

TEST(Options, ErrorsOfTheSourceNameFileAndLine) {
  EXPECT_OUNCE_ERROR(Options::parse("a = 1\nb = \n", "my.toml"), kUsage, "my.toml:2");
  EXPECT_OUNCE_ERROR(parse("a = 1\na = 2\n"), kUsage, "test:2");
  EXPECT_OUNCE_ERROR(parse("day = 2020-01-01\n"), kUsage, "dates and times");
  EXPECT_OUNCE_ERROR(parse("'a.b' = 1\n"), kUsage, "a.b");
  EXPECT_OUNCE_ERROR(parse("'' = 1\n"), kUsage, "empty");
  EXPECT_OUNCE_ERROR(parse("a = 99999999999999999999\n"), kUsage, "test:1");
}

TEST(Options, WrongTypesNameThePath) {
  const auto o = parse("a = 1.5\nb = 'x'\n[t]\nc = true\nn = -1\n");
  EXPECT_OUNCE_ERROR(o.integer("a"), kUsage, "'a': expected an integer, got 1.5");
  EXPECT_OUNCE_ERROR(o.number("b"), kUsage, "'b': expected a number, got \"x\"");
  EXPECT_OUNCE_ERROR(o.flag("b"), kUsage, "'b'");
  EXPECT_OUNCE_ERROR(o.text("t.c"), kUsage, "'t.c'");
  EXPECT_OUNCE_ERROR(o.table("b"), kUsage, "'b'");
  EXPECT_OUNCE_ERROR(o.text("none"), kUsage, "'none' is missing");
  EXPECT_OUNCE_ERROR(o.positive("t.n"), kUsage, "at least 1");
  EXPECT_OUNCE_ERROR(o.non_negative("t.n"), kUsage, "at least 0");
  EXPECT_OUNCE_ERROR(o.number_in("a", 0, 1), kUsage, "[0, 1]");
  EXPECT_OUNCE_ERROR(o.choice("b", {"xx", "yy"}), kUsage, "did you mean 'xx'");
}

TEST(Options, NumbersOutsideOfTheirRangeIncludeNan) {
  const auto o = parse("a = nan\nb = inf\n");
  EXPECT_OUNCE_ERROR(o.number_in("a", 0, 1), kUsage, "expected a number in");
  EXPECT_OUNCE_ERROR(o.number_in("b", 0, 1), kUsage, "expected a number in");
}

TEST(Options, Texts) {
  const auto o = parse("one = 'a'\nmany = ['a', 'b']\nnone = []\nbad = [1]\nworse = 1\n");
  EXPECT_EQ(o.texts("one"), std::vector<std::string>{"a"});
  EXPECT_EQ(o.texts("many"), (std::vector<std::string>{"a", "b"}));
  EXPECT_TRUE(o.texts("none").empty());
  EXPECT_OUNCE_ERROR(o.texts("bad"), kUsage, "'bad'");
  EXPECT_OUNCE_ERROR(o.texts("worse"), kUsage, "'worse'");
}

TEST(Options, SetMakesTables) {
  Options o;
  o.set("model.mixer.heads", 4);
  o.set("model.dim", 8);
  EXPECT_EQ(o.integer("model.mixer.heads"), 4);
  o.set("model.dim", 16);
  EXPECT_EQ(o.integer("model.dim"), 16);
  EXPECT_EQ(o.table("model").items().size(), 2u);
  EXPECT_OUNCE_ERROR(o.set("model.dim.x", 1), kUsage, "not a table");
  for (const char* path : {"", ".", "a.", ".a", "a..b"}) {
    EXPECT_OUNCE_ERROR(o.set(path, 1), kUsage, "empty key");
  }
}

TEST(Options, SetIntoAPartGivenByName) {
  auto o = parse("[model]\nmixer = 'gla'\n");
  o.set("model.mixer.heads", 4);
  EXPECT_EQ(o.text("model.mixer.name"), "gla");
  EXPECT_EQ(o.integer("model.mixer.heads"), 4);
}

TEST(Options, ValuesOfTheCommandLine) {
  EXPECT_EQ(Options::parse_value("3"), Value(3));
  EXPECT_EQ(Options::parse_value("1e-3"), Value(1e-3));
  EXPECT_EQ(Options::parse_value("true"), Value(true));
  EXPECT_EQ(Options::parse_value("cosine"), Value("cosine"));
  EXPECT_EQ(Options::parse_value("'3'"), Value("3"));
  EXPECT_EQ(Options::parse_value(""), Value(""));
  EXPECT_EQ(Options::parse_value("/a/b c.txt"), Value("/a/b c.txt"));
  EXPECT_EQ(Options::parse_value("[1, 2]").array().size(), 2u);
  EXPECT_EQ(Options::parse_value("{ name = 'gla' }").table().text("name"), "gla");
  EXPECT_EQ(Options::parse_value("1\nb = 2"), Value("1\nb = 2"));
  // What parses as a TOML date is not a value here, hence a string.
  EXPECT_EQ(Options::parse_value("2020-01-01"), Value("2020-01-01"));
  // A comment is not part of a value written on a command line.
  EXPECT_EQ(Options::parse_value("a#b"), Value("a#b"));
}

TEST(Options, OverDefaults) {
  const auto defaults =
      parse("heads = 4\nscale = 1.0\nmode = 'a'\nlist = [1]\n[inner]\nx = 1\ny = 2\n");
  const auto o = parse("scale = 2\n[inner]\ny = 5\n").over(defaults, "here");
  EXPECT_EQ(o.integer("heads"), 4);
  EXPECT_TRUE(o.find("scale")->is_number());
  EXPECT_FALSE(o.find("scale")->is_integer()) << "a number's default makes it a number";
  EXPECT_EQ(o.integer("inner.x"), 1);
  EXPECT_EQ(o.integer("inner.y"), 5);
  EXPECT_EQ(o.items().size(), defaults.items().size());
  EXPECT_OUNCE_ERROR(parse("heds = 1\n").over(defaults, "here"), kUsage,
                     "unknown key 'heds' in here; did you mean 'heads'?");
  EXPECT_OUNCE_ERROR(parse("[inner]\nz = 1\n").over(defaults, "here"), kUsage,
                     "unknown key 'z' in here.inner");
  EXPECT_OUNCE_ERROR(parse("heads = 4.5\n").over(defaults, "here"), kUsage, "expected an integer");
  EXPECT_OUNCE_ERROR(parse("heads = '4'\n").over(defaults, "here"), kUsage, "got \"4\"");
  EXPECT_OUNCE_ERROR(parse("scale = true\n").over(defaults, "here"), kUsage, "expected a number");
  EXPECT_OUNCE_ERROR(parse("list = 1\n").over(defaults, "here"), kUsage, "expected an array");
  EXPECT_OUNCE_ERROR(parse("inner = 1\n").over(defaults, "here"), kUsage, "expected a table");
  EXPECT_OUNCE_ERROR(parse("completely_else = 1\n").over(defaults, "here"), kUsage,
                     "known: heads, scale, mode, list, inner");
}

TEST(Options, OpenDefaultsTakeAnything) {
  const auto defaults = parse("list = []\ntable = {}\n");
  const auto o = parse("list = ['a', 1]\n[table]\nany = 1\n").over(defaults, "here");
  EXPECT_EQ(o.find("list")->array().size(), 2u);
  EXPECT_EQ(o.integer("table.any"), 1);
}

TEST(Options, PartDefaults) {
  const auto defaults = parse("mixer = { name = 'gla', heads = 4 }\n");
  EXPECT_EQ(parse("mixer = 'attention'\n").over(defaults, "m").text("mixer"), "attention");
  EXPECT_EQ(parse("mixer = { name = 'x', own = 1 }\n").over(defaults, "m").integer("mixer.own"), 1);
  EXPECT_EQ(
      parse("mixer = ['a', { name = 'b' }]\n").over(defaults, "m").find("mixer")->array().size(),
      2u);
  EXPECT_OUNCE_ERROR(parse("mixer = 3\n").over(defaults, "m"), kUsage, "expected a name");
  EXPECT_OUNCE_ERROR(parse("mixer = [3]\n").over(defaults, "m"), kUsage, "expected a name");
  // `--set model.mixer.heads=2` where the config names no mixer.
  const auto refined = parse("mixer = { heads = 2 }\n").over(defaults, "m");
  EXPECT_EQ(refined.text("mixer.name"), "gla");
  EXPECT_EQ(refined.integer("mixer.heads"), 2);
}

// Text that TOML must quote, numbers at the edges, nesting that sections must not break.
TEST(Options, TomlRoundTrip) {
  Options o;
  o.set("quotes", "say \"hi\" \\ 'x'");
  o.set("controls", std::string("a\nb\tc\x01\x7f\r"));
  o.set("unicode", "Gr\xc3\xbc\xc3\x9f\x65 \xe2\x82\xac \xf0\x9f\x8e\x93");
  o.set("empty", "");
  o.set("looks_like_number", "1e5");
  o.set("big", std::numeric_limits<int64_t>::max());
  o.set("small", std::numeric_limits<int64_t>::min());
  o.set("tenth", 0.1);
  o.set("whole", 3.0);
  o.set("tiny", 5e-324);
  o.set("huge", 1e300);
  o.set("infinite", -std::numeric_limits<double>::infinity());
  o.set("array", Value(Value::Array{1, "x", Value(Value::Array{true})}));
  o.set("empty_array", Value(Value::Array{}));
  o.set("t.a", 1);
  o.set("t.deep.er.b", "c");
  o.set("part.name", "gla");
  o.set("part.inner.name", "deep");
  o.set("tables",
        Value(Value::Array{Value(parse("match = '*x*'\n")), Value(parse("match = 'y'\n"))}));
  o.set("after", 1);
  o.set("empty_table", Value(Options()));
  o.set("key with space", 1);
  o.set("quo\"te", 2);
  const auto text = o.to_toml();
  const auto back = Options::parse(text, "round trip");
  EXPECT_TRUE(back == o) << text << "\nbecame\n" << back.to_toml();
  EXPECT_TRUE(Options::parse(back.to_toml(), "again") == o);
}

TEST(Options, NanRoundTrip) {
  Options o;
  o.set("x", std::nan(""));
  EXPECT_TRUE(std::isnan(Options::parse(o.to_toml(), "nan").number("x")));
}

TEST(Options, ReadFile) {
  EXPECT_OUNCE_ERROR(Options::read_file("/nonexistent/a.toml"), kData, "/nonexistent/a.toml");
  EXPECT_OUNCE_ERROR(Options::read_file("/"), kData, "'/'");
  const test::TempDir folder;
  EXPECT_EQ(Options::read_file(folder.write_file("a.toml", "a = 1\n")).integer("a"), 1);
  EXPECT_TRUE(Options::read_file(folder.write_file("empty.toml", "")).empty());
}

TEST(Options, Comparison) {
  EXPECT_TRUE(parse("a = 1\nb = 2\n") == parse("b = 2\na = 1\n"));
  EXPECT_FALSE(parse("a = 1\n") == parse("a = 1\nb = 2\n"));
  EXPECT_FALSE(parse("a = 1\n") == parse("a = 1.0\n"));
  EXPECT_TRUE(parse("a = [{ x = 1 }]\n") == parse("a = [{ x = 1 }]\n"));
  EXPECT_FALSE(parse("a = [{ x = 1 }]\n") == parse("a = [{ x = 2 }]\n"));
}

TEST(Options, NearestHint) {
  EXPECT_EQ(nearest_hint("adamW", {"adamw", "muon"}), "; did you mean 'adamw'?");
  EXPECT_EQ(nearest_hint("zzzzzz", {"adamw", "muon"}), "; known: adamw, muon");
  EXPECT_EQ(nearest_hint("", {"a"}), "; did you mean 'a'?");
  EXPECT_EQ(nearest_hint("x", {}), "; known: ");
}

}  // namespace
}  // namespace ounce
