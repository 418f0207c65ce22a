"""Prefill and decode on a GPU each, against both on each of two GPUs, under the same load.

    python benchmarks/pd_vs_ifb.py --out benchmarks/results/pd-vs-ifb.json

A V3-width slice with random weights and simulated acceptance serves requests that arrive at random
(Poisson), with prompts and answers of a serving trace's lengths. Each layout is driven at several
rates. A request is good if its first token came within the limit and its later tokens at most so
far apart on average; goodput is good requests a second. The whole range of limits is written, since
which layout wins depends on it.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import platform
import queue
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dskjax import model
from dskjax.config import MtpConfig
from dskjax.decode.rules import RuleOptions
from dskjax.presets import preset
from dskjax.provenance import source_commit
from serve.attempts import CoordinatorConfig
from serve.build import Model, build_engine, place
from serve.config import EngineConfig, parse_roles
from serve.coordinator import Coordinator, Mailbox
from serve.request import Request, SamplingOptions, StopOptions
from serve.transfer.local import LocalTransport

LAYOUTS = {"1P1D": "1P1D", "2 x in-flight batching": "2ifb"}


class Job(NamedTuple):
    """A request of the load: when it comes, and its lengths in tokens."""

    at: float
    prompt: int
    answer: int


@dataclasses.dataclass
class Timing:
    """Seconds since arrival of the first and last token, and how many there were."""

    prompt: int
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0

    @property
    def tpot(self) -> float:
        """Mean seconds between later tokens."""
        return (self.last - self.first) / max(self.tokens - 1, 1)


def main() -> None:
    """Drives both layouts at every rate and writes the figures and the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="deepseek-v3")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--rates", type=float, nargs="+", default=[4.0, 8.0, 12.0, 16.0])
    parser.add_argument("--seconds", type=float, default=15.0, help="of arrivals at each rate")
    parser.add_argument("--input-mean", type=int, default=3500)
    parser.add_argument("--input-max", type=int, default=16000)
    parser.add_argument("--output-mean", type=int, default=150)
    parser.add_argument("--output-max", type=int, default=600)
    parser.add_argument("--slots", type=int, default=48)
    parser.add_argument("--chunk", type=int, default=4096)
    parser.add_argument("--drafts", type=int, default=1)
    parser.add_argument("--accepted-length", type=float, default=1.8)
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--stacked", action="store_true", help="scan over stacked weights")
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS))
    parser.add_argument("--few-buckets", action="store_true")
    parser.add_argument("--layerwise-from", type=int, default=8192)
    parser.add_argument("--append", action="store_true", help="keep the runs that --out has")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    base = preset(args.preset)
    moe = dataclasses.replace(base.moe, n_routed_experts=args.experts)
    cfg = dataclasses.replace(
        base,
        num_hidden_layers=args.layers,
        first_k_dense_replace=1,
        moe=moe,
        mtp=MtpConfig(num_nextn_predict_layers=1),
    )
    length = args.input_max + args.output_max + 64
    config = EngineConfig(
        max_model_len=-(-length // args.page_size) * args.page_size,
        slots=args.slots,
        chunk=args.chunk,
        page_size=args.page_size,
        drafts=args.drafts,
        accept=RuleOptions(name="rejection"),
        rules=("rejection",),
        synthetic=args.accepted_length,
        mixed=False,
        unroll=not args.stacked,
        extras=False,
        few_buckets=args.few_buckets,
        layerwise_from=args.layerwise_from,
    )
    result: dict[str, Any] = {
        "devices": [device.device_kind for device in jax.devices()[:2]],
        "jax": jax.__version__,
        "python": platform.python_version(),
        "commit": source_commit(),
        "synthetic_acceptance": args.accepted_length,
        "settings": {k: v for k, v in vars(args).items() if k not in ("out", "append", "layouts")},
        "runs": [],
    }
    if args.append and args.out.exists():
        result["runs"] = json.loads(args.out.read_text())["runs"]
    for layout in args.layouts:
        server = Bench(cfg, config, LAYOUTS[layout], args)
        for rate in args.rates:
            timings = server.drive(jobs(args, rate))
            result["runs"].append({"layout": layout, "rate": rate, **figures(timings, args)})
            print(json.dumps(result["runs"][-1]["summary"]), flush=True)
            write(result, args.out)
        result["runs"][-1]["transfer"] = server.transfer()
        server.stop()
    write(result, args.out)


class Bench:
    """A layout's engines behind a coordinator."""

    def __init__(self, cfg: Any, config: EngineConfig, roles: str, args: argparse.Namespace):
        placements = place(parse_roles(roles), jax.devices())
        key = jax.random.key(0)
        params = jax.jit(lambda key: model.init(cfg, key, dtype=args.dtype))(key)
        served = Model(name="slice", params=params, cfg=cfg, eos_ids=())
        mailbox = Mailbox()
        self.vocab = cfg.vocab_size
        self.wire = None
        if "P" in roles:
            self.wire = LocalTransport({p.name: p.mover() for p in placements})
        begun = time.monotonic()
        build = functools.partial(
            build_engine, served, config, post=mailbox.post, transport=self.wire
        )
        with concurrent.futures.ThreadPoolExecutor(len(placements)) as pool:
            engines = list(pool.map(build, placements))
        print(f"{roles}: started in {time.monotonic() - begun:.1f} s", flush=True)
        limits = CoordinatorConfig(
            max_queue=100000, layerwise_tokens=config.layerwise_from, local_prefill_tokens=0
        )
        self.coordinator = Coordinator(engines, mailbox, transport=self.wire, config=limits)
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.coordinator.start(self.events.put)
        while not self.coordinator.ready:
            time.sleep(0.01)
        self.count = 0

    def drive(self, load: Sequence[Job]) -> list[Timing]:
        """Sends the load and waits for every answer."""
        rng = np.random.default_rng(len(load))
        timings: dict[str, Timing] = {}
        requests = []
        for job in load:
            self.count += 1
            request = Request(
                f"r{self.count}",
                rng.integers(0, self.vocab, job.prompt).tolist(),
                stop=StopOptions(max_tokens=job.answer),
                sampling=SamplingOptions(temperature=1.0, seed=self.count),
            )
            timings[request.id] = Timing(job.prompt)
            requests.append((job.at, request))
        begun = time.monotonic()

        def send() -> None:
            for at, request in requests:
                time.sleep(max(0.0, begun + at - time.monotonic()))
                request.arrival = time.monotonic()
                self.coordinator.submit(request)

        sender = threading.Thread(target=send)
        sender.start()
        left = len(requests)
        while left:
            for event in self.events.get(timeout=300):
                timing, now = timings[event.request.id], time.monotonic()
                if event.message:
                    raise RuntimeError(event.message)
                if event.tokens:
                    waited = now - event.request.arrival
                    timing.first = timing.first or waited
                    timing.last, timing.tokens = waited, timing.tokens + len(event.tokens)
                left -= event.finish is not None
        sender.join()
        return list(timings.values())

    def transfer(self) -> dict[str, Any] | None:
        """What went over the wire."""
        if self.wire is None:
            return None
        stats = dataclasses.asdict(self.wire.stats)
        count = stats["overlap_count"]
        stats["mean_overlap"] = stats["overlap_sum"] / count if count else None
        return stats

    def stop(self) -> None:
        """Ends the engines and frees their memory."""
        self.coordinator.stop()
        self.coordinator = None
        jax.clear_caches()


def jobs(args: argparse.Namespace, rate: float) -> list[Job]:
    """Poisson arrivals; lognormal lengths of the given means, clipped. The same for each layout."""
    rng = np.random.default_rng(17)
    gaps = rng.exponential(1 / rate, int(args.seconds * rate))

    def lengths(mean: float, most: int) -> np.ndarray:
        sigma = 0.9
        drawn = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, len(gaps))
        return np.clip(drawn, 16, most).astype(int)

    prompts = lengths(args.input_mean, args.input_max)
    answers = lengths(args.output_mean, args.output_max)
    rows = zip(np.cumsum(gaps).tolist(), prompts.tolist(), answers.tolist(), strict=True)
    return [Job(*row) for row in rows]


def figures(timings: Sequence[Timing], args: argparse.Namespace) -> dict[str, Any]:
    """Percentiles, throughput, and goodput for each limit of TPOT with TTFT within 2 s."""
    ttft, tpot = np.array([t.first for t in timings]), np.array([t.tpot for t in timings])
    span = args.seconds
    limits = [5, 10, 15, 20, 25, 30, 40, 50, 75, 100, 150, 200]
    good = {str(ms): float(((tpot < ms / 1e3) & (ttft < 2.0)).sum() / span) for ms in limits}
    percentiles = {
        name: {f"p{p}": float(np.percentile(values, p)) for p in (50, 90, 99)}
        for name, values in (("ttft_s", ttft), ("tpot_s", tpot))
    }
    summary = {
        "requests": len(timings),
        **percentiles,
        "input_tokens_per_s": float(sum(t.prompt for t in timings) / span),
        "output_tokens_per_s": float(sum(t.tokens for t in timings) / span),
    }
    return {"summary": summary, "goodput_per_s_by_tpot_ms": good}


def write(result: dict[str, Any], out: Path) -> None:
    """The figures, and goodput against the limit of TPOT beside them as a plot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for layout in dict.fromkeys(run["layout"] for run in result["runs"]):
        runs = [run for run in result["runs"] if run["layout"] == layout]
        limits = list(runs[0]["goodput_per_s_by_tpot_ms"])
        best = [max(run["goodput_per_s_by_tpot_ms"][ms] for run in runs) for ms in limits]
        axis.plot([int(ms) for ms in limits], best, marker="o", label=layout)
    axis.set(
        xlabel="limit of TPOT, ms (TTFT < 2 s)",
        ylabel="goodput, requests/s (best rate)",
        title="simulated acceptance; two GPUs in either layout",
        xscale="log",
    )
    axis.legend()
    figure.savefig(out.with_suffix(".png"), dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
