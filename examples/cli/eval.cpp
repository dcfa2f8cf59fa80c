// SPDX-License-Identifier: MIT
#include "run_session.h"

#include <ounce/core/check.h>

#include <cmath>
#include <cstdio>
#include <iostream>

#include "commands.h"

namespace ounce::cli {

void add_eval(CLI::App& app, int& exit_code) {
  auto* command = app.add_subcommand("eval", "validation loss of a run's newest checkpoint");
  auto flags = std::make_shared<RunFlags>();
  auto json = std::make_shared<bool>(false);
  add_run_flags(*command, *flags);
  command->add_flag("--json", *json, "one JSON object");
  command->callback([flags, json, &exit_code] {
    auto session = open_run_session(*flags);
    const auto evaluated = session->evaluate(0);
    OUNCE_CHECK_AS(Fault::kNotFound, evaluated, "[eval] the data has no validation split");
    const double loss = *evaluated;
    std::printf(*json ? "{\"val_loss\": %.17g, \"bits\": %.17g, \"perplexity\": %.17g}\n"
                      : "validation loss %.4f nats a token | %.4f bits | perplexity %.3f\n",
                loss, loss / std::log(2.0), std::exp(loss));
    exit_code = 0;
  });
}

}  // namespace ounce::cli
