# SPDX-License-Identifier: MIT
"""What a training loop pays for a checkpoint: ours beside torch.save and DCP, in one run on one disk.

    python3 tests/bench/peers_ckpt.py [--cells NAME,...] [--saves N] [--folder DIR] [--json FILE]
                                      [--ours build/tests/bench/ounce_bench] [--device D] [--tiny]

A cell is a loop: so much state (fp32 matrices with AdamW moments), so long a forward and backward pass (bf16
matmuls, counted out at the start), a save every so many steps. --ours runs `ounce_bench ckpt --json F` in the
same folder first and adds its rows. Each row has the medians over the saves, and the limits of this machine as
measured in this run; DCP is that of the torch that runs. Each save starts with an idle disk; the interval is cut short once a save is durable, as
the steps behind that are like those without one.

blocked_ms   the call, and by how much the steps until the save is durable exceed the median step without a
             save
wait_ms      where the next save is due before this one is done: the wait for that
durable_s    from the call until done and syncfs() returned: torch.save does not sync, DCP not the folder
extra_rss_mb peak of VmRSS above what it was before the first save
slowdown_*   of the forward and backward pass while the copy to the host lasts, of whole steps after it
item_*_us    one .item() at the end of a forward and backward pass, without a save and (the longest) in a copy
"""
import argparse
import contextlib
import ctypes
import gc
import glob
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from peers import machine

# name: matrices, milliseconds of a forward and backward pass, steps from save to save
CELLS = {
    "50ms-every1": (24, 50, 1),
    "150ms-every10": (24, 150, 10),
    "700ms-every50": (24, 700, 50),
    "large-700ms-every50": (90, 700, 50),
}
BASE_STEPS = 7
LEAST_STEPS = 3  # behind a save, also where it is durable at once
GB = 1e9


class Sizes:
    """Of everything measured; tiny ones try the script out."""

    def __init__(self, tiny):
        self.matrix, self.matmul = (64, 128) if tiny else (4096, 8192)
        self.file_blocks, self.copies = (2, 2) if tiny else (128, 128)  # of 32 MiB
        self.time_share = 0.1 if tiny else 1.0


def now():
    return time.perf_counter()


# -- The limits of this machine ----------------------------------------------------------------------


def copy_rate(device, sizes, to_host):
    """GB/s of pinned copies of 32 MiB one after the other; None without a GPU."""
    if device.type != "cuda":
        return None
    block = 32 << 20
    on_device = torch.empty(block, dtype=torch.uint8, device=device)
    on_host = torch.empty(block, dtype=torch.uint8, pin_memory=True)
    source, target = (on_device, on_host) if to_host else (on_host, on_device)
    taken = []
    for _ in range(3):
        torch.cuda.synchronize()
        start = now()
        for _ in range(sizes.copies):
            target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        taken.append(now() - start)
    return sizes.copies * block / min(taken) / GB


def disk_rates(folder, sizes):
    """GB/s of dd, writing and reading past the page cache; None where the file system cannot."""
    path = os.path.join(folder, "dd")
    rates = []
    for ends in (("if=/dev/zero", f"of={path}", "oflag=direct"), (f"if={path}", "of=/dev/null", "iflag=direct")):
        start = now()
        done = subprocess.run(["dd", *ends, "bs=32M", f"count={sizes.file_blocks}"], capture_output=True)
        rates.append(sizes.file_blocks * (32 << 20) / (now() - start) / GB if done.returncode == 0 else None)
    with contextlib.suppress(OSError):
        os.remove(path)
    return rates


def limits(device, folder, sizes):
    write, read = disk_rates(folder, sizes)
    return {
        "d2h_gb_s": copy_rate(device, sizes, True),
        "h2d_gb_s": copy_rate(device, sizes, False),
        "disk_write_gb_s": write,
        "disk_read_gb_s": read,
    }


def sync_file_system(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if ctypes.CDLL(None).syncfs(descriptor) != 0:
            os.sync()
    finally:
        os.close(descriptor)


def drop_page_cache(path):
    """How cold a file read after this is."""
    os.sync()
    try:
        with open("/proc/sys/vm/drop_caches", "w") as file:
            file.write("3\n")
        return "cold"
    except OSError:
        pass
    if not hasattr(os, "posix_fadvise"):
        return "warm"
    for name in glob.glob(os.path.join(path, "**"), recursive=True, include_hidden=True):
        if os.path.isfile(name):
            with open(name, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return "cold (advised)"


class PeakMemory:
    """Peak of VmRSS over the block, above what it was at its start."""

    def __enter__(self):
        self.before = self.peak = self.now()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()

    def watch(self):
        while not self.over.wait(0.02):
            self.peak = max(self.peak, self.now())

    @staticmethod
    def now():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmRSS"))

    def extra_mb(self):
        return (self.peak - self.before) / 1e6


# -- The loop ----------------------------------------------------------------------------------------


class Loop:
    """Steps of matmuls and a fused AdamW over `matrices` parameters; the state is what is saved."""

    def __init__(self, matrices, milliseconds, device, sizes):
        self.device = device
        n = sizes.matrix
        self.parameters = [torch.nn.Parameter(torch.randn(n, n, device=device)) for _ in range(matrices)]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)
        for parameter in self.parameters:
            parameter.grad = torch.randn_like(parameter) * 1e-3
        self.factor = torch.randn(sizes.matmul, sizes.matmul, device=device).bfloat16()
        self.optimizer.step()
        self.matmuls = 1
        self.forward_backward()  # libraries load
        soak_until, taken = now() + 2 * sizes.time_share, []
        while now() < soak_until or not taken:
            taken.append(self.forward_backward())
        self.matmuls = max(1, round(milliseconds / 1e3 * sizes.time_share / statistics.median(taken)))

    def state(self):
        moments = [self.optimizer.state[parameter] for parameter in self.parameters]
        return {
            "model": {f"w{i}": parameter.data for i, parameter in enumerate(self.parameters)},
            "exp_avg": {f"w{i}": moment["exp_avg"] for i, moment in enumerate(moments)},
            "exp_avg_sq": {f"w{i}": moment["exp_avg_sq"] for i, moment in enumerate(moments)},
        }

    def state_bytes(self):
        return sum(tensor.nbytes for part in self.state().values() for tensor in part.values())

    def finish(self):
        """The compute stream alone: copies of a save run beside it."""
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def forward_backward(self):
        self.finish()
        start = now()
        for _ in range(self.matmuls):
            self.product = torch.mm(self.factor, self.factor)
        self.finish()
        return now() - start

    def step(self, gate=None):
        """Seconds of a step, of its forward and backward pass, and of an .item() behind that."""
        start = now()
        pass_seconds = self.forward_backward()
        item_start = now()
        self.product[0, 0].item()
        item_seconds = now() - item_start
        if gate is not None:
            gate()
        self.optimizer.step()
        self.finish()
        return {"start": start, "step": now() - start, "pass": pass_seconds, "item": item_seconds}


# -- Peers: a save returns what is still to come, and a load reads into the same tensors --------------


class Pending:
    """Futures of an asynchronous save: `copied` before the state may change, `done`."""

    def __init__(self, copied=None, done=None):
        self.copied, self.done = copied, done


def torch_save(state, path):
    os.makedirs(path)
    torch.save(state, os.path.join(path, "state.pt"))
    return Pending()


def torch_load(state, path, device):
    loaded = torch.load(os.path.join(path, "state.pt"), map_location=device, weights_only=True)
    for part, tensors in state.items():
        for name, tensor in tensors.items():
            tensor.copy_(loaded[part][name])


def dcp_save(state, path):
    dcp.save(state, checkpoint_id=path)
    return Pending()


def dcp_async(state, path):
    return Pending(done=dcp.async_save(state, checkpoint_id=path))


def dcp_async_pinned(state, path):
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    # One of its own for each save: in torch 2.11 a second use raises KeyError.
    stager = DefaultStager(
        StagingOptions(
            use_pinned_memory=True, use_shared_memory=False, use_async_staging=True, use_non_blocking_copy=True
        )
    )
    answer = dcp.async_save(state, checkpoint_id=path, async_stager=stager)
    return Pending(answer.staging_completion, answer.upload_completion)


def dcp_load(state, path, device):
    dcp.load(state, checkpoint_id=path)


PEERS = {
    "torch.save": (torch_save, torch_load),
    "DCP save": (dcp_save, dcp_load),
    "DCP async_save": (dcp_async, dcp_load),
    "DCP async_save, pinned stager": (dcp_async_pinned, dcp_load),
}

# -- Measuring ---------------------------------------------------------------------------------------


class Watch:
    """Notes when a save is copied and when it is durable, without the loop's help."""

    def __init__(self, start, pending, path):
        self.start, self.pending, self.path = start, pending, path
        self.copied_at = self.durable_at = self.error = None
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self):
        try:
            if self.pending.copied is not None:
                self.pending.copied.result()
                self.copied_at = now()
            if self.pending.done is not None:
                self.pending.done.result()
            sync_file_system(self.path)
            self.durable_at = now()
        except Exception as error:
            self.error = error

    def join(self):
        self.thread.join()
        if self.error is not None:
            raise self.error


def one_save(loop, save, path, every, base):
    loop.finish()
    start = now()
    pending = save(loop.state(), path)
    call = now() - start
    watch = Watch(start, pending, path)
    gate = None if pending.copied is None else pending.copied.result
    steps = []
    while len(steps) < every and (len(steps) < LEAST_STEPS or watch.thread.is_alive()):
        steps.append(loop.step(gate if not steps else None))
    wait_start = now()
    if pending.done is not None:
        pending.done.result()
    wait = now() - wait_start
    watch.join()
    within = [step for step in steps if step["start"] < watch.durable_at]
    copying = [step for step in within if watch.copied_at is not None and step["start"] < watch.copied_at]
    flushing = [step for step in within if watch.copied_at is None or step["start"] >= watch.copied_at]
    return {
        "blocked_ms": (call + sum(step["step"] - base["step"] for step in within)) * 1e3,
        "wait_ms": wait * 1e3,
        "call_ms": call * 1e3,
        "durable_s": watch.durable_at - start,
        "slowdown_copy_pct": slowdown(copying, "pass", base),
        "slowdown_flush_pct": slowdown(flushing, "step", base),
        "item_copy_us": max((step["item"] for step in copying), default=None),
    }


def slowdown(steps, key, base):
    return (statistics.median(step[key] for step in steps) / base[key] - 1) * 100 if steps else None


def middle(values, pick=statistics.median):
    known = [value for value in values if value is not None]
    return pick(known) if known else None


def restore(loop, load, path, saved):
    """A load into the zeroed state; `saved` is what the first parameter was when it was saved."""
    state = loop.state()
    for part in state.values():
        for tensor in part.values():
            tensor.zero_()
    cache = drop_page_cache(path)
    loop.finish()
    start = now()
    load(state, path, loop.device)
    loop.finish()
    seconds = now() - start
    same = torch.equal(loop.parameters[0], saved)
    return {"restore_s": seconds, "restore_cache": cache, "restored_what_was_saved": same}


def measure(loop, name, every, arguments, with_restore):
    save, load = PEERS[name]
    path = os.path.join(arguments.folder, "peer")
    steps = [loop.step() for _ in range(BASE_STEPS)]
    base = {key: statistics.median(step[key] for step in steps) for key in ("step", "pass", "item")}
    saves = []
    try:
        with PeakMemory() as memory:
            for _ in range(arguments.saves):
                shutil.rmtree(path, ignore_errors=True)
                sync_file_system(arguments.folder)
                saved = loop.parameters[0].detach().clone()
                saves.append(one_save(loop, save, path, every, base))
        row = {key: middle(each[key] for each in saves) for key in saves[0] if key != "item_copy_us"}
        item = middle((each["item_copy_us"] for each in saves), max)
        row.update(
            saves=len(saves),
            step_ms=base["step"] * 1e3,
            item_us=base["item"] * 1e6,
            item_copy_us=None if item is None else item * 1e6,
            extra_rss_mb=memory.extra_mb(),
        )
        if with_restore:
            try:
                row.update(restore(loop, load, path, saved))
            except Exception as error:  # what was measured before stands
                row["error"] = "load: " + describe(error)
        return row
    finally:
        shutil.rmtree(path, ignore_errors=True)


def describe(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def show(row):
    def text(key, form):
        return "-" if row.get(key) is None else format(row[key], form)

    line = f"{str(row.get('cell')):20} {row['peer']:30} "
    if "error" in row:
        print(line + "failed: " + row["error"], flush=True)
    if "blocked_ms" not in row:
        return
    print(
        line + f"blocked {text('blocked_ms', '9.1f')} ms  call {text('call_ms', '9.1f')} ms  durable "
        f"{text('durable_s', '6.2f')} s  extra RSS {text('extra_rss_mb', '8.1f')} MB  step {text('step_ms', '7.1f')} ms"
        f"  restore {text('restore_s', '5.2f')} s",
        flush=True,
    )


def run_cell(cell, arguments, device, sizes, restored, emit):
    matrices, milliseconds, every = CELLS[cell]
    try:
        loop = Loop(matrices, milliseconds, device, sizes)
    except Exception as error:  # such as a GPU that is too small
        emit({"t": "ckpt", "peer": "", "cell": cell, "error": describe(error)})
        return
    pass_ms = round(milliseconds * sizes.time_share)
    facts = {"cell": cell, "state_gb": loop.state_bytes() / GB, "fb_ms": pass_ms, "every": every}
    for name in PEERS:
        try:
            row = measure(loop, name, every, arguments, (matrices, name) not in restored)
            restored.add((matrices, name))
        except Exception as error:  # whatever a peer raises: the others go on
            row = {"error": describe(error)}
        emit({"t": "ckpt", "peer": name, **facts, **row})
        gc.collect()


def run_ours(arguments, commit, emit):
    rows = os.path.join(arguments.folder, "ours.jsonl")
    command = [os.path.abspath(arguments.ours), "ckpt", "--json", rows]
    environment = {**os.environ, "OUNCE_COMMIT": commit} if commit else None
    code = subprocess.run(command, cwd=arguments.folder, env=environment).returncode
    if os.path.exists(rows):
        with open(rows) as lines:
            for line in lines:
                emit(json.loads(line))
    if code != 0:
        emit({"t": "ckpt", "peer": "ounce", "error": f"{' '.join(command)} exited with {code}"})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", default=",".join(CELLS), help="default: %(default)s")
    parser.add_argument("--saves", type=int, default=3, help="a cell and peer; default: 3")
    parser.add_argument("--folder", help="on the disk to measure; default: the folder for temporary files")
    parser.add_argument("--json", help="append a JSON object a row to this file")
    parser.add_argument("--ours", metavar="OUNCE_BENCH", help="our program; without it only the peers are measured")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a state of megabytes, to try the script out")
    arguments = parser.parse_args()
    cells = arguments.cells.split(",") if arguments.cells else []
    for cell in cells:
        if cell not in CELLS:
            parser.error(f"no cell '{cell}'; known: {', '.join(CELLS)}")
    device = torch.device(arguments.device)
    where = machine(device)
    if arguments.json and not where["commit"]:
        parser.error("git knows no commit to write beside the results of --json; set OUNCE_COMMIT")
    sizes = Sizes(arguments.tiny)
    torch.manual_seed(1)
    with contextlib.ExitStack() as stack:
        arguments.folder = stack.enter_context(tempfile.TemporaryDirectory(dir=arguments.folder))
        out = stack.enter_context(open(arguments.json, "a")) if arguments.json else None
        where.update(limits(device, arguments.folder, sizes))
        print(", ".join(f"{key} {value}" for key, value in where.items()), flush=True)

        def emit(row):
            show(row)
            if out:
                out.write(json.dumps({**where, **row}) + "\n")
                out.flush()

        if arguments.ours:
            run_ours(arguments, where["commit"], emit)
        # A loop that saves has a process group, of one rank here.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        stack.callback(dist.destroy_process_group)
        restored = set()  # once a size of state and peer
        for cell in cells:
            run_cell(cell, arguments, device, sizes, restored, emit)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
