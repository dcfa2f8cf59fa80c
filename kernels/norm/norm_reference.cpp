// SPDX-License-Identifier: MIT
namespace ounce {}
