// SPDX-License-Identifier: MIT
#pragma once

#include <gtest/gtest.h>
#include <ounce/core/check.h>

#include <string>

// `statement` must throw ounce::Error of this Fault, on one line, with `part` in its text.
#define EXPECT_OUNCE_ERROR(statement, expected_fault, part)                                      \
  do {                                                                                           \
    try {                                                                                        \
      static_cast<void>(statement);                                                              \
      ADD_FAILURE() << #statement " throws nothing";                                             \
    } catch (const ::ounce::Error& error) {                                                      \
      const std::string text = error.what_without_backtrace();                                   \
      EXPECT_EQ(static_cast<int>(error.fault()), static_cast<int>(::ounce::Fault::expected_fault)) \
          << text;                                                                               \
      EXPECT_NE(text.find(part), std::string::npos) << text;                                     \
      EXPECT_EQ(text.find('\n'), std::string::npos) << "more than one line: " << text;           \
    }                                                                                            \
  } while (false)
