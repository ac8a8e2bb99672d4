"""Ablation of the demo: speed-up of EffOPD with one setting changed at a time.

    .venv/bin/python benchmarks/demo_variants.py [--family chain_sum] [--seed 0] [--variants dv400
    all strict ...]

Needs the runs of `benchmarks/demo_seeds.py` for the same family and seed, whose plain OPD is the
baseline. Prints speed-ups to plain OPD's final smoothed held-out KL, in steps, net seconds and
tokens, and speed-ups in steps to shares of the gap.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from transformers import PrinterCallback

from effopd.commands.quickstart import quiet
from effopd.commands.quickstart_settings import QuickstartArguments, settings
from effopd.compare.time_to_target import Cost, final_target, first_reach, speedup_by_gap
from effopd.extrapolate.config import EffOPDConfig
from effopd.launch.opd import build_trainer
from effopd.runs.records import read_evaluations, read_searches

VARIANTS = {
    "paper": {},
    "dv400": {"validation_size": 400, "args": {"batch_size": 400}},  # same gate, an eighth of the variance
    "all": {"parameters": "all"},  # also moves embeddings and norms
    "strict": {"gate": "better"},  # ties are rejected
    "released": {"strategy": "effopd-released"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="chain_sum")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    arguments = parser.parse_args()
    quiet()
    base = Path("runs") / f"demo-{arguments.family}-{arguments.seed}"
    plain = read_evaluations(base / "plain")
    target, whole = final_target(plain), Cost.of(plain[-1])
    for name in arguments.variants:
        root = Path("runs") / f"variant-{arguments.family}-{arguments.seed}-{name}"
        if name == "paper":
            root = base / "effopd"
        elif not (root / "done").exists():
            run = settings("effopd", QuickstartArguments(seed=arguments.seed, family=arguments.family), root)
            run.effopd = EffOPDConfig(**{"strategy": "effopd", "seed": arguments.seed} | VARIANTS[name])
            trainer = build_trainer(run)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            (root / "done").touch()
        rows, searches = read_evaluations(root), read_searches(root)
        reached = first_reach(rows, target)
        print(
            json.dumps(
                {
                    "variant": name,
                    "seed": arguments.seed,
                    "speedup": {k: round(v, 2) for k, v in whole.ratio(reached).items()} if reached else None,
                    "steps_speedup_by_gap": {
                        row["gap_closed"]: round(row["speedup"]["steps"], 2) if row["speedup"] else None
                        for row in speedup_by_gap(plain, rows)
                    },
                    "accepted": {search.step: search.accepted_scale for search in searches},
                    "search_seconds": round(sum(search.seconds for search in searches), 2),
                    "final_kl": round(final_target(rows), 5),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
