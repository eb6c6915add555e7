"""Kills a run after each of its system calls that write to the run folder, and lets the same command go on.

    python -m tests.kills [--torn] [--first=1] [--every=1]

Whenever it was killed, the run that goes on must leave what a run in one piece leaves: the same bits in its last
checkpoint, each step, evaluation and sample once, and no other files but a checkpoint that was yet to be removed.
`--torn` kills in the middle of each write instead, `--first=9 --every=7` after the ninth call and every seventh from
there. By hand, with a C compiler: about 5 s a call.

A library that is loaded before the C library counts the calls. Runs are forks of a process that has imported
everything and has no threads yet.
"""

import argparse
import collections
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import safetensors

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
#include <sys/stat.h>

static char folder[4096];
static long last = -1, calls = 0;
static int torn = 0;
static FILE* names = NULL;

void watch(const char* path, long kill_after, int in_a_write, const char* log) {
  strcpy(folder, path); last = kill_after; torn = in_a_write; calls = 0;
  names = log ? fopen(log, "w") : NULL;
}

static int inside(const char* path) { return *folder && path && !strncmp(path, folder, strlen(folder)); }
static int open_inside(int fd) {
  char link[64], path[4096];
  if (!*folder) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t size = readlink(link, path, sizeof path - 1);
  if (size < 0) return 0;
  path[size] = 0;
  return inside(path);
}
static void done(int counts, const char* name) {
  if (!counts) return;
  if (names) { fprintf(names, "%s\n", name); fflush(names); }
  if (++calls == last) kill(getpid(), SIGKILL);
}
#define REAL(type, name, ...) \
  static type (*real)(__VA_ARGS__) = NULL; if (!real) real = dlsym(RTLD_NEXT, name)
#define TORN(size) (torn && calls + 1 == last ? (size) / 2 : (size))

ssize_t write(int fd, const void* data, size_t size) {
  REAL(ssize_t, "write", int, const void*, size_t);
  int counts = open_inside(fd);
  ssize_t result = real(fd, data, counts ? TORN(size) : size);
  done(counts, "write"); return result;
}
int fflush(FILE* file) {
  REAL(int, "fflush", FILE*);
  int counts = file && file != names && open_inside(fileno(file));
  int result = real(file); done(counts, "fflush"); return result;
}
int rename(const char* from, const char* to) {
  REAL(int, "rename", const char*, const char*);
  int result = real(from, to); done(inside(to), "rename"); return result;
}
int unlink(const char* path) {
  REAL(int, "unlink", const char*);
  int result = real(path); done(!result && inside(path), "unlink"); return result;
}
int mkdir(const char* path, mode_t mode) {
  REAL(int, "mkdir", const char*, mode_t);
  int result = real(path, mode); done(!result && inside(path), "mkdir"); return result;
}
int fsync(int fd) {
  REAL(int, "fsync", int);
  int result = real(fd); done(open_inside(fd), "fsync"); return result;
}
int ftruncate64(int fd, off64_t size) {
  REAL(int, "ftruncate64", int, off64_t);
  int result = real(fd, size); done(open_inside(fd), "ftruncate"); return result;
}
#define OPEN(name) \
  int name(const char* path, int flags, ...) { \
    REAL(int, #name, const char*, int, ...); \
    va_list rest; va_start(rest, flags); mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0; va_end(rest); \
    int counts = flags & (O_CREAT | O_TRUNC) && inside(path), result = real(path, flags, mode); \
    done(counts && result >= 0, "open"); return result; }
OPEN(open)
OPEN(open64)
"""
PARAMS = ("replicas.cpu = 1", "run.steps = 5", "run.eval_first = True", "run.eval_every = 2", "run.save_every = 2")
# Without a thread, so that all runs make the same calls in the same order.
MORE = ("run.save_async = False", "run.keep = 1", "run.steps_per_loop = 2", "sample.length = 3")


def run(command: list[str], folder: Path, kill_after: int = -1, torn: bool = False, log: Path | None = None) -> int:
    """Runs the command in a fork; returns its exit code, negative after a signal."""
    child = os.fork()
    if not child:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        from dist_partial import train

        ctypes.CDLL(None).watch(
            str(folder).encode(), ctypes.c_long(kill_after), torn, str(log).encode() if log else None
        )
        os._exit(train.main([*command, f"--run_dir={folder}"]))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def left(folder: Path) -> dict[str, object]:
    """What a run leaves that depends on nothing but its configuration."""
    *older, last = sorted((folder / "checkpoints").glob("step-*"))
    with safetensors.safe_open(last, framework="np") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        arrays = {name: (array.dtype.str, array.shape, array.tobytes()) for name, array in found.items()}
        arrays["metadata"] = file.metadata()
    files = [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if "tensorboard" not in path.relative_to(folder).parts[:-1] and path not in older
    ]
    lines = {
        name: [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "samples.jsonl")
    }
    whole = {
        name: (folder / name).read_text() for name in ("plan.json", "operative_config.gin", "run_fingerprint.json")
    }
    counted = json.loads((folder / "traffic.json").read_text())["last_step"]
    return {"arrays": arrays, "files": sorted(files), **lines, **whole, "traffic": counted}


def main(torn: bool, first: int, every: int) -> int:
    """Kills, compares and says what differed; returns an exit code."""
    from tests.helpers.letters import GIN, MODULE

    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "letters_module.py").write_text(MODULE)
        (place / "letters.gin").write_text(GIN)
        sys.path.insert(0, name)
        import dist_partial.training.loop  # noqa: F401 - once, for all forks

        command = [f"--gin_file={place / 'letters.gin'}", *(f"--gin_param={param}" for param in (*PARAMS, *MORE))]
        assert run(command, place / "whole", log=place / "calls") == 0
        expected, calls = left(place / "whole"), (place / "calls").read_text().split()
        print(f"{len(calls)} calls: {dict(collections.Counter(calls))}", flush=True)
        tried = [n for n in range(first, len(calls) + 1, every) if not torn or calls[n - 1] == "write"]
        bad = 0
        for number in tried:
            folder = place / "run"
            shutil.rmtree(folder, ignore_errors=True)
            code = run(command, folder, number, torn)
            again = run(command, folder)
            found = left(folder) if again == 0 else {"exit code": again}
            wrong = [key for key in expected if found.get(key) != expected[key]]
            if code != -signal.SIGKILL or wrong:
                bad += 1
                print(f"call {number} ({calls[number - 1]}): ended with {code}, then differ: {wrong}", flush=True)
        print(f"{len(tried)} runs killed{' in a write' if torn else ''}, {len(tried) - bad} went on to the same")
    return bool(bad)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--torn", action="store_true")
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--every", type=int, default=1)
    options = parser.parse_args()
    if "DIST_PARTIAL_KILLS" not in os.environ:
        with tempfile.TemporaryDirectory() as name:
            (Path(name) / "calls.c").write_text(SOURCE)
            library = f"{name}/calls.so"
            subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, f"{name}/calls.c", "-ldl"], check=True)
            environment = {**os.environ, "LD_PRELOAD": library, "DIST_PARTIAL_KILLS": "1", "CUDA_VISIBLE_DEVICES": "-1"}
            sys.exit(subprocess.run([sys.executable, "-m", "tests.kills", *sys.argv[1:]], env=environment).returncode)
    sys.exit(main(options.torn, options.first, options.every))
