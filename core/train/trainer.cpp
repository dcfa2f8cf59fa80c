// SPDX-License-Identifier: MIT
#include <ounce/ckpt/checkpointer.h>
#include <ounce/ckpt/init_from.h>
#include <ounce/core/check.h>
#include <ounce/core/data/permutation.h>
#include <ounce/core/device.h>
#include <ounce/core/registry.h>
#include <ounce/core/train/append_file.h>
#include <ounce/core/train/config.h>
#include <ounce/core/train/format.h>
#include <ounce/core/train/memory_plan.h>
#include <ounce/core/train/run_checkpoints.h>
#include <ounce/core/train/run_folder.h>
#include <ounce/core/train/run_report.h>
#include <ounce/core/train/schedule.h>
#include <ounce/core/train/session.h>
#include <ounce/core/train/signals.h>
#include <ounce/core/train/sinks.h>
#include <ounce/core/train/step_log.h>
#include <ounce/core/train/trainer.h>
#include <torch/torch.h>

#include <cmath>
#include <filesystem>
#include <limits>

namespace ounce {

namespace {

constexpr int kMostSkippedInARow = 10;

void refuse_many_ranks() {
  const char* world = std::getenv("WORLD_SIZE");
  OUNCE_CHECK(world == nullptr || std::string(world) == "1" || std::string(world).empty(),
              "[train] WORLD_SIZE=", world,
              ": this version trains in one process; unset WORLD_SIZE");
}

// What the loop itself has to remember.
struct Progress : Stateful {
  int64_t step = 0;  // steps done
  int64_t seed = 0;  // with `step`, the state of every generator (take_step)
  int64_t tokens = 0;
  int64_t skipped_in_row = 0;

  void visit_state(StateVisitor& visitor) override {
    visitor.integer("step", step);
    visitor.integer("generator_seed", seed);
    visitor.integer("tokens", tokens);
    visitor.integer("skipped_in_row", skipped_in_row);
  }
};

}  // namespace

struct Trainer::Impl {
  Impl(TrainerOptions options_, std::ostream& out_) : options(std::move(options_)), out(out_) {}

  TrainResult run();

  void open_run();
  void resume();
  void start();
  void finish();
  void train();
  void take_step();
  void settle();
  void report_step(const StepNumbers& numbers);
  void evaluate(bool final);
  void sample();
  void save(bool last);
  void announce(const std::vector<RunCheckpoints::News>& news, bool last);
  bool due(const char* interval) const {
    const auto every = options.config.integer(interval);
    return every > 0 && progress.step % every == 0;
  }
  void say(const std::string& line) {
    if (!options.quiet) out << line << std::endl;
  }
  void warn_of(const std::vector<std::string>& rejected) {
    for (const auto& checkpoint : rejected) {
      out << "WARNING: passed over a damaged checkpoint: " << checkpoint << std::endl;
    }
  }
  void write(const char* type, int64_t step, std::vector<Record::Field> fields) {
    for (const auto& sink : sinks) sink->write({type, step, fields});
  }
  std::vector<std::pair<std::string, Stateful*>> objects() {
    return {{"", session->learner.get()},
            {"state/data", session->dataset.get()},
            {"state/train", &progress}};
  }

  TrainerOptions options;
  std::ostream& out;
  std::optional<RunFolder> folder;
  std::vector<std::string> resume_from;  // where checkpoints to resume may lie; empty = fresh
  std::unique_ptr<Session> session;
  std::shared_ptr<Schedule> schedule;
  std::optional<RunCheckpoints> checkpoints;
  std::vector<std::unique_ptr<MetricsSink>> sinks;
  Progress progress;
  std::optional<MemoryPlan> plan;
  std::optional<PendingStep> pending;
  StepClock clock;
  int64_t lap_start = 0;  // first step of the timing lap
  int64_t stop = 0;
  int64_t valid_step = -1;  // step of the last evaluation
  double valid_loss = std::nan("");
  double best_valid_loss = std::numeric_limits<double>::infinity();
  double peak_flops = 0;  // of the device; 0 = not known
};

// Finds the run to resume, or makes sure that a new one has a place, before anything expensive is
// built. Nothing is written.
void Trainer::Impl::open_run() {
  if (options.resume == "none") return RunFolder::check_free(options.out);
  namespace fs = std::filesystem;
  if (options.resume == "auto") {
    folder = options.out.empty() ? RunFolder::newest(options.name) : RunFolder::open(options.out);
    resume_from = folder->checkpoints(folder->config());
  } else if (fs::exists(fs::path(options.resume) / "config.toml")) {
    folder = RunFolder::open(options.resume);
    resume_from = folder->checkpoints(folder->config());
    std::error_code error;
    OUNCE_CHECK(options.out.empty() || fs::equivalent(options.out, options.resume, error),
                "[train] --resume ", options.resume,
                " goes on in that folder; leave --out away, or resume one of its checkpoints");
  } else {
    // A checkpoint by its own path: its run goes on in --out.
    OUNCE_CHECK(!options.out.empty(), "[train] --resume ", options.resume,
                " is not a run folder; say with --out where the run goes on");
    resume_from = {options.resume};
    if (!fs::exists(fs::path(options.out) / "config.toml")) {
      return RunFolder::check_free(options.out);
    }
    folder = RunFolder::open(options.out);
  }
  const auto changes = forbidden_changes(folder->config(), options.config);
  OUNCE_CHECK(changes.empty(), "[train] '", folder->path(), "' was started with other settings (",
              c10::Join(", ", changes),
              "); a resumed run may change only intervals, checkpoint settings and device");
}

void Trainer::Impl::resume() {
  const auto report = ckpt::load_checkpoint(resume_from, objects());
  warn_of(report.rejected);
  for (const auto& root : resume_from) {
    if (resume_from.size() > 1 && !std::filesystem::exists(root)) continue;
    for (const auto& earlier : ckpt::list_checkpoints(root)) {
      const auto loss = earlier.metrics.find("val_loss");
      if (loss != earlier.metrics.end()) best_valid_loss = std::fmin(best_valid_loss, loss->second);
    }
  }
  // Saving the step that is there already would say nothing new.
  if (checkpoints && resume_from == folder->checkpoints(options.config)) {
    checkpoints->set_durable(progress.step);
  }
  say("resumed from " + report.info.path + " at step " + std::to_string(progress.step));
}

void Trainer::Impl::start() {
  refuse_many_ranks();
  count_cpu_memory();
  const auto device = choose_device(options.device);
  open_run();
  const auto& config = options.config;
  session = std::make_unique<Session>(config, device);
  const auto state = session->learner->state_bytes();
  check_fits(state.gradients + state.optimizer, "gradients and optimizer state", device);
  peak_flops = device_facts(device).peak_bf16_flops;
  const auto horizon = config.positive("run.steps");
  schedule = registry<Schedule>().make(*config.find("optimizer.schedule"), {.steps = horizon});
  progress.seed = config.integer("run.seed");
  stop = options.stop_after.value_or(horizon);
  if (config.integer("run.sample_tokens") > 0)
    session->prompt_tokens(config.text("run.sample_prompt"));
  if (config.flag("run.plan") || options.dry_run) {
    const auto parts = config.positive("data.accumulate");
    const auto rows = config.positive("data.batch") / parts;
    plan = measure_memory_plan(*session->learner,
                               slice_rows(session->dataset->train_batch(0), 0, rows), parts > 1,
                               device);
  }
  // After the plan, whose passes may move what a part of the model keeps.
  if (!options.init_from.empty()) {
    const auto report = ckpt::load_weights(options.init_from, *session->model, options.init_map);
    warn_of(report.rejected);
    say("initial weights from " + options.init_from + ": " + report.summary());
  }
  // A run that there is already is locked and swept up before anything of it is read; a new one is
  // made when nothing else can fail.
  if (folder && !options.dry_run) checkpoints.emplace(config, folder->path());
  if (!resume_from.empty()) resume();
  if (!folder && !options.dry_run) {
    folder = RunFolder::create(options.out, options.name, config);
    checkpoints.emplace(config, folder->path());
  }
  if (checkpoints) {
    session->learner->before_update(checkpoints->gate());
    checkpoints->prepare(objects());
  }
  for (const auto& line : start_block(*session, plan, progress.step, stop)) say(line);
  if (options.dry_run) return;
  if (!(folder->config() == config)) folder->write_config(config);
  if (!options.quiet) sinks.push_back(console_sink(out));
  sinks.push_back(jsonl_sink(folder->file("metrics.jsonl"), progress.step));
  sinks.push_back(tensorboard_sink(folder->path(), resume_from.empty() ? -1 : progress.step));
  write("config", progress.step, config_record(*session, plan));
}

void Trainer::Impl::take_step() {
  const auto& config = options.config;
  // The randomness of a step depends on nothing before it, so evaluation, samples and resuming
  // cannot change it.
  seed_everything(
      data::mix64(static_cast<uint64_t>(progress.seed), static_cast<uint64_t>(progress.step)));
  const auto batch = session->dataset->next_train_batch();
  const auto parts = config.integer("data.accumulate");
  const auto rows = batch.tokens.size(0) / parts;
  std::vector<data::Batch> micro_batches;
  for (int64_t i = 0; i < parts; ++i) {
    micro_batches.push_back(parts == 1 ? batch : slice_rows(batch, i * rows, (i + 1) * rows));
  }
  const auto lr = config.number("optimizer.lr") * schedule->factor(progress.step);
  StepControl control;
  control.lr = at::full({}, lr, at::TensorOptions(at::kFloat).device(session->device));
  const auto report = session->learner->step(micro_batches, control);
  ++progress.step;
  progress.tokens += batch.tokens.numel();
  // The step before this one has finished by now, or soon will: its numbers cost no waiting.
  PendingStep next(progress.step, report);
  settle();
  pending.emplace(std::move(next));
  // A CPU has finished it already.
  if (session->device.is_cpu()) settle();
}

// Reads the numbers of the step that is still in flight.
void Trainer::Impl::settle() {
  if (!pending) return;
  const auto numbers = pending->wait();
  pending.reset();
  progress.skipped_in_row = numbers.skipped ? progress.skipped_in_row + 1 : 0;
  if (numbers.skipped) {
    if (progress.skipped_in_row == kMostSkippedInARow) announce(checkpoints->wait(), false);
    out << "WARNING: step " << numbers.step << " was not finite (loss " << numbers.loss << ", norm "
        << numbers.norm << "): skipped, nothing changed" << std::endl;
    OUNCE_CHECK_AS(
        Fault::kProblem, progress.skipped_in_row < kMostSkippedInARow, "[train] ",
        kMostSkippedInARow, " steps in a row were not finite, up to step ", numbers.step,
        "; lower optimizer.lr, or look at the data; ",
        checkpoints->durable_step() < 0
            ? "there is no checkpoint yet"
            : "the last checkpoint is step " + std::to_string(checkpoints->durable_step()));
  }
  report_step(numbers);
}

void Trainer::Impl::report_step(const StepNumbers& numbers) {
  const bool first = lap_start == 0;
  if (first) {
    // The first step of a sitting pays for start-up: keep it out of the averages.
    clock.drop();
    lap_start = numbers.step;
  }
  if (numbers.step % options.config.integer("run.log_every") != 0 && numbers.step != stop &&
      !first) {
    return;
  }
  const auto& config = options.config;
  const auto lr = config.number("optimizer.lr") * schedule->factor(numbers.step - 1);
  std::vector<Record::Field> fields = {{"loss", numbers.loss}, {"norm", numbers.norm}, {"lr", lr}};
  for (const auto& [name, value] : numbers.measured) fields.emplace_back(name, value);
  const auto steps = numbers.step - lap_start;
  if (steps > 0) {
    const double seconds = clock.lap() / static_cast<double>(steps);
    const auto batch = config.integer("data.batch"), length = config.integer("data.sequence");
    fields.emplace_back("ms", seconds * 1e3);
    fields.emplace_back("tok_s", static_cast<double>(batch * length) / seconds);
    if (peak_flops > 0)
      fields.emplace_back("mfu", session->learner->flops(batch, length) / seconds / peak_flops);
    fields.emplace_back("eta_s", seconds * static_cast<double>(stop - numbers.step));
    lap_start = numbers.step;
  }
  fields.emplace_back("mem", memory_use(session->device).peak);
  fields.emplace_back("steps", stop);
  if (const auto saving = checkpoints->in_flight()) {
    fields.emplace_back("ckpt_step", saving->first);
    fields.emplace_back("ckpt_written", saving->second);
  } else if (checkpoints->durable_step() >= 0) {
    fields.emplace_back("ckpt_step", checkpoints->durable_step());
  }
  write("train", numbers.step, std::move(fields));
}

void Trainer::Impl::evaluate(bool final) {
  settle();
  clock.pause();
  const auto batches =
      options.config.integer(final ? "run.final_eval_batches" : "run.eval_batches");
  const auto begin = std::chrono::steady_clock::now();
  // A signal ends the final evaluation, which can be long, as it ends a step.
  const auto loss = session->evaluate(batches, [] { return SignalGuard::received() != nullptr; });
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  if (loss) {
    valid_loss = *loss;
    valid_step = progress.step;
    best_valid_loss = std::fmin(best_valid_loss, valid_loss);
    write("eval", progress.step,
          {{"val_loss", valid_loss},
           {"best", best_valid_loss},
           {"bits", valid_loss / std::log(2.0)},
           {"seconds", seconds.count()}});
  }
  clock.start();
}

void Trainer::Impl::sample() {
  settle();
  clock.pause();
  const auto& config = options.config;
  const auto text = session->sample(config.text("run.sample_prompt"),
                                    {.tokens = config.integer("run.sample_tokens"),
                                     .temperature = config.number("run.sample_temperature"),
                                     .top_k = config.integer("run.sample_top_k"),
                                     .seed = static_cast<uint64_t>(progress.seed)});
  write("sample", progress.step, {{"text", printable(text)}});
  AppendFile(folder->file("samples.txt"), 0)
      .append("=== step " + std::to_string(progress.step) + "\n" + text + "\n");
  clock.start();
}

// Begins to save; training goes on while it is written. The last save of a run is waited for, and
// goes to every level.
void Trainer::Impl::save(bool last) {
  settle();
  clock.pause();
  if (last) announce(checkpoints->wait(), last);
  if (!checkpoints->has(progress.step)) {
    ckpt::SaveOptions with{.notes = {{"config", options.config.to_toml()},
                                     {"command", options.command},
                                     {"torch", TORCH_VERSION}},
                           .all_levels = last};
    if (valid_step == progress.step && std::isfinite(valid_loss)) {
      with.metrics["val_loss"] = valid_loss;
    }
    checkpoints->save(progress.step, objects(), with);
  }
  if (last) {
    announce(checkpoints->wait(), last);
    checkpoints->finish();
    announce({}, last);
  }
  clock.start();
}

// What became of saves. Training goes on where a disk that is full for a while does not take one;
// the last save of a run is not so lucky.
void Trainer::Impl::announce(const std::vector<RunCheckpoints::News>& news, bool last) {
  for (const auto& item : news) {
    if (!item.report) {
      if (last && item.step == progress.step) fail(item.fault, item.error);
      out << "WARNING: step " << item.step << " was not saved, training goes on: " << item.error
          << std::endl;
      continue;
    }
    const auto& report = *item.report;
    write("ckpt", item.step,
          {{"seconds", report.seconds},
           {"bytes", report.bytes},
           {"gb_s", static_cast<double>(report.bytes) / report.seconds / 1e9},
           {"captured_s", report.captured},
           {"blocked_ms", (report.blocked + report.stalled) * 1e3},
           {"retries", report.retries}});
  }
  for (const auto& warning : checkpoints->warnings()) out << "WARNING: " << warning << std::endl;
}

void Trainer::Impl::train() {
  clock.start();
  while (progress.step < stop && SignalGuard::received() == nullptr) {
    take_step();
    if (progress.step == stop) break;
    if (due("run.eval_every")) evaluate(false);
    if (due("run.sample_every")) sample();
    if (checkpoints->due(progress.step)) save(false);
    announce(checkpoints->poll(), false);
  }
  settle();
}

void Trainer::Impl::finish() {
  if (SignalGuard::received() == nullptr) evaluate(true);
  save(true);
  if (SignalGuard::received() == nullptr && options.config.integer("run.sample_tokens") > 0)
    sample();
}

TrainResult Trainer::Impl::run() {
  const SignalGuard signals;
  try {
    start();
    if (options.dry_run) return {};
    train();
    finish();
  } catch (const c10::Error& error) {
    if (!is_out_of_memory(error)) throw;
    if (!plan && session) plan = MemoryPlan{.state = session->learner->state_bytes()};
    if (plan) {
      for (const auto& line : plan->table()) out << line << "\n";
      for (const auto& line : plan->remedies(options.config.integer("data.accumulate"))) {
        out << "  try " << line << "\n";
      }
    }
    fail(Fault::kProblem, "[train] out of memory at step ", progress.step, "; ",
         first_line(error.what_without_backtrace()));
  }
  const auto shown = valid_step == progress.step ? valid_loss : std::nan("");
  for (const auto& line : end_block(*session, plan, shown)) out << line << std::endl;
  const auto* signal = SignalGuard::received();
  if (signal != nullptr) out << signal << ": saved step " << progress.step << std::endl;
  out << "resume: ./ounce train --resume auto --out " << shell_quoted(folder->path()) << " --steps "
      << (progress.step < stop ? stop : 2 * stop) << options.resume_flags << std::endl;
  return {.step = progress.step,
          .valid_loss = valid_loss,
          .best_valid_loss = best_valid_loss,
          .folder = folder->path(),
          .interrupted = signal != nullptr};
}

Trainer::Trainer(TrainerOptions options, std::ostream& out)
    : impl_(std::make_unique<Impl>(std::move(options), out)) {}
Trainer::~Trainer() = default;

TrainResult Trainer::run() { return impl_->run(); }

}  // namespace ounce
