// SPDX-License-Identifier: MIT
// Errors are part of the interface: tests say which fault they are and what they name.
#pragma once

#include <gtest/gtest.h>
#include <ounce/core/check.h>

#include <initializer_list>
#include <string>

namespace ounce::test {

// Expects that `call` throws an ounce::Error of `fault`, on one line, with each of `parts` in it.
template <class Call>
void expect_error(Fault fault, std::initializer_list<std::string> parts, Call call) {
  try {
    call();
  } catch (const Error& error) {
    const std::string what = error.what_without_backtrace();
    EXPECT_EQ(static_cast<int>(error.fault()), static_cast<int>(fault)) << what;
    EXPECT_EQ(what.find('\n'), std::string::npos) << what;
    for (const auto& part : parts) {
      EXPECT_NE(what.find(part), std::string::npos) << "no '" << part << "' in: " << what;
    }
    return;
  }
  ADD_FAILURE() << "nothing was thrown";
}

}  // namespace ounce::test

// The same for one statement and one part.
#define EXPECT_OUNCE_ERROR(statement, expected_fault, part)                        \
  ::ounce::test::expect_error(::ounce::Fault::expected_fault, {std::string(part)}, \
                              [&] { static_cast<void>(statement); })
