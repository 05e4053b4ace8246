"""Step by step beside peer_torch.py: bench_train and the peer hold their models at the same time and take turns, so that each ratio
is of two steps within seconds, on a machine whose speed changes from one minute to the next.

usage: turns.py PEER SHAPE BATCH TOKENS TURNS          prints every turn, then the medians of their ratios
       turns.py --peer PEER SHAPE BATCH TOKENS TURNS   the peer's side: the script as it is, but its clock waits for its turn"""
import statistics
import subprocess
import sys
import time
import os


def peer(path, shape, batch, tokens, turns):
    state = {"running": False}

    def clock():
        if not state["running"]:
            print("ready", flush=True)
            sys.stdin.readline()
        else:
            print("done", flush=True)
        state["running"] = not state["running"]
        return time.perf_counter()

    sys.argv = [path, shape, "fp32", batch, tokens, turns]
    source = open(path).read()
    assert "time.perf_counter()" in source, path + " has another clock"
    exec(compile(source.replace("time.perf_counter()", "clock()"), path, "exec"), {"__name__": "__main__", "clock": clock})


class Side:
    def __init__(self, command, **variables):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                                        env=dict(os.environ, **variables))

    def until(self, word):
        for line in self.process.stdout:
            if line.strip() == word:
                return
        sys.exit("a side ended too soon: " + " ".join(self.process.args))

    def seconds(self):
        start = time.perf_counter()
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.until("done")
        return time.perf_counter() - start

    def rest(self):
        return self.process.stdout.read()


def number(text, before, after):
    """The number between two words."""
    return float(text.split(after)[0].split(before)[-1])


def main(path, shape, batch, tokens, turns):
    ours = Side(["./build/bench/bench_train", shape, batch, tokens, turns], BENCH_TURNS="1")
    theirs = Side([sys.executable, __file__, "--peer", path, shape, batch, tokens, turns])
    work, medians = int(batch) * int(tokens), []
    for what in ("step", "forward"):
        rates = []
        for _ in range(int(turns)):
            ours.until("ready")
            theirs.until("ready")
            rates.append((work / ours.seconds(), work / theirs.seconds()))
        ratios = sorted(a / b for a, b in rates)
        print(f"{shape:13} {what:7} " + "  ".join(f"{a:.0f}/{b:.0f}" for a, b in rates), flush=True)
        a, b = (statistics.median(side) for side in zip(*rates))
        medians.append(f"{what} {a:.0f} / {b:.0f} tokens/s, {statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})")
    mb, peak = number(ours.rest(), "by apt.h,", "MB resident"), number(theirs.rest(), "peak RSS", "MB loss")
    print(f"{shape:13} {', '.join(medians)}, memory {mb:.0f} / {peak:.0f} MB = {mb / peak:.2f}", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--peer":
        peer(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
